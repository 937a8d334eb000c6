"""Smallest largest cosine: prototypes whose nearest pair is as far apart as can be found."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._optimise import anneal, weighted_sums
from hyperproto.constructions.random import random_points
from hyperproto.sphere import largest_cosines


def separated_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Prototypes whose largest pairwise cosine is a minimum, by annealing a smooth maximum.

    $$ \min_W \max_{i \neq j} \langle w_i, w_j \rangle $$

    A local minimum, as any for more than 2D points; other seeds find others, equal in practice to the second
    decimal. Serves any number of prototypes, yet the simplex and the orthoplex are exact where they exist.

    Args:
        num_prototypes: P >= 2.
        dim: D >= 2.
        generator: of the random start.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: a size that no construction takes.

    Examples:
        >>> points = separated_points(12, 3, torch.Generator().manual_seed(0))
        >>> bool(largest_cosines(points).max() < 5**-0.5 + 1e-3)  # the icosahedron's cosine is 1 / sqrt(5)
        True
    """
    start = random_points(num_prototypes, dim, generator)
    return anneal(smooth_maximum, start, score=lambda points: float(largest_cosines(points).max())).float()


def smooth_maximum(points: Tensor, beta: float) -> tuple[float, Tensor]:
    r"""Log-sum-exp over all pairs, and its gradient; above the largest cosine by at most 2 log(P) / beta.

    $$ \tfrac{1}{\beta} \log \sum_{i \neq j} \exp(\beta \langle w_i, w_j \rangle) $$

    Args:
        points: (P, D) float64 unit rows.
        beta: > 0; the larger, the closer to the maximum and the harder to minimise.

    Returns:
        The value, and the gradient (P, D).

    Examples:
        >>> round(smooth_maximum(torch.eye(2, dtype=torch.float64), 1.0)[0], 6)  # log(2 exp(0))
        0.693147
    """
    exponents = (beta * points) @ points.T  # (P, P)
    exponents.fill_diagonal_(-torch.inf)
    largest = exponents.amax()
    weights = exponents.sub_(largest).exp_()
    # Row by row: a sum over everything at once would depend on the number of threads in its last digits.
    total = weights.sum(dim=1).sum()
    return float((largest + total.log()) / beta), weighted_sums(weights, points).mul_(2.0 / total)
