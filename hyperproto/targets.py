"""What the labels of a batch say: checks, and counts whose cost does not grow with the number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperproto.arguments import as_tensor
from hyperproto.errors import LabelError, ShapeError

#: The label of samples that do not count, as in `torch.nn.CrossEntropyLoss`.
IGNORE_INDEX = -100

#: Samples, or summed weights, from which on a label counts as seen.
SMALLEST_EVIDENCE = 0.5


class Target(NamedTuple):
    """The target of a batch, checked.

    Attributes:
        values: labels (B,) int64 or soft targets (B, C).
        kept: (B,) bool, the samples that are not ignored; None for soft targets, which ignore none.
        ignore_index: the label of ignored samples.
    """

    values: Tensor
    kept: Tensor | None
    ignore_index: int

    def places(self) -> Tensor:
        """(B,) labels to gather by: 0 in the place of ignored ones, whose rows `where_kept` overwrites."""
        return self.where_kept(self.values, 0)

    def where_kept(self, values: Tensor, other: float) -> Tensor:
        """(B,) or (B, N) values, and another one in the rows of ignored samples."""
        if self.kept is None:
            return values
        return torch.where(self.kept if values.dim() == 1 else self.kept[:, None], values, other)


def read_target(
    target: object,
    shape: Sequence[int],
    num_classes: int,
    device: torch.device,
    *,
    class_dim: int = -1,
    ignore_index: int = IGNORE_INDEX,
) -> Target:
    """What a target says of each sample of an output, or of each position; raises as `check_target` does.

    Args:
        target: labels of that shape or soft targets with a dimension of C besides; a list or an array is copied to the
            device.
        shape: (B,), or (B, ...) where each position has a target.
        num_classes: C.
        device: of the output.
        class_dim: the dimension of C in soft targets, -1 or 1.
        ignore_index: the label of samples that do not count.

    Raises:
        LabelError: also where a tensor is on another device than the output.
    """
    given, target = target, as_tensor(target, "the target", error=LabelError)
    if target is not given:
        target = target.to(device)
        if target.dim() == len(shape) and not (target.is_floating_point() or target.dtype == torch.bool):
            target = target.long()
    if len(shape) > 1:
        target = _of_positions(target, tuple(shape), num_classes, class_dim)
    check_target(target, math.prod(shape), num_classes, ignore_index=ignore_index)
    if target.device != device:
        raise LabelError(
            f"expected a target on the device of the output, {device}, got one on {target.device}. "
            f'Move it: target.to("{device}").'
        )
    if target.dim() == 2:
        return Target(target, None, ignore_index)
    return Target(target, target != ignore_index, ignore_index)


def to_rows(values: Tensor, class_dim: int) -> Tensor:
    """(B, K) itself, and (B, ..., K) or (B, K, ...) as (N, K), a row for each position.

    Args:
        values: two dimensions or more.
        class_dim: the dimension of K, -1 or 1.

    Examples:
        >>> to_rows(torch.zeros(2, 10, 4, 5), 1).shape, to_rows(torch.zeros(2, 20, 10), -1).shape
        (torch.Size([40, 10]), torch.Size([40, 10]))
    """
    return values if values.dim() == 2 else values.movedim(class_dim, -1).flatten(0, -2)


def _of_positions(target: Tensor, shape: tuple[int, ...], num_classes: int, class_dim: int) -> Tensor:
    """(N,) labels or (N, C) soft targets of the N positions of that shape.

    Raises:
        LabelError: of another shape.
    """
    if target.shape == shape:
        return target.flatten()
    soft = (*shape, num_classes) if class_dim == -1 else (*shape[:1], num_classes, *shape[1:])
    if target.shape == soft:
        return to_rows(target, class_dim)
    column = target.dim() == len(soft) and target.shape[class_dim] == 1
    raise LabelError(
        f"expected a target for each of the output's positions, labels of shape {shape} or soft targets of shape "
        f"{soft}, got {tuple(target.shape)}." + (f" Take the column: target.squeeze({class_dim})." if column else "")
    )


def check_target(target: Tensor, num_samples: int, num_classes: int, *, ignore_index: int | None = None) -> None:
    """Raise unless `target` holds labels (B,) or soft targets (B, C) for this many samples and classes.

    Shapes and dtypes are always checked. The range of the values is checked on the CPU only: on an accelerator
    the check would wait for the device, and indexing out of range fails loudly there by itself.

    Raises:
        LabelError: not int64 labels of shape (B,) in [0, C) or at `ignore_index`, nor floating soft targets of shape
            (B, C), finite and not negative; several labels for one sample.
        ShapeError: another number of samples than the output has.
    """
    if target.dim() not in (1, 2) or (target.dim() == 2 and target.shape[1] != num_classes):
        column = target.dim() == 2 and target.shape[1] == 1
        raise LabelError(
            f"expected labels of shape (B,) or soft targets of shape (B, {num_classes}), got {tuple(target.shape)}."
            + (" Take the column: target.squeeze(1)." if column else "")
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
    if can_be_looked_at(target):
        counting = target if ignore_index is None else target[target != ignore_index]
        smallest, largest = (int(bound) for bound in torch.aminmax(counting)) if len(counting) else (0, 0)
        if smallest < 0 or largest >= num_classes:
            raise LabelError(
                f"labels must lie in [0, {num_classes - 1}], got values from {smallest} to {largest}. "
                "The head was made for another number of classes, or the labels mark samples to ignore: "
                + ("drop those." if ignore_index is None else f"ignore_index is {ignore_index} here.")
            )


def _check_soft_targets(target: Tensor, num_classes: int) -> None:
    if not target.is_floating_point():
        raise LabelError(
            f"soft targets (B, {num_classes}) must be floating point, got {target.dtype}; convert one-hot rows with "
            "target.float()."
        )
    if can_be_looked_at(target):
        smallest, largest = (float(bound) for bound in torch.aminmax(target))
        if not (smallest >= 0.0 and largest < math.inf):  # NaN compares false
            raise LabelError(
                f"soft targets (B, {num_classes}) are shares of a sample, finite and not negative; got values from "
                f"{smallest:g} to {largest:g}. Outputs of a teacher need a softmax first."
            )
        # Ones, and more of them than rows: looked for only where a row can hold two.
        if largest == 1.0 and bool((target.sum(dim=1) >= 2.0).any()) and bool(((target == 0) | (target == 1)).all()):
            raise LabelError(
                "expected one label for each sample, or shares that add up to 1, got rows of several ones: "
                "multi-label targets. A sample has one place on the sphere and cannot lie on several prototypes; use "
                "shares, target / target.sum(dim=1, keepdim=True), or another head."
            )


def largest_total(target: Target) -> float:
    """The largest sum of a sample's soft targets; 1 for labels, and where values cannot be looked at.

    Examples:
        >>> largest_total(Target(torch.tensor([[30.0, 70.0]]), None, -100))
        100.0
    """
    if target.values.dim() == 1 or not can_be_looked_at(target.values):
        return 1.0
    return float(target.values.float().sum(dim=1).max())


def can_be_looked_at(tensor: Tensor) -> bool:
    """Whether reading values is possible and costs nothing: on the CPU, and not while a graph is made."""
    return (
        not torch.compiler.is_compiling() and tensor.device.type == "cpu" and tensor.numel() > 0 and has_memory(tensor)
    )


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own; those within transforms of torch.func stand for others.

    Examples:
        >>> seen = []
        >>> _ = torch.func.vmap(lambda row: seen.append(has_memory(row)) or row)(torch.ones(2, 3))
        >>> seen, has_memory(torch.ones(3))
        ([False], True)
    """
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def writes_of(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which tensors these are, and how often each was written: another answer where one was written or replaced.

    Examples:
        >>> before = writes_of([tensor := torch.zeros(2)])
        >>> writes_of([tensor.add_(1)]) == before
        False
    """
    return tuple((id(tensor), tensor._version) for tensor in tensors)


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
