"""What all checks are written with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.errors import HeadNotFoundError
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads

#: Largest difference that counts as rounding, as a share of the largest value compared.
ROUNDING = 3e-4


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds; what `assert` does, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def require_values(tensor: Tensor, name: str) -> None:
    """Raise AssertionError unless a tensor is dense and not on the device "meta"."""
    has_values = tensor.layout == torch.strided and not tensor.is_meta
    require(has_values, f"{name} must have values in a dense tensor, not {tensor.layout} on {tensor.device}")


def is_close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are equal but for rounding; NaN is close to nothing."""
    first, second = first.detach().double(), second.detach().double()
    if first.shape != second.shape:
        return False
    if first.numel() == 0:
        return True
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return bool(((first - second).abs() <= ROUNDING * largest).all())


def unit_rows(num_rows: int, dim: int, seed: int) -> Tensor:
    """(N, D) float32 rows in random directions, on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return F.normalize(torch.randn(num_rows, dim, generator=generator, device="cpu", dtype=torch.float32))


def heads_of(model: nn.Module) -> dict[str, HypersphericalHead]:
    """The model's heads by name, at least one.

    Raises:
        HeadNotFoundError: there is none.
    """
    heads = get_heads(model)
    if not heads:
        raise HeadNotFoundError(
            f"expected a model with a HypersphericalHead, or the head itself, got {type(model).__name__} without one. "
            "Call hyperproto.convert_model(model, ...) first."
        )
    return heads
