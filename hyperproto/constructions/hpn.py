"""Hyperspherical prototype networks (HPN): smallest mean of each prototype's largest cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._optimise import anneal, weighted_sums
from hyperproto.constructions.random import random_points
from hyperproto.sphere import largest_cosines


def hpn_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Prototypes that minimise the mean of the row maxima.

    $$ \min_W \frac{1}{P} \sum_i \max_{j \neq i} \langle w_i, w_j \rangle $$

    The paper takes stochastic gradient steps on the maxima themselves, which stall where a row has two nearest
    neighbours, as all rows of a good bank have. Ours anneals smooth maxima, to convergence.

    Args:
        num_prototypes: P >= 2.
        dim: D >= 2.
        generator: of the random start.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: a size that no construction takes.

    Examples:
        >>> hpn_points(20, 8, torch.Generator().manual_seed(0)).shape
        torch.Size([20, 8])

    References:
        Mettes et al., NeurIPS 2019, eq. 2 and 3.
    """
    start = random_points(num_prototypes, dim, generator)
    return anneal(smooth_row_maxima, start, score=lambda points: float(largest_cosines(points).mean())).float()


def smooth_row_maxima(points: Tensor, beta: float) -> tuple[float, Tensor]:
    r"""Mean over rows of the log-sum-exp of the row, and its gradient.

    $$ \frac{1}{P} \sum_i \tfrac{1}{\beta} \log \sum_{j \neq i} \exp(\beta \langle w_i, w_j \rangle) $$

    Args:
        points: (P, D) float64 unit rows.
        beta: > 0.

    Returns:
        The value, and the gradient (P, D).

    Examples:
        >>> round(smooth_row_maxima(torch.eye(3, dtype=torch.float64), 1.0)[0], 6)  # log(2 exp(0))
        0.693147
    """
    exponents = (beta * points) @ points.T  # (P, P)
    exponents.fill_diagonal_(-torch.inf)
    maxima = exponents.logsumexp(dim=1, keepdim=True)
    weights = exponents.sub_(maxima).exp_()  # each row sums to 1
    gradient = weighted_sums(weights + weights.T, points).div_(len(points))
    return float(maxima.sum() / (beta * len(points))), gradient
