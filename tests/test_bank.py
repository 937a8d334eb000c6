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

from hyperproto import ArgumentError, BankError, PrototypeBank, ShapeError
from hyperproto.constructions import CONSTRUCTIONS


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    # Matrices this small gain nothing from a second thread, and lose much where another process wants the core.
    torch.set_num_threads(1)


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
        ({"method": "energy", "power": 3}, "0, 1 or 2, got 3"),
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


def test_coincident_prototypes_report_an_angle_of_zero():
    assert PrototypeBank.from_tensor(torch.ones(3, 3)).report().min_angle_deg == pytest.approx(0, abs=0.05)


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


@pytest.mark.parametrize("dim", [3, 8, 40])
def test_similar_classes_may_lie_nearer(dim):
    vectors = class_vectors()
    wanted = cosines_of(vectors - vectors.mean(dim=0))
    agreements = [
        np.corrcoef(
            wanted.flatten(),
            cosines_of(PrototypeBank.from_class_vectors(vectors, dim, strength=strength).prototypes).flatten(),
        )[0, 1]
        for strength in (0.0, 0.5, 1.0)
    ]
    assert abs(agreements[0]) < 0.3
    assert agreements[1] > agreements[0] + 0.4
    assert agreements[2] > 0.9 if dim >= 8 else agreements[2] > agreements[0] + 0.4


def test_without_an_allowance_class_vectors_play_no_part():
    bank = PrototypeBank.from_class_vectors(class_vectors(), 4, strength=0.0)
    assert torch.equal(bank.prototypes, PrototypeBank(20, 4, method="separated").prototypes)


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_no_pair_exceeds_what_it_is_allowed_by_more_than_a_random_bank(strength):
    vectors = class_vectors()
    allowed = strength * cosines_of(vectors - vectors.mean(dim=0))
    for seed in range(3):
        bank = PrototypeBank.from_class_vectors(vectors, 8, strength=strength, seed=seed)
        separated = PrototypeBank(20, 8, method="separated", seed=seed)
        excess, other = ((cosines_of(each.prototypes) - allowed).max() for each in (bank, separated))
        assert excess < other - 0.1


def test_length_and_place_of_class_vectors_do_not_count():
    vectors = class_vectors().double()
    bank = PrototypeBank.from_class_vectors(vectors, 6)
    moved = PrototypeBank.from_class_vectors(3.0 * vectors + 7.0, 6)
    torch.testing.assert_close(cosines_tensor(bank), cosines_tensor(moved), atol=1e-3, rtol=0)


def cosines_tensor(bank: PrototypeBank) -> torch.Tensor:
    return bank.prototypes @ bank.prototypes.T


def test_equal_class_vectors_give_prototypes_apart():
    vectors = class_vectors()
    vectors[1] = vectors[0]
    report = PrototypeBank.from_class_vectors(vectors, 8).report()
    assert report.max_cosine < 0.9


@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        (torch.zeros(3), {}, ShapeError, r"\(C, E\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, ShapeError, "floating"),
        (torch.zeros(1, 4), {}, ShapeError, "C >= 2"),
        (torch.ones(3, 4), {}, BankError, "differ from their mean"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), {}, BankError, r"the first at \[2\]"),
        (torch.full((3, 4), float("nan")), {}, BankError, "finite"),
        (torch.randn(3, 4), {"strength": 1.5}, ArgumentError, r"\[0, 1\]"),
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
