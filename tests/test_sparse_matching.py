"""Assignment without the dense matrix: the same answers, from the same inputs, in less memory."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from compatible import in_front
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import hyperproto.matching.solve
import hyperproto.matching.sparse
from hyperproto import DynamicAssigner, HypersphericalHead, PrototypeBank
from hyperproto.errors import AssignmentError, ShapeError
from hyperproto.functional import solve_assignment
from hyperproto.matching.candidates import Candidates
from hyperproto.matching.prices import exact_prices
from hyperproto.matching.problem import Problem, check_assignment
from hyperproto.matching.sparse import solve_sparse
from hyperproto.sphere import normalise

SEEDS = st.integers(0, 2**32 - 1)


def unit_rows(num_rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return normalise(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)))


def means_of(shape: str, num_labels: int, prototypes: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Class means as training meets them: scattered, all alike, in clusters, near their prototypes, tied, unseen."""
    generator = torch.Generator().manual_seed(seed)
    noise = unit_rows(num_labels, prototypes.shape[1], seed + 1)
    order = torch.randperm(len(prototypes), generator=generator)[:num_labels]
    if shape == "random":
        return noise
    if shape == "coinciding":
        return normalise(unit_rows(1, prototypes.shape[1], seed + 2) + 0.1 * noise)
    if shape == "clusters":
        centres = unit_rows(5, prototypes.shape[1], seed + 2)
        return normalise(centres[torch.randint(5, (num_labels,), generator=generator)] + 0.05 * noise)
    if shape == "trained":
        return normalise(prototypes[order] + 0.5 * noise)
    if shape == "equal":
        return noise[:1].repeat(num_labels, 1)
    if shape == "at prototypes":
        return prototypes[order]
    if shape == "duplicates":
        return noise[torch.randint(num_labels // 2 + 1, (num_labels,), generator=generator)]
    if shape == "unseen":
        return noise * (torch.rand(num_labels, 1, generator=generator) < 0.6)
    raise ValueError(shape)


SHAPES = ["random", "coinciding", "clusters", "trained", "equal", "at prototypes", "duplicates", "unseen"]


def bank_of(kind: str, num_prototypes: int, dim: int, seed: int = 0) -> torch.Tensor:
    if kind == "cross-polytope":
        return torch.cat([torch.eye(dim), -torch.eye(dim)])
    if kind == "simplex":
        return normalise(torch.eye(dim) - 1.0 / dim)
    if kind == "duplicates":
        return unit_rows(num_prototypes // 3 + 1, dim, seed).repeat(3, 1)[:num_prototypes]
    return unit_rows(num_prototypes, dim, seed)


def best_total(means: torch.Tensor, prototypes: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Largest total similarity by scipy, from float64 cosines: independent of the library's solvers."""
    similarity = normalise(means).double().numpy() @ normalise(prototypes).double().numpy().T
    if weights is not None:
        similarity *= weights.double().numpy()[:, None]
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float(similarity[rows, columns].sum())


# The same answers


@settings(max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["random", "cross-polytope", "simplex", "duplicates"]),
    num_prototypes=st.integers(1, 90),
    dim=st.integers(2, 24),
    spare=st.sampled_from([0, 0, 1, 5, 40]),
    weighted=st.booleans(),
    seed=SEEDS,
)
def test_equals_the_dense_answer(shape, kind, num_prototypes, dim, spare, weighted, seed):
    prototypes = bank_of(kind, num_prototypes, dim, seed)
    num_labels = max(1, len(prototypes) - spare)
    means = means_of(shape, num_labels, prototypes, seed)
    weights = torch.rand(num_labels, generator=torch.Generator().manual_seed(seed)) * 3.0 if weighted else None
    current = torch.randperm(len(prototypes), generator=torch.Generator().manual_seed(seed))[:num_labels]
    solution = solve_assignment(means, prototypes, current=current, weights=weights, method="sparse")
    assert (solution.optimal, solution.method) == (True, "sparse")
    check_assignment(solution.assignment, num_labels, len(prototypes))
    assert solution.similarity == pytest.approx(best_total(means, prototypes, weights), abs=1e-6)


@given(shape=st.sampled_from(SHAPES), num_labels=st.integers(1, 6), spare=st.integers(0, 1), seed=SEEDS)
def test_equals_brute_force(shape, num_labels, spare, seed):
    prototypes = unit_rows(num_labels + spare, 3, seed)
    means = means_of(shape, num_labels, prototypes, seed)
    table = (means.double() @ prototypes.double().T).tolist()
    best = max(
        sum(table[row][column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(num_labels + spare), num_labels)
    )
    assert solve_assignment(means, prototypes, method="sparse").similarity == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "spare"),
    in_front(itertools.product(SHAPES, [0, 150]), *((shape, 150) for shape in SHAPES), ("random", 0), ("equal", 0)),
)
def test_equals_the_dense_answer_where_few_pairs_are_listed(shape, spare):
    num_prototypes = 900
    prototypes = unit_rows(num_prototypes, 24)
    means = means_of(shape, num_prototypes - spare, prototypes, seed=1)
    solution = solve_assignment(means, prototypes, method="sparse")
    assert solution.optimal
    assert solution.similarity == pytest.approx(best_total(means, prototypes), abs=1e-6)


@pytest.mark.parametrize("kind", ["orthoplex", "simplex"])
@pytest.mark.parametrize("shape", ["random", "clusters", "trained", "equal", "at prototypes"])
def test_equals_the_dense_answer_on_structured_banks(kind, shape):
    num_prototypes, dim = (400, 200) if kind == "orthoplex" else (300, 299)
    prototypes = PrototypeBank(num_prototypes, dim, method=kind).prototypes
    means = means_of(shape, num_prototypes, prototypes, seed=2)
    solution = solve_assignment(means, prototypes, method="sparse")
    assert solution.similarity == pytest.approx(best_total(means, prototypes), abs=1e-6)


@given(seed=SEEDS, shape=st.sampled_from(SHAPES), spare=st.sampled_from([0, 30]))
def test_prices_prove_the_answer_for_every_pair(seed, shape, spare):
    prototypes = unit_rows(120, 8, seed)
    means = means_of(shape, 120 - spare, prototypes, seed)
    solution = solve_assignment(means, prototypes, method="sparse")
    similarity, prices = means.double() @ prototypes.double().T, solution.prices
    seen = means.any(dim=1)
    profits = (similarity - prices).amax(dim=1)[seen]
    # Weak duality with independent arithmetic: no assignment of the seen labels can exceed this.
    assert float(profits.sum() + prices.sum()) == pytest.approx(solution.similarity, abs=1e-5)
    if int(seen.sum()) < len(prototypes):
        assert (prices >= -1e-9).all()


def test_reduced_precision_of_matrix_products_changes_no_answer():
    prototypes = unit_rows(600, 32)
    means = means_of("clusters", 600, prototypes)
    problem = Problem(means, prototypes, torch.ones(600).double(), np.arange(600), np.zeros(600, dtype=bool))
    candidates = Candidates(problem)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        total = solve_assignment(means, prototypes, method="sparse").similarity
        candidates.scan(np.zeros(600))
        errors = candidates.values - problem.similarities(candidates.rows, candidates.columns)
        assert np.abs(errors).max() <= problem.rounding
    finally:
        torch.set_float32_matmul_precision(before)
    assert total == pytest.approx(best_total(means, prototypes), abs=1e-6)


def test_autocast_changes_no_answer():
    prototypes = unit_rows(600, 32)
    means = means_of("clusters", 600, prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = solve_assignment(means, prototypes, method="sparse").similarity
    assert total == pytest.approx(best_total(means, prototypes), abs=1e-6)


# Ties, and labels never seen


def test_ties_move_nothing():
    current = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    solution = solve_assignment(torch.ones(64, 64), torch.eye(64), current=current, method="sparse")
    assert torch.equal(solution.assignment, current)


def test_labels_never_seen_keep_their_prototype_unless_a_seen_one_needs_it():
    means = torch.zeros(8, 8)
    means[0, 1] = 1.0  # label 0 wants what label 1, never seen, has
    current = torch.tensor([3, 1, 4, 0, 5, 2, 7, 6])
    solution = solve_assignment(means, torch.eye(8), current=current, method="sparse")
    assert solution.assignment.tolist() == [1, 3, 4, 0, 5, 2, 7, 6]


def test_a_free_prototype_is_taken_before_one_that_a_label_never_seen_holds():
    prototypes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    solution = solve_assignment(means, prototypes, current=torch.tensor([0, 2]), method="sparse")
    assert solution.assignment.tolist() == [0, 1]


def test_nothing_seen_moves_nothing():
    current = torch.tensor([2, 0, 1])
    solution = solve_assignment(torch.zeros(3, 4), torch.eye(4), current=current, method="sparse")
    assert torch.equal(solution.assignment, current)
    assert (solution.similarity, solution.optimal) == (0.0, True)


# Warm steps


@given(
    shape=st.sampled_from(SHAPES), spare=st.sampled_from([0, 20]), scale=st.sampled_from([0.0, 1.0, 1e6]), seed=SEEDS
)
def test_prices_to_start_from_change_no_total(shape, spare, scale, seed):
    prototypes = unit_rows(100, 12, seed)
    means = means_of(shape, 100 - spare, prototypes, seed)
    prices = scale * torch.randn(100, generator=torch.Generator().manual_seed(seed))
    warm = solve_assignment(means, prototypes, prices=prices, method="sparse")
    assert warm.similarity == pytest.approx(best_total(means, prototypes), abs=1e-6)


def scanned_from_now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that fills with how many labels each scan looks at."""
    scanned = []
    scan = Candidates.scan

    def counting(self, prices, labels=None):
        scanned.append(len(self.left_out) if labels is None else len(labels))
        return scan(self, prices, labels)

    monkeypatch.setattr(Candidates, "scan", counting)
    return scanned


@pytest.mark.parametrize("shape", in_front(["random", "coinciding", "clusters", "trained"], "random", "trained"))
def test_a_warm_step_scans_once_when_little_has_changed(shape, monkeypatch):
    prototypes = unit_rows(1200, 64)
    means = means_of(shape, 1200, prototypes)
    first = solve_assignment(means, prototypes, method="sparse")
    scanned = scanned_from_now(monkeypatch)
    means = normalise(means + 1e-4 * unit_rows(1200, 64, seed=9))
    second = solve_assignment(means, prototypes, current=first.assignment, prices=first.prices, method="sparse")
    assert sum(scanned) < 1.5 * 1200
    assert second.similarity == pytest.approx(best_total(means, prototypes), abs=1e-6)


def test_an_assigner_steps_warm_and_resumes_without_its_prices():
    head = HypersphericalHead(16, 60, bank=PrototypeBank(80, 16, method="random"), projection="none")
    assigner = DynamicAssigner(head, solver="sparse")
    assigner.update(unit_rows(300, 16), torch.arange(300) % 60)
    assert assigner.step().solver == "sparse"
    assert assigner.prices.any()
    assert "prices" not in assigner.state_dict()
    resumed = DynamicAssigner(head, solver="sparse")
    resumed.load_state_dict(assigner.state_dict())
    assert not resumed.prices.any()
    for each in (assigner, resumed):
        each.update(unit_rows(30, 16, seed=5), torch.arange(30))
    total = assigner.step().similarity_after
    assert resumed.step().similarity_after == pytest.approx(total, abs=1e-6)
    assert total == pytest.approx(best_total(assigner.class_means, head.bank.prototypes), abs=1e-5)


# Choosing, falling back, refusing


def test_auto_picks_by_size(monkeypatch):
    monkeypatch.setattr(hyperproto.matching.solve, "SPARSE_FROM_CLASSES", 50)
    for num_classes, method in ((49, "dense"), (50, "sparse")):
        solution = solve_assignment(unit_rows(num_classes, 8), unit_rows(60, 8, seed=1))
        assert solution.method == method
        assert (solution.prices is None) == (method == "dense")


def test_rounds_that_do_not_close_fall_back_to_dense_or_say_what_it_needs(monkeypatch):
    means, prototypes = unit_rows(300, 8), unit_rows(300, 8, seed=1)

    def never_closes(*args, **kwargs):
        solution = solve_sparse(*args, **kwargs)
        return type(solution)(solution.assignment, solution.prices, proven=False)

    monkeypatch.setattr(hyperproto.matching.solve, "solve_sparse", never_closes)
    solution = solve_assignment(means, prototypes, method="sparse")
    assert (solution.method, solution.optimal) == ("dense", True)
    needed = 3 * 8 * 300 * 300
    monkeypatch.setattr(hyperproto.matching.solve, "DENSE_BYTES", needed)
    assert solve_assignment(means, prototypes, method="sparse").method == "dense"
    monkeypatch.setattr(hyperproto.matching.solve, "DENSE_BYTES", needed - 1)
    with pytest.raises(AssignmentError, match=r'300 labels.*method="dense".*0\.0 GiB'):
        solve_assignment(means, prototypes, method="sparse")


def test_prices_of_another_bank_are_refused():
    with pytest.raises(ShapeError, match=r"\(6,\), got \(5,\)"):
        solve_assignment(unit_rows(5, 4), unit_rows(6, 4), prices=torch.zeros(5), method="sparse")


def test_inputs_are_left_alone_and_no_global_random_state_is_used():
    means, prototypes, prices = unit_rows(200, 8), unit_rows(220, 8, seed=1), torch.zeros(220)
    current = torch.arange(200)
    copies = [x.clone() for x in (means, prototypes, prices, current)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = solve_assignment(means, prototypes, current=current, prices=prices, method="sparse")
    again = solve_assignment(means, prototypes, current=current, prices=prices, method="sparse")
    assert all(torch.equal(x, copy) for x, copy in zip((means, prototypes, prices, current), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(first.assignment, again.assignment)
    assert torch.equal(first.prices, again.prices)


# The parts


def test_a_scan_bounds_what_it_leaves_out():
    prototypes, num_labels = unit_rows(1500, 16), 700
    means = unit_rows(num_labels, 16, seed=1)
    problem = Problem(
        means, prototypes, torch.ones(num_labels).double(), np.arange(num_labels), np.zeros(len(prototypes), dtype=bool)
    )
    candidates = Candidates(problem)
    prices = 0.1 * np.random.default_rng(0).standard_normal(len(prototypes))
    candidates.scan(prices)
    gains = means.double().numpy() @ prototypes.double().numpy().T - prices
    assert np.allclose(candidates.values, (gains + prices)[candidates.rows, candidates.columns], atol=1e-6)
    gains[candidates.rows, candidates.columns] = -np.inf
    assert (gains.max(axis=1) <= candidates.left_out + problem.rounding).all()
    assert np.bincount(candidates.rows).min() >= 24
    assert np.bincount(candidates.columns, minlength=1500).min() >= 8
    # Some prices fall: every label with a better pair among those left out is in doubt, and not all labels are.
    lower = prices - 0.2 * (np.random.default_rng(1).random(len(prototypes)) < 0.01)
    profits = candidates.profits(lower)
    doubtful = candidates.open_labels(profits, lower)
    better = (gains + prices - lower).max(axis=1) > profits
    assert set(np.flatnonzero(better)) <= set(doubtful)
    assert 0 < better.sum() <= len(doubtful) < num_labels


@given(seed=SEEDS, spare=st.sampled_from([0, 7]))
def test_exact_prices_are_feasible_and_tight(seed, spare):
    generator = np.random.default_rng(seed)
    prototypes, num_labels = unit_rows(30, 6, seed), 30 - spare
    means = unit_rows(num_labels, 6, seed + 1)
    problem = Problem(
        means, prototypes, torch.ones(num_labels).double(), np.arange(num_labels), np.zeros(30, dtype=bool)
    )
    candidates = Candidates(problem)
    candidates.scan(np.zeros(30))
    candidates.activate(np.arange(len(candidates.rows)))
    similarity = means.double().numpy() @ prototypes.double().numpy().T
    table = np.full_like(similarity, -1e3)
    table[candidates.rows, candidates.columns] = candidates.values
    _, assignment = linear_sum_assignment(table, maximize=True)
    profits, prices = exact_prices(candidates, assignment, 0.3 * generator.standard_normal(30))
    assert (candidates.reduced_costs(profits, prices) <= 1e-9).all()
    assert np.allclose(profits + prices[assignment], similarity[np.arange(num_labels), assignment])
    if spare:
        left_over = np.setdiff1d(np.arange(30), assignment)
        assert (prices[left_over] == 0).all()
        assert (prices >= -1e-9).all()


# Size


MEMORY_OF_A_SOLVE = """
import resource, torch
from hyperproto.functional import solve_assignment
from hyperproto.sphere import normalise
generator = torch.Generator().manual_seed(0)
means, prototypes = (normalise(torch.randn({size}, 64, generator=generator)) for _ in range(2))
solve_assignment(means[:100], prototypes[:100], method="sparse")  # loads scipy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
solution = solve_assignment(means, prototypes, method="sparse")
print(solution.optimal, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_of_20000_labels():
    code = MEMORY_OF_A_SOLVE.format(size=20_000)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "True"
    assert int(out[1]) < 600 * 1024  # KiB; the matrix alone would be 3.0 GiB in float64


def test_the_second_step_of_an_assigner_scans_once_when_little_has_changed(monkeypatch):
    prototypes = unit_rows(1200, 64)
    bank = PrototypeBank.from_tensor(prototypes)
    head = HypersphericalHead(64, 1200, bank=bank, projection="none", training_output="embedding")
    assigner = DynamicAssigner(head, solver="sparse", momentum=None)
    means = means_of("clusters", 1200, prototypes)
    assigner.update(means, torch.arange(1200))
    assigner.step()
    scanned = scanned_from_now(monkeypatch)
    assigner.update(normalise(means + 1e-4 * unit_rows(1200, 64, seed=9)), torch.arange(1200))
    assigner.step()
    assert 0 < sum(scanned) < 1.5 * 1200
