"""Minimum hyperspherical energy (MHE): prototypes that repel each other like charges."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._optimise import converge, weighted_sums
from hyperproto.constructions.random import random_points

#: Squared distances below this count as this: a start with coincident rows must not give infinite forces.
CLOSEST_SQUARED = 1e-12


def energy_points(
    num_prototypes: int,
    dim: int,
    generator: torch.Generator,
    *,
    power: int = 2,
    half_space: bool = False,
) -> Tensor:
    r"""Prototypes of the smallest Riesz energy.

    $$
    \min_W \sum_{i \neq j} \lVert w_i - w_j \rVert^{-s} \quad\text{or, for } s = 0,\quad
        \min_W \sum_{i \neq j} -\log \lVert w_i - w_j \rVert
    $$

    The paper adds the energy of trainable weights to the loss of a network; ours are fixed, and converged.

    Args:
        num_prototypes: P >= 2.
        dim: D >= 2.
        generator: of the random start.
        power: s, one of 0, 1 and 2.
        half_space: the energy of the 2P points {w, -w}: prototypes spread as lines rather than as directions, which
            leaves no room to use opposite directions for two classes.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: a size that no construction takes.

    Examples:
        >>> points = energy_points(3, 3, torch.Generator().manual_seed(0), half_space=True)  # three axes
        >>> torch.allclose(points @ points.T, torch.eye(3), atol=1e-3)
        True

    References:
        Liu et al., NeurIPS 2018, eq. 1 (energy) and section 3.3 (half-space form).
    """
    start = random_points(num_prototypes, dim, generator)
    return converge(lambda points: riesz_energy(points, power, half_space), start).float()


def riesz_energy(points: Tensor, power: int, half_space: bool) -> tuple[float, Tensor]:
    """Mean Riesz energy of a pair, and its gradient.

    Args:
        points: (P, D) float64 unit rows.
        power: s >= 0.
        half_space: add to each pair's energy that of a point and the other's opposite.

    Returns:
        The value, and the gradient (P, D).

    Examples:
        >>> riesz_energy(torch.eye(3, dtype=torch.float64), 2, False)[0]  # all at distance sqrt(2)
        0.5
    """
    cosines = points @ points.T  # (P, P)
    potential, slope = _potential(cosines, power)
    if half_space:
        opposite_potential, opposite_slope = _potential(-cosines, power)
        potential, slope = potential + opposite_potential, slope - opposite_slope
    num_pairs = len(points) * (len(points) - 1)
    value = potential.fill_diagonal_(0.0).sum(dim=1).sum() / num_pairs
    return float(value), weighted_sums(slope.fill_diagonal_(0.0), points).mul_(2.0 / num_pairs)


def _potential(cosines: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Energy of a pair at each cosine, and its derivative by the cosine."""
    squared_distances = (2.0 - 2.0 * cosines).clamp_min_(CLOSEST_SQUARED)
    if power == 0:
        return -0.5 * squared_distances.log(), squared_distances.reciprocal()
    potential = squared_distances.pow(-0.5 * power)
    return potential, power * potential / squared_distances
