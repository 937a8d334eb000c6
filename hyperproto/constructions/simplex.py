"""The regular simplex: up to D + 1 prototypes, all pairs alike and as far apart as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._check import check_size
from hyperproto.constructions._rotation import random_frame
from hyperproto.errors import BankError


def simplex_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Vertices of a randomly rotated regular simplex, also called equiangular tight frame (ETF).

    $$ \langle w_i, w_j \rangle = -\frac{1}{P - 1}, \quad i \neq j $$

    Args:
        num_prototypes: P in [2, D + 1].
        dim: D >= 2.
        generator: of the rotation.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: more than D + 1 prototypes, or a size that no construction takes.

    Examples:
        >>> points = simplex_points(4, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(points @ points.T, (4 * torch.eye(4) - 1) / 3, atol=1e-6)
        True

    References:
        Yang et al., NeurIPS 2022, definition 1 (ETF classifier); Kasarla et al., NeurIPS 2022, who build the same
        matrix recursively; Rankin 1955 (optimality).
    """
    check_size(num_prototypes, dim)
    if num_prototypes > dim + 1:
        raise BankError(
            f"a simplex in dimension {dim} has at most {dim + 1} vertices, got num_prototypes={num_prototypes}. "
            f'Use dim >= {num_prototypes - 1}, or method="auto".'
        )
    frame = random_frame(dim, num_prototypes - 1, generator)
    return (regular_simplex(num_prototypes) @ frame.T).float()


def regular_simplex(num_points: int) -> Tensor:
    r"""Unit vertices of the regular simplex in as few dimensions as it needs: scaled rows of Helmert's matrix.

    Column k is orthogonal to the vector of ones and to the columns before it,

    $$ h_k \propto (\underbrace{1, \dots, 1}_{k}, -k, 0, \dots, 0), \quad k = 1, \dots, P - 1, $$

    so that with unit columns $H H^\top = I - 11^\top / P$: a simplex, up to the length of the rows.

    Args:
        num_points: P >= 2.

    Returns:
        (P, P - 1) float64.

    Examples:
        >>> regular_simplex(2).float().flatten().tolist()
        [1.0, -1.0]
    """
    k = torch.arange(1, num_points, dtype=torch.float64, device="cpu")
    ones = torch.ones(num_points, num_points - 1, dtype=torch.float64, device="cpu")
    columns = ones.triu() - torch.diag(k, -1)[:, :-1]  # (P, P - 1)
    scale = (num_points / (num_points - 1)) ** 0.5
    return scale * columns / (k * (k + 1)).sqrt()
