"""The bank: its arguments, its report and its life as a module."""

import copy
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import BankError, PrototypeBank, ShapeError
from hyperproto.constructions import CONSTRUCTIONS
from hyperproto.constructions.class_vectors import SLACK, unit_metric

AXES_AND_THEIR_OPPOSITES = torch.cat(
    [torch.diag(torch.tensor([3.0, 2.0, 1.0])), -torch.diag(torch.tensor([3.0, 2.0, 1.0]))]
)


def given_rows(num: int = 5, dim: int = 3) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(0))


# Arguments


@pytest.mark.parametrize(
    ("num", "dim", "method"), [(4, 5, "simplex"), (8, 4, "orthoplex"), (12, 3, "separated"), (5000, 4, "random")]
)
def test_auto_says_what_it_chose(num, dim, method):
    bank = PrototypeBank(num, dim)
    assert (bank.method, bank.num_prototypes, bank.dim) == (method, num, dim)
    assert torch.equal(bank.prototypes, PrototypeBank(num, dim, method=method).prototypes)


@pytest.mark.parametrize("method", CONSTRUCTIONS)
def test_seed_decides(method):
    size = {"simplex": (6, 5), "code": (50, 32)}.get(method, (8, 5))
    one, same, other = (PrototypeBank(*size, method=method, seed=seed).prototypes for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)


def test_energy_options_reach_the_construction():
    lines = PrototypeBank(3, 3, method="energy", power=0, half_space=True).prototypes
    assert torch.allclose(lines @ lines.T, torch.eye(3), atol=1e-3)
    spread = PrototypeBank(8, 3, method="energy").prototypes
    assert not torch.allclose(PrototypeBank(8, 3, method="energy", power=1).prototypes, spread, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "etf"}, "'simplex'.*got 'etf'"),
        ({"method": "given"}, "from_tensor"),
        ({"power": 1}, 'options of method="energy"'),
        ({"method": "uniform", "half_space": True}, 'options of method="energy"'),
        ({"method": "energy", "power": 3}, r"in \[0, 2\], got power=3"),
        ({"num_prototypes": 1}, "at least 2 prototypes, got 1"),
        ({"dim": 1}, "dim=1.*two directions"),
        ({"num_prototypes": 20, "method": "simplex"}, 'method="auto"'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(BankError, match=message) as caught:
        PrototypeBank(**({"num_prototypes": 6, "dim": 3} | arguments))
    assert isinstance(caught.value, ValueError)


# from_tensor


@given(st.integers(2, 9), st.integers(2, 6), st.integers(-25, 25), st.integers(0, 10**6))
def test_from_tensor_normalises(num, dim, exponent, seed):
    rows = np.random.default_rng(seed).standard_normal((num, dim))
    bank = PrototypeBank.from_tensor(torch.from_numpy(rows * 10.0**exponent))
    np.testing.assert_allclose(bank.prototypes, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=3e-7)
    assert (bank.method, bank.num_prototypes, bank.dim) == ("given", num, dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_tensor_neither_aliases_nor_changes_nor_trains(dtype):
    rows = nn.Parameter(torch.eye(3, dtype=dtype))
    bank = PrototypeBank.from_tensor(rows)
    bank.prototypes.zero_()
    assert torch.equal(rows, torch.eye(3, dtype=dtype))
    assert bank.prototypes.dtype == torch.float32
    assert not bank.prototypes.requires_grad
    assert list(bank.parameters()) == []


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_from_tensor_names_the_rows_without_a_direction(bad):
    rows = given_rows()
    rows[[1, 3]] = bad
    with pytest.raises(BankError, match=r"2 rows.*\[1, 3\]"):
        PrototypeBank.from_tensor(rows)


@pytest.mark.parametrize(
    "rows",
    [torch.ones(3), torch.ones(2, 3, 4), torch.ones(1, 3), torch.ones(3, 1), torch.ones(0, 3), torch.ones(3, 3).long()],
)
def test_from_tensor_refuses_other_shapes_and_dtypes(rows):
    with pytest.raises(ShapeError, match=r"\(P, D\)"):
        PrototypeBank.from_tensor(rows)


# report


def test_report_of_a_bank_by_hand():
    report = PrototypeBank.from_tensor(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).report()
    assert dataclasses.asdict(report) == pytest.approx(
        {
            "max_cosine": 0.0,
            "mean_max_cosine": 0.0,
            "min_angle_deg": 90.0,
            "lower_bound": -0.5,
            "bound_name": "rankin",
            "gap": 0.5,
            "mean_norm": 1 / 3,
            "source": "all pairs",
        },
        abs=1e-6,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.gap = 0.0


def test_report_tells_rows_apart():
    angles = torch.tensor([0.0, 0.1, 2.0])
    report = PrototypeBank.from_tensor(torch.stack([angles.cos(), angles.sin()], dim=1)).report()
    assert report.max_cosine == pytest.approx(math.cos(0.1), abs=1e-6)
    assert report.mean_max_cosine == pytest.approx((2 * math.cos(0.1) + math.cos(1.9)) / 3, abs=1e-6)
    assert report.min_angle_deg == pytest.approx(math.degrees(0.1), rel=1e-4)


@pytest.mark.parametrize(("num", "dim"), [(5, 4), (7, 4), (8, 4), (30, 4), (100, 10)])
def test_no_bank_beats_the_bound(num, dim):
    report = PrototypeBank(num, dim).report()
    assert report.gap >= -1e-6
    assert report.gap == pytest.approx(report.max_cosine - report.lower_bound)
    assert f"{report.max_cosine:.4f}" in str(report)
    assert report.bound_name in str(report)


@pytest.mark.filterwarnings("ignore:2 prototypes of 3 equal others:hyperproto.HyperprotoWarning")
def test_coincident_prototypes_report_an_angle_of_zero():
    assert PrototypeBank.from_tensor(torch.ones(3, 3)).report().min_angle_deg == pytest.approx(0, abs=0.05)


@pytest.mark.filterwarnings("ignore:1 prototypes of 2 equal others:hyperproto.HyperprotoWarning")
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(2, 40))
def test_rounding_takes_no_cosine_out_of_range(seed, dim):
    row = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    for other, angle in ((row, 0.0), (-row, 180.0)):
        report = PrototypeBank.from_tensor(torch.stack([row, other])).report()
        assert -1.0 <= report.max_cosine <= 1.0
        assert report.min_angle_deg == pytest.approx(angle, abs=0.1)


# From class vectors


def cosines_of(rows: torch.Tensor) -> np.ndarray:
    """(P, P - 1) cosines of each row with the others, in NumPy."""
    rows = rows.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows @ rows.T)[~np.eye(len(rows), dtype=bool)].reshape(len(rows), -1)


def class_vectors(num_groups: int = 5, size: int = 4, width: int = 30) -> torch.Tensor:
    """Groups of similar classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_groups, 1, width, generator=generator)
    return (centres + 0.5 * torch.randn(num_groups, size, width, generator=generator)).flatten(0, 1)


@pytest.mark.parametrize("dim", [3, 8])
def test_similar_classes_lie_nearer(dim):
    vectors = class_vectors()
    wanted = cosines_of(vectors - vectors.mean(dim=0)).flatten()
    got = cosines_of(PrototypeBank.from_class_vectors(vectors, dim).prototypes).flatten()
    assert np.corrcoef(wanted, got)[0, 1] > 0.6


@given(num_classes=st.integers(2, 30), more=st.integers(0, 5), width=st.integers(0, 40), seed=st.integers(0, 99))
def test_with_as_many_dimensions_as_a_simplex_needs_it_is_one(num_classes, more, width, seed):
    vectors = torch.randn(num_classes, num_classes + width, generator=torch.Generator().manual_seed(seed))
    bank = PrototypeBank.from_class_vectors(vectors, max(2, num_classes - 1 + more))
    np.testing.assert_allclose(cosines_of(bank.prototypes), -1.0 / (num_classes - 1), atol=1e-5)


@given(num_classes=st.integers(8, 40), dim=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_metric_is_that_of_the_largest_objective(num_classes, dim, seed):
    generator = np.random.default_rng(seed)
    frame = np.linalg.qr(generator.normal(size=(num_classes, dim)))[0]
    metric = unit_metric(frame)

    def objective(matrix: np.ndarray) -> float:
        squared_lengths = np.einsum("cd,de,ce->c", frame, matrix, frame)
        return float(np.linalg.slogdet(matrix)[1] - np.square(squared_lengths - 1.0).sum() / (2.0 * SLACK))

    assert np.linalg.eigvalsh(metric)[0] > 0.0
    for size in (1e-3, 1e-2, 0.1):
        change = generator.normal(size=(dim, dim))
        moved = metric + size * np.linalg.eigvalsh(metric)[0] * (change + change.T) / np.abs(change).sum()
        assert objective(moved) < objective(metric) + 1e-7


@given(scale=st.floats(0.1, 10.0), offset=st.floats(-10.0, 10.0))
def test_length_and_place_of_class_vectors_do_not_count(scale, offset):
    vectors = class_vectors().double()
    bank = PrototypeBank.from_class_vectors(vectors, 6)
    moved = PrototypeBank.from_class_vectors(scale * vectors + offset, 6)
    torch.testing.assert_close(cosines_tensor(bank), cosines_tensor(moved), atol=1e-4, rtol=0)


def cosines_tensor(bank: PrototypeBank) -> torch.Tensor:
    return bank.prototypes @ bank.prototypes.T


def test_dimensions_beyond_those_of_the_vectors_stay_empty():
    vectors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PrototypeBank.from_class_vectors(vectors, 7).prototypes[:, 3:], torch.zeros(20, 4))


def test_prototypes_point_along_vectors_of_their_dimension():
    vectors = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    bank = PrototypeBank.from_class_vectors(vectors, 5)
    cosines = torch.nn.functional.cosine_similarity(vectors - vectors.mean(dim=0), bank.prototypes)
    assert cosines.min() > 0.8


@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        (torch.zeros(3), {}, ShapeError, r"\(C, E\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, ShapeError, "floating"),
        (torch.zeros(1, 4), {}, ShapeError, "C >= 2"),
        (torch.ones(3, 4), {}, BankError, "differ from their mean"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), {}, BankError, r"the first at \[2\]"),
        (torch.full((3, 4), float("nan")), {}, BankError, "finite"),
        (AXES_AND_THEIR_OPPOSITES, {"dim": 2}, BankError, r"no part .* first at \[2, 5\]"),
        (class_vectors()[[0, 0, *range(1, 20)]], {"dim": 4}, BankError, r"2 classes .* coincide .* first at \[0, 1\]"),
        (torch.randn(3, 4), {"dim": 1}, BankError, "dim >= 2"),
    ],
)
def test_class_vectors_that_say_nothing_are_refused(vectors, options, error, message):
    with pytest.raises(error, match=message):
        PrototypeBank.from_class_vectors(vectors, **({"dim": 3} | options))


# Life as a module


def test_state_dict_round_trip():
    source, target = PrototypeBank(6, 3, seed=1), PrototypeBank(6, 3, seed=2)
    target.load_state_dict(source.state_dict())
    assert list(source.state_dict()) == ["prototypes"]
    assert torch.equal(target.prototypes, source.prototypes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
@pytest.mark.parametrize("bank", [PrototypeBank(6, 3), PrototypeBank.from_tensor(given_rows())])
def test_copies(bank, copied):
    twin = copied(bank)
    assert torch.equal(twin.prototypes, bank.prototypes)
    assert twin.prototypes.data_ptr() != bank.prototypes.data_ptr()
    assert repr(twin) == repr(bank)


def test_saves_whole():
    file = io.BytesIO()
    torch.save(PrototypeBank(6, 3), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).method == "orthoplex"


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_dtype_casts_leave_the_prototypes_alone(cast):
    model = nn.Sequential(nn.Linear(2, 3), PrototypeBank(6, 3))
    before = model[1].prototypes.clone()
    cast(model)
    assert model[1].prototypes.dtype == torch.float32
    assert torch.equal(model[1].prototypes, before)


def test_device_moves_happen_with_and_without_a_dtype():
    assert PrototypeBank(6, 3).to("meta").prototypes.is_meta
    moved = PrototypeBank(6, 3).to("meta", torch.float16).prototypes
    assert moved.is_meta
    assert moved.dtype == torch.float32


def test_device_context_and_default_dtype_change_nothing():
    expected = PrototypeBank(12, 3)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = PrototypeBank(12, 3)
            rows = PrototypeBank.from_tensor(expected.prototypes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.prototypes, expected.prototypes)
    assert torch.allclose(rows.prototypes, expected.prototypes)
    assert str(got.report()) == str(expected.report())


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    PrototypeBank(12, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_says_what_it_is():
    assert repr(PrototypeBank(6, 3)) == "PrototypeBank(num_prototypes=6, dim=3, method='orthoplex')"
