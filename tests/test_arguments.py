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
    DynamicAssigner,
    HyperprotoWarning,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    convert_model,
    functional,
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
