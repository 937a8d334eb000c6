"""From the statistics of features to an assignment and a projection, without a step of gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import ArgumentError
from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.statistics import ClassScatter, FeatureStatistics
from hyperproto.fitting.unit_head import Coordinates, UnitHead
from hyperproto.matching.problem import place_unseen
from hyperproto.matching.procrustes import align

#: Prototypes are float32: to take one from a label that has not been seen has to gain more than their rounding.
SMALLEST_SHARE = 1e-6


def match_classes(scatter: ClassScatter, prototypes: Tensor, current: Tensor) -> Tensor:
    r"""Assignment in which prototypes lie to each other as the classes do, however the features are turned.

    $$ v_c = \Sigma^{-1/2} (\mu_c - \bar\mu) $$

    with the covariance within classes: the class means in the space in which each class is a round cloud, and
    distances say how hard two classes are to tell apart. Rotation and matching are those of
    `matching.procrustes.align`.

    Args:
        scatter: of C labels or fewer.
        prototypes: (P, D) float64 on the CPU, P >= C.
        current: (C,) int64; labels not seen keep their prototype unless a seen one needs it.

    Returns:
        (C,) int64.

    Raises:
        ArgumentError: the covariance is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(scatter.within)
    if failed:
        raise ArgumentError(
            "the features that reach the head lie so far from zero that rounding hides how classes spread; the head is "
            "unchanged. Subtract their mean first."
        )
    whitened = torch.linalg.solve_triangular(factor, (scatter.means - scatter.centre).T, upper=False).T  # (S, F)
    # A rotation of the whitened means, no wider than there are classes.
    left, lengths, _ = torch.linalg.svd(whitened, full_matrices=False)
    best = align(left * lengths, prototypes)
    matched = best.assignment
    unseen = torch.ones_like(current, dtype=torch.bool).index_fill_(0, scatter.labels, False)
    if bool(unseen.any()):
        free = torch.ones(len(prototypes), dtype=torch.bool, device="cpu").index_fill_(0, current[unseen], False)
        apart = align(left * lengths, prototypes[free])
        if apart.similarity >= (1.0 - SMALLEST_SHARE) * best.similarity:
            matched = torch.nonzero(free).flatten()[apart.assignment]
    return place_unseen(current, scatter.labels, matched, len(prototypes))


def least_squares(samples: Samples, coordinates: Coordinates, *, class_prototypes: Tensor, intercept: bool) -> UnitHead:
    """The projection that brings samples nearest to the prototypes (C, D) of their labels; see `regress`."""
    statistics = FeatureStatistics(len(class_prototypes), len(coordinates.centre))
    for features, labels in samples.batches:
        statistics.add(coordinates.of(features).cpu(), labels.cpu())
    samples.add_up(list(statistics.tensors()))
    scatter, device = statistics.scatter(), class_prototypes.device
    targets = class_prototypes.cpu().double()[scatter.labels]
    matrix = regress(scatter, targets, intercept=intercept)
    offset = targets.mean(dim=0) - matrix @ scatter.centre if intercept else torch.zeros_like(targets[0])
    return UnitHead(coordinates, matrix.float().to(device), offset.float().to(device), class_prototypes)


def regress(scatter: ClassScatter, targets: Tensor, *, intercept: bool) -> Tensor:
    r"""Linear map that brings features nearest to the targets of their labels, in the mean of squares.

    $$ \min_{A, a} \; \sum_c \mathbb{E}_{x \sim c} \lVert A x + a - t_c \rVert^2 $$

    Labels count alike, however many samples they have: with samples counting alike, rare labels are never predicted.
    That the covariance within classes is shrunk acts as a ridge does.

    Args:
        scatter: of S labels.
        targets: (S, D) float64, one for each label seen.
        intercept: whether a is free, or zero.

    Returns:
        (D, F) the map A. The intercept takes the mean of the class means to the mean of the targets.
    """
    targets = targets / len(targets)
    if intercept:
        return torch.linalg.solve(scatter.balanced, (scatter.means - scatter.centre).T @ targets).T
    moment = scatter.balanced + torch.outer(scatter.centre, scatter.centre)
    return torch.linalg.solve(moment, scatter.means.T @ targets).T
