"""Geometry against NumPy, closed forms and a linear programme."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import eval_gegenbauer

from hyperproto import ArgumentError, PrototypeBank, ShapeError, sphere
from hyperproto.bounds import cosine_lower_bound, levenshtein_bound, rankin_bound
from hyperproto.readout import spanning_rows
from hyperproto.sphere import hyperspherical_energy, largest_cosines, normalise

CROSS_POLYTOPE = torch.cat([torch.eye(3), -torch.eye(3)])
CUBE = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
EDGE = 2 / 3**0.5  # of the cube whose vertices have length 1


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# normalise


@given(st.integers(1, 6), st.integers(1, 9), st.integers(-30, 30), st.integers(0, 10**6))
def test_rows_of_any_length_become_unit_rows(num, dim, exponent, seed):
    directions = np.random.default_rng(seed).standard_normal((num, dim))
    expected = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    got = normalise(torch.from_numpy(directions * 10.0**exponent).float())
    np.testing.assert_allclose(got.numpy(), expected, atol=3e-7)


def test_leading_dimensions_pass_through():
    x = gaussian(2, 3, 4)
    assert torch.equal(normalise(x)[1, 2], normalise(x[1, 2]))
    assert normalise(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_comes_out_in_float32(dtype):
    x = gaussian(3, 5).to(dtype)
    unit = normalise(x)
    assert unit.dtype == torch.float32
    np.testing.assert_allclose(unit.norm(dim=1), 1, atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 1e-45, 1e-39])
def test_rows_too_small_for_a_direction_are_zero_with_a_finite_gradient(length):
    x = torch.full((2, 3), length, requires_grad=True)
    unit = normalise(x)
    unit.sum().backward()
    assert unit.abs().max() < 1e-37
    assert torch.isfinite(x.grad).all()


def test_the_smallest_row_with_a_direction_has_a_finite_gradient():
    x = torch.tensor([[3.0, 1.0]]).mul(sphere.SMALLEST_LENGTH).requires_grad_()
    normalise(x)[0, 0].backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_and_others_stay(bad):
    x = torch.tensor([[1.0, bad, 0.0], [0.0, 3.0, 4.0]])
    unit = normalise(x)
    assert unit[0].isnan().all()
    assert torch.allclose(unit[1], torch.tensor([0.0, 0.6, 0.8]))


@given(st.integers(0, 10**6), st.integers(-15, 15))
def test_gradient_is_the_tangent_part_divided_by_the_length(seed, exponent):
    rng = np.random.default_rng(seed)
    x, upstream = rng.standard_normal((2, 4, 5))
    x = (x * 10.0**exponent).astype(np.float32).astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / length
    expected = (upstream - (upstream * unit).sum(axis=1, keepdims=True) * unit) / length
    leaf = torch.from_numpy(x).float().requires_grad_()
    normalise(leaf).backward(torch.from_numpy(upstream).float())
    np.testing.assert_allclose(leaf.grad.numpy() * length, expected * length, atol=3e-6)


def test_gradient_of_a_row_along_an_axis():
    x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    normalise(x).backward(torch.tensor([[5.0, 6.0]]))
    assert torch.equal(x.grad, torch.tensor([[0.0, 3.0]]))


def test_compiles_without_a_graph_break():
    x = torch.cat([gaussian(3, 4), torch.zeros(1, 4)])
    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), normalise(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_scripts():
    x = gaussian(3, 4).half()
    assert torch.equal(torch.jit.script(normalise)(x), normalise(x))


# hyperspherical_energy


@pytest.mark.parametrize(
    ("points", "power", "expected"),
    [
        # Each of 6 points: 4 others at sqrt(2), 1 at 2.
        (CROSS_POLYTOPE, 0, -18 * math.log(2)),
        (CROSS_POLYTOPE, 1, 6 * (4 / 2**0.5 + 1 / 2)),
        (CROSS_POLYTOPE, 2, 13.5),
        # Each of 8 points: 3 others at an edge, 3 at a face's diagonal, 1 at 2.
        (CUBE, 0, -8 * (3 * math.log(EDGE) + 3 * math.log(2**0.5 * EDGE) + math.log(2))),
        (CUBE, 1, 8 * (3 / EDGE + 3 / (2**0.5 * EDGE) + 1 / 2)),
        (CUBE, 2, 29.0),
        # Thomson's problem for 2 charges, both ways.
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1, 1.0),
    ],
)
def test_energy_of_known_configurations(points, power, expected):
    assert float(hyperspherical_energy(points, power=power)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("power", "expected"), [(0, -18 * math.log(2)), (2, 13.5)])
def test_half_space_energy_is_that_of_both_ends(power, expected):
    energy = hyperspherical_energy(torch.eye(3), power=power, half_space=True)
    assert float(energy) == pytest.approx(expected, rel=1e-6)


@given(st.sampled_from([0, 0.5, 1, 2, 3]), st.booleans(), st.integers(0, 10**6))
def test_energy_and_gradient_equal_the_oracle(power, half_space, seed):
    x = np.random.default_rng(seed).standard_normal((5, 4))

    def energy(flat: np.ndarray) -> float:
        points = flat.reshape(x.shape)
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
        points = np.concatenate([points, -points]) if half_space else points
        distances = [np.linalg.norm(p - q) for i, p in enumerate(points) for j, q in enumerate(points) if i != j]
        return sum(-math.log(d) if power == 0 else d**-power for d in distances)

    shifts = 1e-5 * np.eye(x.size)
    gradient = [(energy(x.ravel() + shift) - energy(x.ravel() - shift)) / 2e-5 for shift in shifts]
    leaf = torch.from_numpy(x).float().requires_grad_()
    got = hyperspherical_energy(leaf, power=power, half_space=half_space)
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(energy(x), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(leaf.grad.numpy().ravel(), gradient, rtol=2e-3, atol=2e-3 * max(map(abs, gradient)))


@pytest.mark.parametrize("power", [0, 1, 2])
def test_energy_of_coincident_and_zero_rows_is_finite_and_so_is_its_gradient(power):
    weight = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    energy = hyperspherical_energy(weight, power=power, half_space=True)
    energy.backward()
    assert torch.isfinite(energy)
    assert torch.isfinite(weight.grad).all()


def test_energy_under_autocast_stays_float32():
    weight = gaussian(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hyperspherical_energy(weight, power=1)
    assert torch.equal(inside, hyperspherical_energy(weight, power=1))


@pytest.mark.parametrize("power", [-1, float("nan"), float("inf")])
def test_energy_refuses_a_power_that_means_nothing(power):
    with pytest.raises(ArgumentError, match="power"):
        hyperspherical_energy(torch.eye(2), power=power)


def test_energy_refuses_what_is_not_a_matrix():
    with pytest.raises(ShapeError, match=r"\(P, D\)"):
        hyperspherical_energy(torch.ones(3), power=1)


# largest_cosines


@given(st.integers(2, 20), st.integers(2, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_largest_cosines_in_blocks_equal_the_whole_matrix(num, dim, block_rows, seed):
    prototypes = normalise(gaussian(num, dim, seed=seed))
    cosines = prototypes.double().numpy() @ prototypes.double().numpy().T
    np.fill_diagonal(cosines, -2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sphere, "BLOCK_ROWS", block_rows)
        got = largest_cosines(prototypes)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), cosines.max(axis=1), atol=1e-7)


# bounds


@pytest.mark.parametrize(
    ("num", "dim", "expected"), [(2, 7, -1.0), (5, 4, -0.25), (6, 4, 0.0), (8, 4, 0.0), (100, 50, 0.0)]
)
def test_rankin(num, dim, expected):
    assert rankin_bound(num, dim) == expected
    assert cosine_lower_bound(num, dim) == (expected, "rankin")


@pytest.mark.parametrize(
    ("num", "dim", "cosine"),
    [
        (12, 3, 1 / 5**0.5),  # icosahedron
        (240, 8, 1 / 2),  # kissing configurations of E8
        (196560, 24, 1 / 2),  # and of the Leech lattice
        (4600, 23, 1 / 3),
        (891, 22, 1 / 4),
        (275, 22, 1 / 6),  # McLaughlin graph
        (27, 6, 1 / 4),  # Schläfli graph
        (16, 5, 1 / 5),
    ],
)
def test_levenshtein_is_tight_at_sharp_configurations(num, dim, cosine):
    assert levenshtein_bound(num, dim) == pytest.approx(cosine, abs=1e-9)
    assert cosine_lower_bound(num, dim)[1] == "levenshtein"


@given(st.integers(5, 10**5))
def test_levenshtein_in_the_plane_is_the_regular_polygon(num):
    assert levenshtein_bound(num, 2) == pytest.approx(math.cos(2 * math.pi / num), abs=1e-12)


@pytest.mark.parametrize(
    ("num", "dim", "published"),
    [(100, 10, 0.278), (100, 16, 0.153), (100, 25, 0.069), (100, 32, 0.034), (200, 50, 0.037)],
)
def test_levenshtein_rounded(num, dim, published):
    assert levenshtein_bound(num, dim) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(
    ("num", "dim", "degree"),
    [(100, 10, 4), (100, 16, 3), (200, 50, 3), (20, 3, 7), (300, 8, 7), (50, 4, 7), (60, 5, 6), (40, 5, 5)],
)
def test_levenshtein_solves_the_linear_programme_of_its_degree(num, dim, degree):
    """Delsarte: f = 1 + sum f_k Q_k with f_k >= 0 and f(t) <= 0 on [-1, s] proves P <= f(1)."""
    grid = np.linspace(-1, levenshtein_bound(num, dim), 4001)
    order = 0.5 * (dim - 2)
    polynomials = np.stack(
        [eval_gegenbauer(k, order, grid) / eval_gegenbauer(k, order, 1.0) for k in range(1, degree + 1)], axis=1
    )
    solution = linprog(np.ones(degree), A_ub=polynomials, b_ub=-np.ones(len(grid)), bounds=(0, None))
    assert 1 + solution.fun == pytest.approx(num, rel=1e-5)


@given(st.integers(2, 600), st.integers(1, 20_000))
def test_bound_grows_with_the_points_and_stays_a_cosine(dim, extra):
    bound, more = (cosine_lower_bound(2 * dim + num, dim)[0] for num in (extra, extra + 1))
    assert -1e-12 <= bound <= more + 1e-12
    assert more < 1


@pytest.mark.parametrize(("num", "dim"), [(1_000_000, 512), (21_841, 512)])
def test_bound_at_very_many_points(num, dim):
    # Random banks of this size are near 2 sqrt(log(P) / D) = 0.3; orthogonality ends at 2 D points.
    assert 0.02 < levenshtein_bound(num, dim) < 0.1


@pytest.mark.parametrize(
    ("bound", "num", "dim"),
    [
        (rankin_bound, 9, 4),
        (rankin_bound, 1, 4),
        (rankin_bound, 2, 1),
        (levenshtein_bound, 8, 4),
        (levenshtein_bound, 8, 1),
        (cosine_lower_bound, 1, 3),
        (cosine_lower_bound, 5, 1),
        (cosine_lower_bound, 2, 1),
    ],
)
def test_bounds_refuse_numbers_outside_their_range(bound, num, dim):
    with pytest.raises(ArgumentError, match="dim >= 2"):
        bound(num, dim)


# Rows that span what all rows span


@given(
    num_rows=st.integers(2, 40),
    dim=st.integers(2, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_spanning_rows_span_what_all_rows_span(num_rows, dim, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(min(rank, dim), dim, generator=generator)
    rows = normalise(torch.randn(num_rows, len(basis), generator=generator) @ basis)
    chosen = spanning_rows(rows)
    assert len(set(chosen.tolist())) == len(chosen) == min(num_rows, dim)
    everything, part = rows.double().numpy(), rows[chosen].double().numpy()
    projector = np.linalg.pinv(part, rcond=1e-5) @ part
    np.testing.assert_allclose(everything @ projector, everything, atol=1e-2)


def test_spanning_rows_of_many_looks_at_all_where_a_sample_does_not_span():
    rows = torch.zeros(500, 3)
    rows[:, 0] = 1.0
    rows[137], rows[401] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert {137, 401} < set(spanning_rows(rows).tolist())


@pytest.mark.parametrize("method", ["random", "code"])
def test_spanning_rows_of_many_prototypes_are_far_from_dependent(method):
    rows = PrototypeBank(5000, 64, method=method).prototypes
    assert np.linalg.cond(rows[spanning_rows(rows)].double().numpy()) < 100
