"""Arguments as people write them: taken where the meaning is plain, else refused with a reason of the library's own."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HyperprotoError,
    HyperprotoWarning,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    convert_model,
    describe,
    functional,
    restore_model,
    to_linear,
)
from hyperproto.arguments import positive_number, whole_number


def make_head(**options) -> HypersphericalHead:
    return HypersphericalHead(8, 4, **{"dim": 3, **options})


WAYS_TO_WRITE = [int, float, np.int64, np.uint8, np.float32, torch.tensor, np.array]


@given(number=st.integers(0, 200), write=st.sampled_from(WAYS_TO_WRITE))
def test_whole_numbers_of_any_type_become_ints(number, write):
    found = whole_number(write(number), "number")
    assert type(found) is int
    assert found == number


@given(number=st.floats(allow_nan=True, allow_infinity=True))
def test_other_floats_are_refused(number):
    if number.is_integer() and 0 <= number < 2**63:
        assert whole_number(number, "number") == number
    else:
        with pytest.raises(ArgumentError, match="expected number to be a whole number"):
            whole_number(number, "number")


@given(number=st.floats(allow_nan=True, allow_infinity=True))
def test_positive_numbers_are_those_that_float32_holds(number):
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(number)
    if number > 0 and np.isfinite(held) and held >= np.finfo(np.float32).tiny and number <= np.finfo(np.float32).max:
        assert number < np.finfo(np.float32).tiny or positive_number(number, "scale") == number
    else:
        with pytest.raises(ArgumentError, match="finite and positive"):
            positive_number(number, "scale")


@pytest.mark.parametrize("write", WAYS_TO_WRITE)
def test_sizes_and_seeds_of_any_type_build_one_head(write):
    head, plain = HypersphericalHead(write(8), write(4), dim=write(3), seed=write(7)), make_head(seed=7)
    assert json.loads(json.dumps([head.in_features, head.num_classes, head.dim])) == [8, 4, 3]
    for name, value in plain.state_dict().items():
        assert torch.equal(head.state_dict()[name], value)
    converted = convert_model(nn.Sequential(nn.Linear(8, 4)), classifier="0", dim=write(3), num_classes=write(4))
    assert converted[0].dim == 3
    assert PrototypeBank(write(6), write(3)).prototypes.shape == (6, 3)


@pytest.mark.parametrize("write", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.clone])
def test_matrices_of_any_type(write):
    rows = torch.eye(4)
    assert torch.equal(PrototypeBank.from_tensor(write(rows)).prototypes, rows)
    vectors = torch.randn(5, 8)
    expected = PrototypeBank.from_class_vectors(vectors, 3).prototypes
    assert torch.equal(PrototypeBank.from_class_vectors(write(vectors), 3).prototypes, expected)
    means = torch.randn(4, 4)
    expected = functional.solve_assignment(means, rows, current=torch.tensor([3, 2, 1, 0])).assignment
    found = functional.solve_assignment(write(means), write(rows), current=[3, 2, 1, 0]).assignment
    assert torch.equal(found, expected)
    assert functional.hyperspherical_energy(write(rows), power=2) == functional.hyperspherical_energy(rows, power=2)
    labels = torch.arange(4)
    assert functional.balanced_loss(write(rows), write(labels)) == 0.0


@pytest.mark.parametrize(
    "write", [dict, Counter, lambda counts: [counts[c] for c in range(4)], lambda counts: np.array([8, 4, 2, 1])]
)
def test_class_counts_of_any_type(write):
    loss = LongTailLoss(make_head(), class_counts=write({2: 2, 0: 8, 1: 4, 3: 1}))
    torch.testing.assert_close(loss.squared_lengths, 15 / 4 / torch.tensor([8.0, 4.0, 2.0, 1.0]))


def test_class_counts_of_next_to_no_sample_are_told():
    with pytest.warns(HyperprotoWarning, match="less than half a sample"):
        LongTailLoss(make_head(), class_counts=[1000, 1000, 1000, 1e-6])
    LongTailLoss(make_head(), class_counts=[0.7, 0.2, 0.09, 0.01])  # shares of all samples: no warning


@pytest.mark.parametrize("write", [list, tuple, set, np.array, torch.tensor])
def test_labels_to_forget_of_any_type(write):
    assigner = DynamicAssigner(make_head())
    assigner.update(assigner.head(torch.randn(8, 8)), torch.arange(8) % 4)
    assigner.forget(write([1, 2]) if write is not set else {1, 2})
    assert assigner.class_means.any(dim=1).tolist() == [True, False, False, True]
    assigner.head.assign_([1, 0, 2, 3])
    assert assigner.head.assignment.tolist() == [1, 0, 2, 3]


CALLS = {
    "in_features": lambda value: HypersphericalHead(value, 4, dim=3),
    "num_classes": lambda value: HypersphericalHead(8, value, dim=3),
    "dim": lambda value: make_head(dim=value if value is not None else 2.5),
    "bank": lambda value: make_head(bank=value),
    "projection": lambda value: make_head(projection=value),
    "training_output": lambda value: make_head(training_output=value),
    "seed": lambda value: make_head(seed=value),
    "logit_scale": lambda value: make_head(logit_scale=value if value is not None else -1.0),
    "num_prototypes": lambda value: PrototypeBank(value, 3),
    "bank's dim": lambda value: PrototypeBank(4, value),
    "bank's method": lambda value: PrototypeBank(4, 3, method=value),
    "rows": PrototypeBank.from_tensor,
    "class vectors": lambda value: PrototypeBank.from_class_vectors(value, 3),
    "assigner's source": DynamicAssigner,
    "loss's source": BalancedLoss,
    "momentum": lambda value: DynamicAssigner(make_head(), momentum=value if value is not None else "0.9"),
    "solver": lambda value: DynamicAssigner(make_head(), solver=value),
    "reduction": lambda value: BalancedLoss(make_head(), reduction=value),
    "ignore_index": lambda value: BalancedLoss(make_head(), ignore_index=value),
    "class_counts": lambda value: LongTailLoss(make_head(), class_counts=value if value is not None else "4"),
    "scale": lambda value: PrototypeCrossEntropyLoss(make_head(), scale=value),
    "label_smoothing": lambda value: PrototypeCrossEntropyLoss(make_head(), label_smoothing=value),
    "weight": lambda value: PrototypeCrossEntropyLoss(make_head(), weight=value if value is not None else "4"),
    "scale of the pure form": lambda value: functional.prototype_cross_entropy(
        torch.zeros(4, 4), torch.arange(4), scale=value
    ),
    "output": lambda value: BalancedLoss(make_head())(value, torch.arange(4)),
    "target": lambda value: BalancedLoss(make_head())(torch.zeros(4, 3), value),
    "fed output": lambda value: DynamicAssigner(make_head()).update(value, torch.arange(4)),
    "fed target": lambda value: DynamicAssigner(make_head()).update(torch.zeros(4, 3), value),
    "labels to forget": lambda value: DynamicAssigner(make_head()).forget(value),
    "assignment": lambda value: make_head().assign_(value),
    "embeddings": lambda value: make_head().topk(value, 1),
    "k": lambda value: make_head().topk(torch.zeros(4, 3), value),
    "cosines": lambda value: functional.balanced_loss(value, torch.arange(4)),
    "class means": lambda value: functional.solve_assignment(value, torch.eye(3)),
    "prototypes": lambda value: functional.solve_assignment(torch.eye(3), value),
    "current": lambda value: functional.solve_assignment(
        torch.eye(3), torch.eye(3), current=value if value is not None else "0"
    ),
    "weights": lambda value: functional.solve_assignment(
        torch.eye(3), torch.eye(3), weights=value if value is not None else "0"
    ),
    "method": lambda value: functional.solve_assignment(torch.eye(3), torch.eye(3), method=value),
    "energy's weight": lambda value: functional.hyperspherical_energy(value, power=2),
    "power": lambda value: functional.hyperspherical_energy(torch.eye(3), power=value),
    "describe": describe,
    "restore_model": restore_model,
    "to_linear": to_linear,
    "convert_model": convert_model,
    "converted seed": lambda value: convert_model(nn.Sequential(nn.Linear(8, 4)), classifier="0", seed=value),
}

WRONG = {
    "None": None,
    "string": "4",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1.5,
    "complex": 1j,
    "object": object(),
    "empty list": [],
    "ragged": [[0], [0, 1]],
    "dict": {"a": 1},
    "NaN tensor": torch.full((4,), float("nan")),
    "bools": torch.ones(4, 3, dtype=torch.bool),
    "complex tensor": torch.zeros(4, 3, dtype=torch.complex64),
    "three dimensions": torch.zeros(4, 3, 2),
    "meta": torch.zeros((), device="meta"),
    "objects": np.array([None, "a"], dtype=object),
}


#: What can be meant after all.
TAKEN = {("labels to forget", "empty list"), ("scale", "None"), ("scale of the pure form", "None")}


def outcome(call, value) -> str:
    try:
        call(value)
    except HyperprotoError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("argument", CALLS)
def test_wrong_kinds_of_value_end_in_an_error_of_the_library(argument, wrong):
    told = outcome(CALLS[argument], WRONG[wrong])
    assert (told == "taken") == ((argument, wrong) in TAKEN)
    assert any(word in told for word in ("expected", "must", "needs", "taken")), told
