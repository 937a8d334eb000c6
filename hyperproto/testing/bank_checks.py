"""What makes a bank of prototypes valid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperproto.bank import PrototypeBank
from hyperproto.testing.requirements import require, require_values

#: Prototypes nearer than this are taken for equal: on one of them the logits of both differ by 5e-7 of the scale.
SMALLEST_DISTANCE = 1e-3


def check_bank(bank: PrototypeBank | Tensor) -> None:
    """Raise AssertionError unless the prototypes are distinct finite float32 unit rows that nothing trains.

    Args:
        bank: a bank, or its prototypes (P, D).

    Examples:
        >>> check_bank(torch.eye(3))
        >>> check_bank(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        Traceback (most recent call last):
        AssertionError: prototypes must differ: rows 0 and 2 are equal
    """
    prototypes = getattr(bank, "prototypes", None) if isinstance(bank, nn.Module) else bank
    if not isinstance(prototypes, Tensor):
        raise AssertionError(
            f"expected a PrototypeBank or prototypes as a tensor of shape (P, D), got {type(bank).__name__}"
        )
    _check_matrix(prototypes)
    if isinstance(bank, nn.Module):
        _check_module(bank, prototypes)
    require(not prototypes.requires_grad, "prototypes must not train, these require a gradient")
    rows = prototypes.detach().cpu().double()
    _check_unit_rows(rows)
    _check_distinct(rows)


def _check_matrix(prototypes: Tensor) -> None:
    shape = tuple(prototypes.shape)
    require(len(shape) == 2 and min(shape) >= 2, f"prototypes must have shape (P, D), P >= 2 and D >= 2, not {shape}")
    require(prototypes.dtype == torch.float32, f"prototypes must be float32, got {prototypes.dtype}")
    require_values(prototypes, "prototypes")


def _check_module(bank: nn.Module, prototypes: Tensor) -> None:
    trained = [name for name, _ in bank.named_parameters()]
    require(not trained, f"prototypes must not train, but the bank has parameters: {trained}")
    buffers = bank.state_dict(keep_vars=True)
    require(buffers.get("prototypes") is prototypes, "prototypes must be a buffer, so that a checkpoint holds them")
    if isinstance(bank, PrototypeBank):
        shape = tuple(prototypes.shape)
        says = (bank.num_prototypes, bank.dim)
        require(shape == says, f"prototypes have shape {shape}, the bank says {says}")


def _check_unit_rows(rows: Tensor) -> None:
    wrong = torch.nonzero(~torch.isfinite(rows).all(dim=1)).flatten()[:5].tolist()
    require(not wrong, f"prototypes must be finite; rows {wrong} are not")
    errors = (rows.norm(dim=1) - 1.0).abs()
    worst = int(errors.argmax())
    require(bool(errors[worst] < 1e-6), f"prototypes must have length 1, row {worst} is off by {errors[worst]:.2e}")


def _check_distinct(rows: Tensor) -> None:
    from scipy.spatial import cKDTree

    points = rows.numpy()
    # Of each point itself and the nearest other one; infinity where there is none so near.
    distances, places = cKDTree(points).query(points, k=2, distance_upper_bound=SMALLEST_DISTANCE)
    shared = (distances[:, 1] < SMALLEST_DISTANCE).nonzero()[0]
    if len(shared) == 0:
        return
    first = int(shared[0])
    other = int(next(place for place in places[first] if place != first))
    distance = float((rows[first] - rows[other]).norm())
    how = "are equal" if distance == 0.0 else f"are only {distance:.1e} apart"
    raise AssertionError(f"prototypes must differ: rows {first} and {other} {how}")
