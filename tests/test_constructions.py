"""Constructions: closed forms, known optima, and one contract for all methods of the registry."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperproto import BankError
from hyperproto.constructions import CONSTRUCTIONS, MOST_OPTIMISED_PROTOTYPES, choose_method
from hyperproto.constructions._optimise import SUM_BLOCK, Objective, minimise, progress_bar, weighted_sums
from hyperproto.constructions._rotation import random_frame
from hyperproto.constructions.energy import energy_points, riesz_energy
from hyperproto.constructions.hpn import smooth_row_maxima
from hyperproto.constructions.separated import separated_points, smooth_maximum

#: A size that each method serves.
SPECIAL_SIZES = {"simplex": (7, 6), "orthoplex": (10, 6), "code": (50, 32)}
SIZES = {name: SPECIAL_SIZES.get(name, (20, 5)) for name in CONSTRUCTIONS}
OPTIMISED = ("separated", "uniform", "energy", "hpn")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def build(method: str, seed: int = 0) -> Tensor:
    return CONSTRUCTIONS[method](*SIZES[method], generator(seed))


def gram(points: Tensor) -> np.ndarray:
    return points.double().numpy() @ points.double().numpy().T


def cosines(points: Tensor) -> np.ndarray:
    matrix = gram(points)
    return matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)


def distances(points: Tensor) -> np.ndarray:
    return np.sqrt(2 - 2 * cosines(points))


def icosahedron() -> Tensor:
    golden = (1 + 5**0.5) / 2
    corners = [(0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    points = torch.tensor([corner[-turn:] + corner[:-turn] for corner in corners for turn in range(3)])
    return points.double() / points.double().norm(dim=1, keepdim=True)


# Every method


@pytest.mark.parametrize("method", CONSTRUCTIONS)
def test_unit_rows_in_float32_on_the_cpu(method):
    points = build(method)
    assert points.shape == SIZES[method]
    assert points.dtype == torch.float32
    assert points.device.type == "cpu"
    assert points.is_contiguous()
    assert not points.requires_grad
    np.testing.assert_allclose(points.double().norm(dim=1), 1, atol=1e-6)


@pytest.mark.parametrize("method", CONSTRUCTIONS)
def test_same_seed_same_bits_and_another_seed_other_points(method):
    assert torch.equal(build(method), build(method))
    assert not torch.allclose(build(method), build(method, seed=1), atol=1e-3)


@pytest.mark.parametrize("method", CONSTRUCTIONS)
def test_surroundings_change_nothing_and_are_not_changed(method):
    expected = build(method)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            got = build(method)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", CONSTRUCTIONS)
@pytest.mark.parametrize(("num", "dim", "match"), [(2, 1, "on a line"), (2, 0, "dim >= 2"), (1, 3, "at least 2")])
def test_sizes_that_no_method_takes(method, num, dim, match):
    with pytest.raises(BankError, match=match):
        CONSTRUCTIONS[method](num, dim, generator())


@pytest.mark.parametrize("method", [*OPTIMISED, "random"])
def test_two_points_in_the_plane(method):
    points = CONSTRUCTIONS[method](2, 2, generator())
    assert torch.isfinite(points).all()
    if method != "random":
        assert float(points[0] @ points[1]) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize(
    ("num", "dim", "expected"),
    [
        (2, 2, "simplex"),
        (5, 4, "simplex"),
        (6, 4, "orthoplex"),
        (8, 4, "orthoplex"),
        (9, 4, "separated"),
        (MOST_OPTIMISED_PROTOTYPES, 8, "separated"),
        (MOST_OPTIMISED_PROTOTYPES + 1, 8, "random"),
        (10_000, 9_999, "simplex"),
    ],
)
def test_auto(num, dim, expected):
    assert choose_method(num, dim) == expected


# Closed forms


def test_frames_favour_no_direction():
    """Householder's QR alone would give every first entry the same sign."""
    frames = torch.stack([random_frame(3, 2, generator(seed)) for seed in range(400)])
    assert frames.mean(dim=0).abs().max() < 0.12  # four standard errors
    assert torch.allclose(frames.square().mean(dim=0), torch.tensor(1 / 3).double(), atol=0.06)


@given(st.integers(2, 40), st.integers(0, 30), st.integers(0, 10**6))
def test_simplex_is_the_equiangular_tight_frame(num, extra, seed):
    dim = max(2, num - 1 + extra)
    expected = (num * np.eye(num) - 1) / (num - 1)
    np.testing.assert_allclose(gram(CONSTRUCTIONS["simplex"](num, dim, generator(seed))), expected, atol=1e-6)


def test_large_simplex():
    points = cosines(CONSTRUCTIONS["simplex"](1000, 999, generator()))
    np.testing.assert_allclose(points, -1 / 999, atol=1e-6)


@given(st.integers(2, 30), st.data())
def test_orthoplex_is_orthogonal_simplices(dim, data):
    num = data.draw(st.integers(dim + 2, 2 * dim))
    matrix = gram(CONSTRUCTIONS["orthoplex"](num, dim, generator(data.draw(st.integers(0, 10**6)))))
    assert matrix[~np.eye(num, dtype=bool)].max() == pytest.approx(0, abs=1e-6)
    partners = (matrix < -1e-3).sum(axis=1)  # the others of the same block, d for a simplex in d dimensions
    assert partners.max() - partners.min() <= 1
    np.testing.assert_allclose(matrix[matrix < -1e-3], np.repeat(-1 / partners, partners), atol=1e-6)
    assert (1 / (partners + 1)).sum() == pytest.approx(num - dim)  # that many blocks fill all dimensions


def test_cross_polytope():
    matrix = gram(CONSTRUCTIONS["orthoplex"](100, 50, generator()))
    np.testing.assert_allclose(np.sort(matrix, axis=1)[:, [0, 1, -2, -1]], [[-1, 0, 0, 1]] * 100, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "num", "dim", "advice"),
    [("simplex", 6, 4, "dim >= 5"), ("orthoplex", 5, 4, "auto"), ("orthoplex", 9, 4, "auto")],
)
def test_closed_forms_refuse_other_sizes(method, num, dim, advice):
    with pytest.raises(BankError, match=f"{num}.*{advice}"):
        CONSTRUCTIONS[method](num, dim, generator())


# Optimised


@pytest.mark.parametrize(
    ("num", "dim", "largest"), [(100, 10, 0.345), (100, 16, 0.21), (100, 25, 0.114), (100, 32, 0.079), (200, 50, 0.078)]
)
@pytest.mark.parametrize("seed", in_front(range(3), 0))
def test_separated_reaches_what_is_known_to_be_possible(num, dim, largest, seed):
    assert cosines(separated_points(num, dim, generator(seed))).max() <= largest


@pytest.mark.parametrize("num", [30, 300])
def test_separated_in_the_plane_is_the_regular_polygon(num):
    """Smooth maxima of low sharpness bunch these points: annealing must go on until they are apart."""
    largest = cosines(separated_points(num, 2, generator())).max()
    assert math.acos(largest) == pytest.approx(2 * math.pi / num, rel=0.1)


@pytest.mark.slow
def test_separated_for_a_thousand_classes():
    assert cosines(separated_points(1000, 128, generator())).max() <= 0.080


@pytest.mark.parametrize("method", OPTIMISED)
def test_up_to_dim_plus_one_points_every_objective_gives_the_simplex(method):
    points = CONSTRUCTIONS[method](5, 4, generator())
    np.testing.assert_allclose(cosines(points), -0.25, atol=2e-3)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_energy_of_twelve_points_is_the_icosahedron(power):
    points = energy_points(12, 3, generator(), power=power)
    np.testing.assert_allclose(np.sort(cosines(points)), np.sort(cosines(icosahedron())), atol=1e-3)


@pytest.mark.parametrize(("num", "published"), [(5, 6.474691495), (7, 14.452977414), (12, 49.165253058)])
def test_energy_solves_thomsons_problem(num, published):
    points = energy_points(num, 3, generator(), power=1)
    assert (1 / distances(points)).sum() / 2 == pytest.approx(published, rel=1e-6)


def test_half_space_energy_spreads_lines():
    """The six diagonals of the icosahedron are the largest set of equiangular lines in space."""
    points = energy_points(6, 3, generator(), half_space=True)
    np.testing.assert_allclose(np.abs(cosines(points)), 5**-0.5, atol=1e-3)


def test_each_method_is_the_best_by_its_own_measure():
    banks = {method: CONSTRUCTIONS[method](40, 6, generator()) for method in (*OPTIMISED, "random")}
    measures = {
        "separated": lambda points: cosines(points).max(),
        "hpn": lambda points: cosines(points).max(axis=1).mean(),
        "uniform": lambda points: math.log(np.exp(-2 * distances(points) ** 2).mean()),
        "energy": lambda points: (distances(points) ** -2).mean(),
    }
    for method, measure in measures.items():
        values = {name: measure(points) for name, points in banks.items()}
        others = min(value for name, value in values.items() if name != method)
        # Each finds a local minimum, so that a near relative may come out ahead by a little.
        assert values[method] <= others + 0.01, (method, values)


# Objectives and optimiser


def reference_maximum(points: Tensor, beta: float) -> Tensor:
    matrix = points @ points.T
    off_diagonal = ~torch.eye(len(points), dtype=torch.bool)
    return matrix[off_diagonal].mul(beta).logsumexp(0) / beta


def reference_row_maxima(points: Tensor, beta: float) -> Tensor:
    matrix = points @ points.T
    off_diagonal = ~torch.eye(len(points), dtype=torch.bool)
    return matrix[off_diagonal].reshape(len(points), -1).mul(beta).logsumexp(1).mean() / beta


def reference_energy(points: Tensor, power: int, half_space: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(points)):
        for j in range(len(points)):
            for sign in (1, -1) if half_space else (1,):
                if i != j:
                    # As a function of the cosine, which is what the gradient off the sphere is of.
                    distance = (2 - 2 * sign * points[i] @ points[j]).sqrt()
                    total = total + (-distance.log() if power == 0 else distance**-power)
    return total / (len(points) * (len(points) - 1))


@pytest.mark.parametrize(
    ("objective", "reference", "arguments"),
    [(smooth_maximum, reference_maximum, (beta,)) for beta in (1.0, 64.0, 65536.0)]
    + [(smooth_row_maxima, reference_row_maxima, (beta,)) for beta in (1.0, 64.0, 65536.0)]
    + [(riesz_energy, reference_energy, (power, half)) for power in (0, 1, 2) for half in (False, True)],
)
def test_objectives_and_their_gradients(objective, reference, arguments):
    points = torch.randn(6, 4, generator=generator(), dtype=torch.float64)
    points = (points / points.norm(dim=1, keepdim=True)).requires_grad_()
    expected = reference(points, *arguments)
    expected.backward()
    value, gradient = objective(points.detach(), *arguments)
    assert value == pytest.approx(expected.item(), rel=1e-9)
    np.testing.assert_allclose(gradient, points.grad, rtol=1e-7, atol=1e-9)


def linear(target: Tensor) -> Objective:
    return lambda rows: (float((rows * target).sum()), target)


def test_minimise_finds_the_minimum_of_a_linear_function_and_counts_every_iteration():
    target = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    start = torch.randn(5, 3, generator=generator(1), dtype=torch.float64)
    counts = []
    points = minimise(linear(target), start, iterations=300, tolerance=1e-15, advance=counts.append)
    np.testing.assert_allclose(points, -target / target.norm(dim=1, keepdim=True), atol=1e-5)
    assert sum(counts) == 300


def test_minimise_stays_at_a_minimum():
    target = torch.eye(3, dtype=torch.float64)
    points = minimise(linear(target), -target, iterations=9, tolerance=0.0, advance=[].append)
    assert torch.equal(points, -target)


OBJECTIVES = {
    "separated": partial(smooth_maximum, beta=64.0),
    "hpn": partial(smooth_row_maxima, beta=64.0),
    "energy": partial(riesz_energy, power=1, half_space=True),
}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(objective, id=name, marks=[] if name == "hpn" else pytest.mark.slow)
        for name, objective in OBJECTIVES.items()
    ],
)
def test_the_number_of_threads_changes_no_bit(objective, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    start = CONSTRUCTIONS["random"](777, 67, generator()).double()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(minimise(objective, start, iterations=3, tolerance=0.0, advance=[].append))
    assert torch.equal(*results)


@pytest.mark.parametrize("num_terms", [1, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 3 * SUM_BLOCK])
def test_weighted_sums_are_numpys(num_terms):
    weights = torch.randn(5, num_terms, generator=generator(), dtype=torch.float64)
    points = torch.randn(num_terms, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        weighted_sums(weights, points), torch.from_numpy(weights.numpy() @ points.numpy()), rtol=1e-12, atol=1e-12
    )


def test_progress_does_without_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_off_a_terminal(capsys):
    pytest.importorskip("tqdm")
    with progress_bar(3) as bar_method:
        bar_method.__self__.delay = 0
        bar_method.__self__.mininterval = bar_method.__self__.miniters = 0
        bar_method(1)
    assert capsys.readouterr() == ("", "")


def test_progress_shows_on_a_terminal_after_a_while(capsys, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(3) as bar_method:
        bar = bar_method.__self__
        assert isinstance(bar, tqdm.tqdm)
        assert bar.delay == 2
        bar.delay = 0
        bar.mininterval = bar.miniters = 0
        bar_method(1)
    assert "Placing prototypes" in capsys.readouterr().err
