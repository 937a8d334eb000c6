"""What the labels of a batch say: checks, and counts whose cost does not grow with the number of classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperproto.errors import LabelError, ShapeError

#: Samples, or summed weights, from which on a label counts as seen.
SMALLEST_EVIDENCE = 0.5


def check_target(target: Tensor, num_samples: int, num_classes: int) -> None:
    """Raise unless `target` holds labels (B,) or soft targets (B, C) for this many samples and classes.

    Shapes and dtypes are always checked. The range of the values is checked on the CPU only: on an accelerator
    the check would wait for the device, and indexing out of range fails loudly there by itself.

    Raises:
        LabelError: not int64 labels of shape (B,) in [0, C), nor floating soft targets of shape (B, C), finite and not
            negative.
        ShapeError: another number of samples than the output has.
    """
    if target.dim() not in (1, 2) or (target.dim() == 2 and target.shape[1] != num_classes):
        raise LabelError(
            f"expected labels of shape (B,) or soft targets of shape (B, {num_classes}), got {tuple(target.shape)}."
        )
    if target.shape[0] != num_samples:
        raise ShapeError(
            f"expected a target for each of the {num_samples} samples of the output, got {target.shape[0]}."
        )
    if target.dim() == 2:
        _check_soft_targets(target, num_classes)
        return
    if target.dtype != torch.int64:
        raise LabelError(f"labels (B,) must be torch.int64, got {target.dtype}; convert them with target.long().")
    if _can_be_looked_at(target):
        smallest, largest = (int(bound) for bound in torch.aminmax(target))
        if smallest < 0 or largest >= num_classes:
            raise LabelError(
                f"labels must lie in [0, {num_classes - 1}], got values from {smallest} to {largest}. "
                "The head was made for another number of classes, or the labels mark samples to ignore: drop those."
            )


def _check_soft_targets(target: Tensor, num_classes: int) -> None:
    if not target.is_floating_point():
        raise LabelError(f"soft targets (B, {num_classes}) must be floating point, got {target.dtype}.")
    if _can_be_looked_at(target):
        smallest, largest = (float(bound) for bound in torch.aminmax(target))
        if not (smallest >= 0.0 and largest < math.inf):  # NaN compares false
            raise LabelError(
                f"soft targets (B, {num_classes}) are shares of a sample, finite and not negative; got values from "
                f"{smallest:g} to {largest:g}. Outputs of a teacher need a softmax first."
            )


def _can_be_looked_at(target: Tensor) -> bool:
    """Whether reading values costs nothing: on the CPU, and not while a graph is made."""
    return target.device.type == "cpu" and target.numel() > 0 and not torch.compiler.is_compiling()


def to_look_up(labels: Tensor, num_classes: int) -> Tensor:
    """The labels (B,) themselves; in compiled code a negative one is made one too many, which any look-up refuses.

    The inductor of torch 2.11 and before takes negative ones from the end without a word.

    Examples:
        >>> to_look_up(torch.tensor([2, 0]), 3).tolist()
        [2, 0]
    """
    return torch.where(labels < 0, num_classes, labels) if torch.compiler.is_compiling() else labels


def is_seen(counts: Tensor) -> Tensor:
    """Whether there is evidence of a label: half a sample or more, of which counts (...) tell the summed weights.

    One rule for class means, class lengths and fits. Less than that is a sliver, such as smoothing gives to every
    label, and says nothing about the label.

    Examples:
        >>> is_seen(torch.tensor([0.0, 0.49, 0.5, 3.0])).tolist()
        [False, False, True, True]
    """
    return counts >= SMALLEST_EVIDENCE


def evidence(soft_targets: Tensor) -> Tensor:
    """Soft targets (B, C) less what each row gives to all labels alike, in float32.

    The uniform part of label smoothing says nothing about any label, and would draw all class means to one point.

    Examples:
        >>> evidence(torch.tensor([[0.7, 0.1, 0.2]]))
        tensor([[0.6000, 0.0000, 0.1000]])
    """
    soft_targets = soft_targets.float()
    return soft_targets - soft_targets.amin(dim=1, keepdim=True)


def group_by_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sort a batch by label, in O(B log B), without asking a GPU how many labels there are.

    Args:
        labels: (B,) int64.

    Returns:
        `ordered` (B,) the labels sorted, and `first` (B,) for each sample the first place in `ordered` that holds its
        label: a number in [0, B) for each label present.

    Examples:
        >>> ordered, first = group_by_label(torch.tensor([7, 3, 7]))
        >>> ordered.tolist(), first.tolist()
        ([3, 7, 7], [1, 0, 1])
    """
    ordered = torch.sort(labels).values
    return ordered, torch.searchsorted(ordered, labels.contiguous())


def count_own_label(labels: Tensor) -> Tensor:
    """(B,) float32: for each sample, how many samples of the batch carry its label (itself included).

    Examples:
        >>> count_own_label(torch.tensor([7, 3, 7])).tolist()
        [2.0, 1.0, 2.0]
    """
    ordered = torch.sort(labels).values
    labels = labels.contiguous()  # or searchsorted warns
    upper = torch.searchsorted(ordered, labels, right=True)
    return (upper - torch.searchsorted(ordered, labels)).float()
