"""What the labels of a batch say: checks, and counts whose cost does not grow with the number of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import LabelError, ShapeError


def check_target(target: Tensor, num_samples: int, num_classes: int) -> None:
    """Raise unless `target` holds labels (B,) or soft targets (B, C) for this many samples and classes.

    Shapes and dtypes are always checked. The range of the labels is checked on the CPU only: on an accelerator
    the check would wait for the device, and indexing out of range fails loudly there by itself.

    Raises:
        LabelError: not int64 labels of shape (B,) in [0, C), nor floating soft targets of shape (B, C).
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
        if not target.is_floating_point():
            raise LabelError(f"soft targets (B, {num_classes}) must be floating point, got {target.dtype}.")
        return
    if target.dtype != torch.int64:
        raise LabelError(f"labels (B,) must be torch.int64, got {target.dtype}; convert them with target.long().")
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        smallest, largest = (int(bound) for bound in torch.aminmax(target))
        if smallest < 0 or largest >= num_classes:
            raise LabelError(
                f"labels must lie in [0, {num_classes - 1}], got values from {smallest} to {largest}. "
                "The head was made for another number of classes, or the labels mark samples to ignore: drop those."
            )


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
