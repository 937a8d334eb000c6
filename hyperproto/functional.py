"""Pure functions: losses over cosines, the assignment problem, the energy of a configuration.

No state, no modules; what the classes of this library do is written here once.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.errors import ArgumentError, ShapeError
from hyperproto.matching.solve import AssignmentSolution, solve_assignment
from hyperproto.sphere import hyperspherical_energy
from hyperproto.targets import check_target, count_own_label, is_seen, to_look_up

__all__ = [
    "AssignmentSolution",
    "balanced_loss",
    "batch_squared_lengths",
    "hyperspherical_energy",
    "long_tail_loss",
    "prototype_cross_entropy",
    "pull_loss",
    "solve_assignment",
    "squared_class_lengths",
]

Reduction = Literal["mean", "sum", "none"]

#: Asked for once: in a compiled loss `get_args` is a graph break in torch 2.6.
REDUCTIONS = get_args(Reduction)

#: What no label is. `F.cross_entropy` drops its default, -100, without a word where nothing has checked the range.
NO_LABEL = -(2**63)


def balanced_loss(cosines: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Squared pull of each sample towards the prototype of its label.

    $$ \ell_b = \left(1 - \langle z_b, w_{\sigma(y_b)} \rangle\right)^2 $$

    Soft targets weigh the pulls towards all labels: linear in the targets.

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
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
    _check_cosines(cosines, target)
    return pull_loss(_at_labels(cosines, target), target, reduction=reduction)


def long_tail_loss(
    cosines: Tensor, target: Tensor, *, class_counts: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Dot regression: the squared pull, with classes weighed by the inverse of their frequency.

    $$ \ell_b = \tfrac{1}{2} E_{y_b}^2 \left(1 - \langle z_b, w_{\sigma(y_b)} \rangle\right)^2 $$

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
        class_counts: (C,) training samples of each class; by default the counts of this batch.
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
    _check_cosines(cosines, target)
    if class_counts is None:
        lengths = batch_squared_lengths(target)
    else:
        lengths = _at_labels(squared_class_lengths(class_counts, cosines.shape[1])[None].to(cosines.device), target)
    return pull_loss(_at_labels(cosines, target), target, 0.5 * lengths, reduction=reduction)


def prototype_cross_entropy(
    cosines: Tensor,
    target: Tensor,
    *,
    scale: float = 16.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy over scaled cosines with fixed prototypes ("ETF + CE").

    $$ \ell_b = -\log \frac{\exp(s \cos_{b, y_b})}{\sum_c \exp(s \cos_{b, c})} $$

    Args:
        cosines: (B, C).
        target: labels (B,) int64 or soft targets (B, C).
        scale: s > 0, the inverse temperature.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        reduction: "mean", "sum" or "none".

    Returns:
        () or, for "none", (B,) float32. An empty batch has loss 0.

    Raises:
        LabelError, ShapeError: target does not fit.

    Examples:
        >>> prototype_cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor(4.)

    References:
        Shen et al., arXiv 2303.11637 (equiangular basis vectors).
    """
    _check_cosines(cosines, target)
    return scaled_cross_entropy(cosines, target, scale=scale, label_smoothing=label_smoothing, reduction=reduction)


def scaled_cross_entropy(
    cosines: Tensor, target: Tensor, *, scale: float, label_smoothing: float, reduction: Reduction
) -> Tensor:
    """`prototype_cross_entropy` of what has been checked."""
    target = to_look_up(target, cosines.shape[1]) if target.dim() == 1 else target.float()
    losses = F.cross_entropy(
        scale * cosines.float(), target, reduction="none", label_smoothing=label_smoothing, ignore_index=NO_LABEL
    )
    return _reduce(losses, reduction)


def pull_loss(
    selected: Tensor, target: Tensor, weights: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""What the pull losses share.

    $$ \ell_b = \sum_k t_{bk} \, a_{bk} (1 - \cos_{bk})^2 $$

    Args:
        selected: (B, 1) cosine with the own label's prototype, or (B, C) all cosines for soft targets.
        target: labels (B,), for which every t is 1, or soft targets t (B, C).
        weights: a, broadcastable to `selected`; 1 by default.
        reduction: "mean", "sum" or "none".
    """
    losses = (1.0 - selected.float()).square()
    if weights is not None:
        losses = losses * weights
    if target.dim() == 2:
        losses = losses * target.float()
    return _reduce(losses.sum(dim=1), reduction)


def batch_squared_lengths(target: Tensor) -> Tensor:
    r"""Squared class lengths $E_c^2 = \gamma / \max(n_c, 1)$, $\gamma = B /$ (classes present), from one batch.

    A class is present from half a sample on (`targets.is_seen`), and no count is below one: slivers of a label, as
    smoothing and mixup make them, weigh as little as they are. With hard labels this is the papers' formula.

    Args:
        target: labels (B,) or soft targets (B, C), whose sums are the counts n.

    Returns:
        (B, 1) for labels, each sample's own; (1, C) for soft targets.

    Examples:
        >>> batch_squared_lengths(torch.tensor([0, 0, 1])).flatten()
        tensor([0.7500, 0.7500, 1.5000])
    """
    if target.dim() == 1:
        own_counts = count_own_label(target)
        # Every class present adds n_c samples of 1 / n_c each.
        num_present = own_counts.reciprocal().sum()
        return (target.shape[0] / (num_present * own_counts))[:, None]
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
    counts = torch.as_tensor(class_counts).detach().cpu().double()
    if counts.shape != (num_classes,):
        raise ArgumentError(f"class_counts must have shape ({num_classes},), got {tuple(counts.shape)}.")
    if not bool((torch.isfinite(counts) & (counts > 0)).all()):
        wrong = torch.nonzero(~(torch.isfinite(counts) & (counts > 0))).flatten()[:5].tolist()
        raise ArgumentError(
            f"class_counts must be positive and finite; they are not for labels {wrong}. "
            "Leave classes without training samples out of the head."
        )
    return (counts.sum() / (num_classes * counts)).float()


def check_reduction(reduction: Reduction) -> None:
    """Raise ArgumentError unless `reduction` is "mean", "sum" or "none"."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")


def _check_cosines(cosines: Tensor, target: Tensor) -> None:
    if cosines.dim() != 2:
        raise ShapeError(f"expected cosines of shape (B, C), got {tuple(cosines.shape)}.")
    check_target(target, *cosines.shape)


def _at_labels(values: Tensor, target: Tensor) -> Tensor:
    """(B, C) or (1, C) values -> (B, 1), those of each sample's label; all of them for soft targets."""
    if target.dim() == 2:
        return values
    return values.expand(len(target), -1).gather(1, to_look_up(target, values.shape[1])[:, None])


def _reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    check_reduction(reduction)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # The mean of nothing would be NaN, and its gradient with it.
    return losses.sum() / max(len(losses), 1)
