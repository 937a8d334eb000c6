"""Pure functions: losses over cosines, the assignment problem, the energy of a configuration.

No state, no modules; what the classes of this library do is written here once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.errors import ArgumentError, AssignmentError, ShapeError
from hyperproto.geometry import hyperspherical_energy, normalise
from hyperproto.matching.candidates import pair_cosines
from hyperproto.matching.check import check_assignment
from hyperproto.matching.dense import solve_dense
from hyperproto.matching.sparse import solve_sparse
from hyperproto.targets import check_target, count_own_label

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
AssignmentMethod = Literal["auto", "dense", "sparse"]

#: What no label is. `F.cross_entropy` drops its default, -100, without a word where nothing has checked the range.
NO_LABEL = -(2**63)

#: From this many labels on, "auto" is "sparse": measured, about where random means take as long by either. Means that
#: nearly coincide or form clusters gain long before.
SPARSE_FROM_CLASSES = 1000

#: Memory that "sparse" may take for a dense solution where its rounds do not close: 4 GiB.
DENSE_BYTES = 2**32


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
    soft = target if target.dim() == 1 else target.float()
    losses = F.cross_entropy(
        scale * cosines.float(), soft, reduction="none", label_smoothing=label_smoothing, ignore_index=NO_LABEL
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
    r"""Squared class lengths $E_c^2 = \gamma / n_c$, $\gamma = B /$ (classes present), from one batch.

    Args:
        target: labels (B,) or soft targets (B, C), whose sums are the counts n.

    Returns:
        (B, 1) for labels, each sample's own; (1, C) for soft targets, 0 for classes that are absent.

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
    present = counts > 0
    return torch.where(present, target.shape[0] / (present.sum() * counts), 0.0)


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


@dataclass(frozen=True)
class AssignmentSolution:
    """Which prototype stands for which label.

    Attributes:
        assignment: (C,) int64 on the CPU, injective.
        similarity: sum over labels of weight times cosine with the matched prototype.
        optimal: whether no assignment can have a larger similarity (to float rounding): proven by the solver.
        method: the solver used.
        prices: (P,) float64 dual prices of the prototypes, with which "sparse" solves the next problem faster; None
            from "dense".
    """

    assignment: Tensor
    similarity: float
    optimal: bool
    method: str
    prices: Tensor | None = None


def solve_assignment(
    class_means: Tensor,
    prototypes: Tensor,
    *,
    current: Tensor | None = None,
    weights: Tensor | None = None,
    method: AssignmentMethod = "auto",
    prices: Tensor | None = None,
) -> AssignmentSolution:
    r"""The one-to-one assignment of labels to prototypes with the largest total cosine.

    $$ \sigma = \arg\max_{\sigma \text{ injective}} \sum_c a_c \langle m_c, w_{\sigma(c)} \rangle $$

    Args:
        class_means: (C, D) mean embeddings; rows are normalised here. A zero row is a label never seen: it keeps
            its prototype unless a seen label needs it.
        prototypes: (P, D), P >= C; rows are normalised here.
        current: (C,) int64, the assignment in force, kept where moving gains nothing; by default label k at k.
        weights: (C,) non-negative importance a of each label; 1 by default. "sparse" is exact to C * 2^-32 times the
            largest: weights that differ by many orders of magnitude are for "dense".
        method: "dense" (scipy's solver on all cosines: O(C P) memory), "sparse" (candidates, and a proof over all
            pairs: O((C + P) D) memory, many times faster for many labels) or "auto", which picks by size. Should
            "sparse" not close within its rounds, "dense" takes over where it needs 4 GiB or less.
        prices: (P,) of the last solution, for "sparse" to start from: where little has changed since, it costs one
            pass over the cosines. They change nothing but which of equally good assignments is found.

    Returns:
        The solution; exact in every mode.

    Raises:
        ShapeError: shapes do not fit.
        AssignmentError: P < C, rows that are not finite (named), an invalid `current`, or no solution within memory.
        ArgumentError: an unknown method, or weights that are negative or not finite.

    Examples:
        >>> means = torch.tensor([[0.0, 1.0], [1.0, 0.1]])
        >>> solve_assignment(means, torch.eye(2)).assignment.tolist()
        [1, 0]

    References:
        Saadabadi et al., CVPR 2024, eq. 7 (the assignment step).
    """
    if method not in get_args(AssignmentMethod):
        raise ArgumentError(f"method must be one of {get_args(AssignmentMethod)}, got {method!r}.")
    _check_problem(class_means, prototypes, weights, prices)
    num_classes, num_prototypes = len(class_means), len(prototypes)
    if current is None:
        current = torch.arange(num_classes, device="cpu")
    check_assignment(current, num_classes, num_prototypes)
    means, prototypes, current = (
        normalise(class_means.detach()).cpu(),
        normalise(prototypes.detach()).cpu(),
        current.cpu(),
    )
    weights = None if weights is None else weights.detach().cpu().double()
    if prices is not None:
        prices = prices.detach().cpu().double()
    solution = None
    if method == "sparse" or (method == "auto" and num_classes >= SPARSE_FROM_CLASSES):
        solution = _solve_sparse(means, prototypes, current, weights, prices)
    if solution is None:
        solution = _solve_dense(means, prototypes, current, weights)
    similarity_of_current = _total_similarity(means, prototypes, current, weights)
    if solution.similarity <= similarity_of_current:  # equal but for the order of summation
        solution = replace(solution, assignment=current.clone(), similarity=similarity_of_current)
    return solution


def _solve_dense(means: Tensor, prototypes: Tensor, current: Tensor, weights: Tensor | None) -> AssignmentSolution:
    similarity = means.double() @ prototypes.double().T
    if weights is not None:
        similarity *= weights[:, None]
    assignment = solve_dense(similarity, current)
    total = _total_similarity(means, prototypes, assignment, weights)
    return AssignmentSolution(assignment, total, optimal=True, method="dense")


def _solve_sparse(
    means: Tensor, prototypes: Tensor, current: Tensor, weights: Tensor | None, prices: Tensor | None
) -> AssignmentSolution | None:
    """The sparse solution, or None if it did not close and the dense one fits into `DENSE_BYTES`."""
    found = solve_sparse(means, prototypes, current, weights=weights, prices=prices)
    if not found.proven:
        needed = 3 * 8 * len(means) * len(prototypes)  # the matrix, its copy with ties broken, and scipy's
        if needed > DENSE_BYTES:
            raise AssignmentError(
                f"the sparse assignment of {len(means)} labels to {len(prototypes)} prototypes did not close. "
                f'method="dense" is always exact and needs {needed / 2**30:.1f} GiB of memory here.'
            )
        return None
    total = _total_similarity(means, prototypes, found.assignment, weights)
    return AssignmentSolution(found.assignment, total, optimal=True, method="sparse", prices=found.prices)


def _total_similarity(means: Tensor, prototypes: Tensor, assignment: Tensor, weights: Tensor | None) -> float:
    cosines = pair_cosines(means, prototypes, torch.arange(len(means), device="cpu"), assignment)
    return float((cosines if weights is None else cosines * weights).sum())


def check_reduction(reduction: Reduction) -> None:
    """Raise ArgumentError unless `reduction` is "mean", "sum" or "none"."""
    if reduction not in get_args(Reduction):
        raise ArgumentError(f"reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got {reduction!r}.")


def _check_problem(class_means: Tensor, prototypes: Tensor, weights: Tensor | None, prices: Tensor | None) -> None:
    if class_means.dim() != 2 or prototypes.dim() != 2 or class_means.shape[1] != prototypes.shape[1]:
        raise ShapeError(
            "expected class means (C, D) and prototypes (P, D) of one dimension D, got "
            f"{tuple(class_means.shape)} and {tuple(prototypes.shape)}."
        )
    if len(class_means) == 0:
        raise AssignmentError("expected class means of at least one label, got none.")
    if len(prototypes) < len(class_means):
        raise AssignmentError(
            f"{len(class_means)} labels need at least as many prototypes, got {len(prototypes)}. "
            "Build the bank with more prototypes."
        )
    for name, rows in (("class means", class_means), ("prototypes", prototypes)):
        finite = torch.isfinite(rows).all(dim=1)
        if not bool(finite.all()):
            wrong = torch.nonzero(~finite).flatten()[:10].tolist()
            raise AssignmentError(f"{name} must be finite; rows {wrong} are not.")
    if prices is not None and prices.shape != (len(prototypes),):
        raise ShapeError(f"expected prices of shape ({len(prototypes)},), got {tuple(prices.shape)}.")
    if weights is None:
        return
    if weights.shape != (len(class_means),):
        raise ShapeError(f"expected weights of shape ({len(class_means)},), got {tuple(weights.shape)}.")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ArgumentError("weights must be finite and not negative.")


def _check_cosines(cosines: Tensor, target: Tensor) -> None:
    if cosines.dim() != 2:
        raise ShapeError(f"expected cosines of shape (B, C), got {tuple(cosines.shape)}.")
    check_target(target, *cosines.shape)


def _at_labels(values: Tensor, target: Tensor) -> Tensor:
    """(B, C) or (1, C) values -> (B, 1), those of each sample's label; all of them for soft targets."""
    return values.expand(len(target), -1).gather(1, target[:, None]) if target.dim() == 1 else values


def _reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    check_reduction(reduction)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # The mean of nothing would be NaN, and its gradient with it.
    return losses.sum() / max(len(losses), 1)
