"""Random orthonormal frames: closed forms are placed along no axis in particular."""

from __future__ import annotations

import torch
from torch import Tensor


def random_frame(dim: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """(dim, num_columns) orthonormal columns, uniformly distributed; a random rotation or reflection if square.

    Args:
        dim: D.
        num_columns: at most D.
        generator: on the CPU.

    Returns:
        (dim, num_columns) float64.

    Examples:
        >>> frame = random_frame(5, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(frame.T @ frame, torch.eye(3, dtype=torch.float64))
        True

    References:
        Mezzadri, How to generate random matrices from the classical compact groups, 2007, section 5.
    """
    gaussian = torch.randn(dim, num_columns, generator=generator, dtype=torch.float64, device="cpu")
    frame, triangle = torch.linalg.qr(gaussian)
    # Householder's QR picks the signs itself; a positive diagonal makes the factorisation, and the law, unique.
    return frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
