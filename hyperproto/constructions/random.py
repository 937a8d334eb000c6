"""Independent directions: no optimisation, for comparison and for more prototypes than can be optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.constructions._check import check_size
from hyperproto.sphere import normalise


def random_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Uniformly distributed directions: normalised Gaussian vectors.

    Cosines have a standard deviation of $1 / \sqrt{D}$; the largest of P^2 / 2 is near
    $2 \sqrt{\log P / D}$.

    Args:
        num_prototypes: P >= 2.
        dim: D >= 2.
        generator: on the CPU.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: a size that no construction takes.

    Examples:
        >>> random_points(1000, 16, torch.Generator().manual_seed(0)).shape
        torch.Size([1000, 16])
    """
    check_size(num_prototypes, dim)
    return normalise(torch.randn(num_prototypes, dim, generator=generator, dtype=torch.float32, device="cpu"))
