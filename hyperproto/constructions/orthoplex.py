"""Between D + 2 and 2D prototypes: orthogonal simplices; at 2D the cross-polytope (orthoplex)."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._check import check_size
from hyperproto.constructions._rotation import random_frame
from hyperproto.constructions.simplex import regular_simplex
from hyperproto.errors import BankError


def orthoplex_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Randomly rotated vertices of regular simplices in P - D orthogonal subspaces; no cosine is above zero.

    A simplex of d + 1 points fills d dimensions, so P - D of them hold P points in D dimensions. Subspaces differ
    by at most one in dimension, which keeps the cosines within a block as negative as they can all be. At P = 2D
    every block is a line, and the points are those of the cross-polytope, $\pm e_i$.

    Args:
        num_prototypes: P in [D + 2, 2D].
        dim: D >= 2.
        generator: of the rotation.

    Returns:
        (P, D) float32 unit rows; rows of one block are neighbours.

    Raises:
        BankError: P outside this range, or a size that no construction takes.

    Examples:
        >>> points = orthoplex_points(6, 3, torch.Generator().manual_seed(0))
        >>> (points @ points.T).round().int()[0].abs().tolist()  # itself, its opposite, and right angles
        [1, 1, 0, 0, 0, 0]

    References:
        Rankin 1955 (largest cosine 0 is optimal).
    """
    check_size(num_prototypes, dim)
    if not dim + 1 < num_prototypes <= 2 * dim:
        raise BankError(
            f"an orthoplex in dimension {dim} has {dim + 2} to {2 * dim} prototypes, got "
            f'num_prototypes={num_prototypes}. Use method="auto", which takes any number.'
        )
    num_blocks = num_prototypes - dim
    block_dim, num_larger = divmod(dim, num_blocks)
    larger = _repeat_block(regular_simplex(block_dim + 2), num_larger)
    smaller = _repeat_block(regular_simplex(block_dim + 1), num_blocks - num_larger)
    blocks = torch.zeros(num_prototypes, dim, dtype=torch.float64, device="cpu")
    blocks[: larger.shape[0], : larger.shape[1]] = larger
    blocks[larger.shape[0] :, larger.shape[1] :] = smaller
    return (blocks @ random_frame(dim, dim, generator)).float()


def _repeat_block(block: Tensor, times: int) -> Tensor:
    """Block-diagonal matrix of `times` copies, none if zero."""
    return torch.kron(torch.eye(times, dtype=torch.float64, device="cpu"), block)
