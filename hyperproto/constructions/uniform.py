"""Uniformity: prototypes of the smallest Gaussian potential."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._optimise import converge
from hyperproto.constructions.random import random_points
from hyperproto.constructions.separated import smooth_maximum


def uniform_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Prototypes that minimise the logarithm of the mean Gaussian potential.

    $$ \min_W \log \operatorname*{mean}_{i, j} \exp(-2 \lVert w_i - w_j \rVert^2) $$

    Between unit vectors the potential is exp(4 cos - 4), so that this is `smooth_maximum` at beta = 4, up to
    constants that move no minimum. The paper takes a fixed number of gradient steps; ours runs to convergence.

    Args:
        num_prototypes: P >= 2.
        dim: D >= 2.
        generator: of the random start.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: a size that no construction takes.

    Examples:
        >>> uniform_points(20, 8, torch.Generator().manual_seed(0)).shape
        torch.Size([20, 8])

    References:
        Saadabadi et al., CVPR 2024, eq. 4 and 5; Wang and Isola, ICML 2020, section 4.1.2.
    """
    start = random_points(num_prototypes, dim, generator)
    return converge(lambda points: smooth_maximum(points, 4.0), start).float()
