"""Pure functions: losses over cosines, the assignment problem, the energy of a configuration.

No state, no modules; what the classes of this library do is written here once.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.arguments import (
    SMALLEST_INT,
    as_tensor,
    choice,
    numbers_by_label,
    positive_number,
    share,
    whole_number,
)
from hyperproto.errors import ArgumentError, LabelError, ShapeError
from hyperproto.matching.solve import AssignmentSolution, solve_assignment
from hyperproto.separation import placed_scale
from hyperproto.sphere import hyperspherical_energy
from hyperproto.targets import IGNORE_INDEX, Target, count_own_label, is_seen, read_target, to_look_up

__all__ = [
    "AssignmentSolution",
    "balanced_loss",
    "batch_squared_lengths",
    "hyperspherical_energy",
    "long_tail_loss",
    "prototype_cross_entropy",
    "solve_assignment",
    "squared_class_lengths",
]

Reduction = Literal["mean", "sum", "none"]

#: Asked for once: in a compiled loss `get_args` is a graph break in torch 2.6.
REDUCTIONS = get_args(Reduction)


def balanced_loss(
    cosines: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared pull of each sample towards the prototype of its label.

    $$ \ell_b = \left(1 - \langle z_b, w_{\sigma(y_b)} \rangle\right)^2 $$

    Soft targets weigh the pulls towards all labels: linear in the targets.

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
        ignore_index: label of samples that do not count: their loss is 0, and the mean is over the others.
        reduction: "mean" keeps the learning rate independent of the batch size; the papers take the "sum".

    Returns:
        () or, for "none", (B,) float32. An empty batch has loss 0.

    Raises:
        LabelError, ShapeError: target does not fit.

    Examples:
        >>> cosines = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
        >>> balanced_loss(cosines, torch.tensor([0, 1]), reduction="none")
        tensor([0.2500, 0.0000])

    References:
        Mettes et al., NeurIPS 2019, eq. 5; Saadabadi et al., CVPR 2024 (balanced data).
    """
    cosines, checked = _read(cosines, target, ignore_index)
    return pull_loss(_at_labels(cosines, checked), checked, reduction=reduction)


def long_tail_loss(
    cosines: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dot regression: the squared pull, with classes weighed by the inverse of their frequency.

    $$ \ell_b = \tfrac{1}{2} E_{y_b}^2 \left(1 - \langle z_b, w_{\sigma(y_b)} \rangle\right)^2 $$

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
        class_counts: (C,) training samples of each class; by default the counts of this batch.
        ignore_index: label of samples that do not count: their loss is 0, and the mean is over the others.
        reduction: "mean" (as in the papers), "sum" or "none".

    Returns:
        () or, for "none", (B,) float32. An empty batch has loss 0.

    Raises:
        LabelError, ShapeError: target does not fit.
        ArgumentError: class_counts are not C positive numbers.

    Examples:
        >>> cosines = torch.zeros(3, 2)
        >>> long_tail_loss(cosines, torch.tensor([0, 0, 1]), reduction="none")
        tensor([0.3750, 0.3750, 0.7500])

    References:
        Yang et al., NeurIPS 2022, eq. 9 (dot regression); Saadabadi et al., CVPR 2024 (long-tailed data).
    """
    cosines, checked = _read(cosines, target, ignore_index)
    if class_counts is None:
        lengths = batch_squared_lengths(checked.values, ignore_index=checked.ignore_index)
    else:
        lengths = _at_labels(squared_class_lengths(class_counts, cosines.shape[1])[None].to(cosines.device), checked)
    return pull_loss(_at_labels(cosines, checked), checked, 0.5 * lengths, reduction=reduction)


def prototype_cross_entropy(
    cosines: Tensor,
    target: Tensor,
    *,
    scale: float | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy over scaled cosines with fixed prototypes ("ETF + CE").

    $$ \ell_b = -\log \frac{\exp(s \cos_{b, y_b})}{\sum_c \exp(s \cos_{b, c})} $$

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
        scale: s > 0, the inverse temperature; by default that of a head on a simplex.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        weight: (C,) weights of the labels, not negative; the mean is then that of `torch.nn.CrossEntropyLoss`: labels
            are divided by the sum of their weights, soft targets by the number of samples.
        ignore_index: label of samples that do not count: their loss is 0, and the mean is over the others.
        reduction: "mean", "sum" or "none".

    Returns:
        () or, for "none", (B,) float32. An empty batch has loss 0.

    Raises:
        LabelError, ShapeError: target does not fit.
        ArgumentError: an option outside its range.

    Examples:
        >>> prototype_cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor(4.)

    References:
        Shen et al., arXiv 2303.11637 (equiangular basis vectors).
    """
    cosines, checked = _read(cosines, target, ignore_index)
    if scale is None:
        num_classes = max(cosines.shape[1], 2)
        scale = placed_scale(num_classes, rho=-1.0 / (num_classes - 1))
    return scaled_cross_entropy(
        cosines,
        checked.values,
        scale=positive_number(scale, "scale"),
        label_smoothing=share(label_smoothing, "label_smoothing"),
        weight=None if weight is None else class_weights(weight, cosines.shape[1]).to(cosines.device),
        kept=checked.kept,
        reduction=reduction,
    )


def scaled_cross_entropy(
    cosines: Tensor,
    target: Tensor,
    *,
    scale: float,
    label_smoothing: float,
    reduction: Reduction,
    weight: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`prototype_cross_entropy` of what has been checked; `kept` (B,): which labels count, None for all."""
    is_soft = target.dim() == 2
    looked_up = target.float() if is_soft else to_look_up(target, cosines.shape[1])
    losses = F.cross_entropy(
        scale * cosines.float(),
        looked_up if kept is None else torch.where(kept, looked_up, IGNORE_INDEX),
        weight=weight,
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=IGNORE_INDEX,
    )
    if is_soft:
        return _reduce(losses, reduction)
    if weight is None:
        return _reduce(losses, reduction, kept)
    shares = weight[target] if kept is None else torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
    return _reduce(losses, reduction, shares)


def pull_loss(
    selected: Tensor, target: Target, weights: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""What the pull losses share.

    $$ \ell_b = \sum_k t_{bk} \, a_{bk} (1 - \cos_{bk})^2 $$

    Args:
        selected: (B, 1) cosine with the own label's prototype, or (B, C) all cosines for soft targets.
        target: labels, for which every t is 1, or soft targets t.
        weights: a, broadcastable to `selected`; 1 by default.
        reduction: "mean", "sum" or "none".
    """
    # An ignored sample lies on its prototype: no loss, and no gradient, whatever the model returned for it.
    losses = (1.0 - target.where_kept(selected.float(), 1.0)).square()
    if weights is not None:
        losses = losses * weights
    if target.kept is None:
        losses = losses * target.values.float()
    return _reduce(losses.sum(dim=1), reduction, target.kept)


def batch_squared_lengths(target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Squared class lengths $E_c^2 = \gamma / \max(n_c, 1)$, $\gamma = B /$ (classes present), from one batch.

    A class is present from half a sample on (`targets.is_seen`), and no count is below one: slivers of a label, as
    smoothing and mixup make them, weigh as little as they are. With hard labels this is the papers' formula.

    Args:
        target: labels (B,) or soft targets (B, C), whose sums are the counts n.
        ignore_index: label of samples that do not count.

    Returns:
        (B, 1) for labels, each sample's own (any number for ignored ones); (1, C) for soft targets.

    Raises:
        LabelError: neither labels nor soft targets.
        ArgumentError: ignore_index is no whole number.

    Examples:
        >>> batch_squared_lengths(torch.tensor([0, 0, 1])).flatten()
        tensor([0.7500, 0.7500, 1.5000])
    """
    target = as_tensor(target, "the target", error=LabelError)
    ignored = whole_number(ignore_index, "ignore_index", smallest=SMALLEST_INT)
    is_soft = target.dim() == 2 and target.is_floating_point()
    if not is_soft and not (target.dim() == 1 and target.dtype == torch.int64):
        raise LabelError(
            "expected labels (B,) in torch.int64 or soft targets (B, C) in a floating dtype, got "
            f"{tuple(target.shape)} and {target.dtype}."
        )
    if target.dim() == 1:
        own_counts = count_own_label(target)
        kept = target != ignored
        # Every class present adds n_c samples of 1 / n_c each.
        num_present = (kept / own_counts).sum()
        # The floor is for a batch of ignored samples only.
        return (kept.sum() / (num_present.clamp_min(0.5) * own_counts))[:, None]
    counts = target.float().sum(dim=0, keepdim=True)  # (1, C)
    num_present = is_seen(counts).sum().clamp_min(1)
    return target.shape[0] / (num_present * counts.clamp_min(1.0))


def squared_class_lengths(class_counts: Tensor, num_classes: int) -> Tensor:
    r"""Squared class lengths $E_c^2 = \gamma / n_c$, $\gamma = N / C$, from the whole training set.

    Args:
        class_counts: (C,) positive numbers of training samples.
        num_classes: C.

    Returns:
        (C,) float32; balanced classes have length 1.

    Raises:
        ArgumentError: not C positive finite numbers.

    Examples:
        >>> squared_class_lengths(torch.tensor([30, 10]), 2)
        tensor([0.6667, 2.0000])
    """
    num_classes = whole_number(num_classes, "num_classes", smallest=1)
    counts = numbers_by_label(class_counts, "class_counts", num_classes)
    if not bool((torch.isfinite(counts) & (counts > 0)).all()):
        wrong = torch.nonzero(~(torch.isfinite(counts) & (counts > 0))).flatten()[:5].tolist()
        raise ArgumentError(
            f"class_counts must be positive and finite; they are not for labels {wrong}. "
            "Leave classes without training samples out of the head."
        )
    return (counts.sum() / (num_classes * counts)).float()


def class_weights(weight: Tensor, num_classes: int) -> Tensor:
    """(C,) float32 weights of the labels.

    Raises:
        ArgumentError: not C finite numbers that are not negative, one of them positive.
    """
    weights = numbers_by_label(weight, "weight", num_classes)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all() and weights.any()):
        raise ArgumentError(
            f"weight must be finite and not negative, and positive for one label at least, got values from "
            f"{float(weights.min()):g} to {float(weights.max()):g}."
        )
    return weights.float()


def check_reduction(reduction: Reduction) -> None:
    """Raise ArgumentError unless `reduction` is "mean", "sum" or "none"."""
    choice(reduction, "reduction", REDUCTIONS)


def _read(cosines: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Target]:
    cosines = as_tensor(cosines, "cosines of shape (B, C)")
    if cosines.dim() != 2 or not cosines.is_floating_point():
        raise ShapeError(
            f"expected cosines of shape (B, C), in a floating dtype, got {tuple(cosines.shape)} and {cosines.dtype}."
        )
    ignored = whole_number(ignore_index, "ignore_index", smallest=SMALLEST_INT)
    return cosines, read_target(target, cosines.shape[:1], cosines.shape[1], cosines.device, ignore_index=ignored)


def _at_labels(values: Tensor, target: Target) -> Tensor:
    """(B, C) or (1, C) values -> (B, 1), those of each sample's label; all of them for soft targets."""
    if target.kept is None:
        return values
    places = to_look_up(target.places(), values.shape[1])
    return values.expand(target.values.shape[0], -1).gather(1, places[:, None])


def _reduce(losses: Tensor, reduction: Reduction, shares: Tensor | None = None) -> Tensor:
    """The mean is over the samples or, where these count by shares (B,), over the sum of the shares."""
    check_reduction(reduction)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # The mean of nothing would be NaN, and its gradient with it.
    if shares is None:
        return losses.sum() / max(losses.shape[0], 1)
    total = shares.sum()
    return losses.sum() / torch.where(total > 0, total, 1)
