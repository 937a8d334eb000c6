"""The pure functions: precision, class lengths and the edges of the assignment problem."""

import numpy as np
import pytest
import torch

from hyperproto import ArgumentError, LabelError, functional
from hyperproto.functional import batch_squared_lengths, solve_assignment, squared_class_lengths

LABELS = torch.tensor([0, 2, 2, 1])


def soft_targets(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).softmax(dim=1).to(dtype)


def cosines_in(dtype: torch.dtype) -> torch.Tensor:
    return (2 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 1).to(dtype)


# Precision

#: Losses (B,) of cosines (B, C) and soft targets (B, C), from the formulas.
ORACLES = {
    functional.balanced_loss: lambda cosines, target: (target * (1 - cosines) ** 2).sum(axis=1),
    functional.long_tail_loss: lambda cosines, target: (
        0.5 * target * np.array([2 / 3, 2.0, 1.0]) * (1 - cosines) ** 2
    ).sum(axis=1),
    functional.prototype_cross_entropy: lambda cosines, target: (
        -(target * (16 * cosines - np.log(np.exp(16 * cosines).sum(axis=1, keepdims=True)))).sum(axis=1)
    ),
}


@pytest.mark.parametrize("loss", ORACLES)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_pure_loss_is_worked_out_in_float32(loss, soft, dtype):
    cosines, target = cosines_in(dtype), soft_targets(dtype) if soft else LABELS
    options = {
        functional.long_tail_loss: {"class_counts": torch.tensor([30, 10, 20])},
        functional.prototype_cross_entropy: {"scale": 16.0},
    }.get(loss, {})
    losses = loss(cosines, target, reduction="none", **options)
    weights = target.double().numpy() if soft else np.eye(3)[LABELS]
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), ORACLES[loss](cosines.double().numpy(), weights), rtol=2e-5, atol=1e-6)


# Class lengths


@pytest.mark.parametrize("counts", [[0.5, 2.0], [2**24 + 1, 3], [7 * 2**24 + 3, 2**24 + 1]])
def test_class_lengths_are_exact_to_float32_for_counts_of_any_size(counts):
    exact = np.sum(counts, dtype=np.float64) / (2 * np.array(counts, dtype=np.float64))
    lengths = squared_class_lengths(torch.tensor(counts), 2)
    np.testing.assert_array_equal(lengths.numpy(), exact.astype(np.float32))


# The assignment problem


@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_a_label_of_weight_zero_may_have_any_prototype(method):
    means = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    solution = solve_assignment(means, torch.eye(2), weights=torch.tensor([0.0, 1.0]), method=method)
    assert solution.assignment.tolist() == [1, 0]


@pytest.mark.parametrize("method", ["dense", "sparse"])
@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -1.0])
def test_weights_that_say_nothing_are_refused(method, weight):
    with pytest.raises(ArgumentError, match="finite and not negative"):
        solve_assignment(torch.eye(2), torch.eye(2), weights=torch.tensor([weight, 1.0]), method=method)


@pytest.mark.parametrize("method", ["dense", "sparse"])
@pytest.mark.parametrize("seed", range(5))
def test_labels_with_one_mean_stay_where_they_are(method, seed):
    """Any permutation of them has the same total, up to the order of summation."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(30, 8, generator=generator)
    means = torch.randn(1, 8, generator=generator).expand(30, -1)
    current = torch.randperm(30, generator=generator)
    assert torch.equal(solve_assignment(means, prototypes, current=current, method=method).assignment, current)


@pytest.mark.parametrize(
    ("counts", "num_classes", "words"),
    [([], 0, "^expected num_classes "), ([1, 2], 3, "^class_counts must be 3 "), ([1, 0], 2, r"labels \[1\]")],
)
def test_lengths_of_classes_name_what_is_wrong(counts, num_classes, words):
    with pytest.raises(ArgumentError, match=words):
        squared_class_lengths(counts, num_classes)


@pytest.mark.parametrize(
    "target", ["cat", torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0])]
)
def test_lengths_in_a_batch_are_those_of_labels_or_of_soft_targets(target):
    with pytest.raises(LabelError):
        batch_squared_lengths(target)
