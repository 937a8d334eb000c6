"""What prototypes of a bank have to be: rows of length 1, of one shape and dtype, and no two the same."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import BankError

#: Largest difference of an entry between prototypes that count as the same: what other machines' rounding makes of one
#: construction, and far below what separates two.
SAME_PROTOTYPES = 1e-4
#: How far from 1 the length of a row may be: averages over buffers move prototypes by their rounding.
UNIT_LENGTH = 1e-3
#: Distance of two rows below which they are one direction, normalised from two lengths.
SAME_DIRECTION = 1e-6


def has_values(prototypes: Tensor) -> bool:
    """Whether a bank's prototypes are there: not on the device "meta", and loaded since `to_empty` made them NaN."""
    return not (prototypes.is_meta or bool(prototypes[0].isnan().any()))


def check_unit_rows(got: Tensor, name: str) -> None:
    """Raise BankError unless the rows of a checkpoint's entry have length 1; on the device "meta" nothing tells."""
    if got.is_meta:
        return
    error = float((got.norm(dim=1) - 1.0).abs().max())
    if not error <= UNIT_LENGTH:
        raise BankError(
            f"the checkpoint's {name} has rows that are no prototypes: one has a length that is off 1 by {error:.2g}. "
            "The entry was cast, averaged or damaged; take prototypes from the bank itself, or from another checkpoint."
        )


def equal_rows(rows: Tensor) -> list[tuple[int, int]]:
    """Pairs of unit rows (P, D) of one direction, each row but one of a set of equal ones; O(P D + P log P)."""
    rows = rows.cpu().double()
    direction = torch.randn(rows.shape[1], generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    # Equal rows are neighbours in any direction, nearly equal ones in a random one: hardly any other comes between.
    order = (rows @ direction.double()).argsort()
    distances = (rows[order[1:]] - rows[order[:-1]]).norm(dim=1)
    places = torch.nonzero(distances < SAME_DIRECTION).flatten()
    pairs = torch.stack([order[places], order[places + 1]], dim=1).sort(dim=1).values
    return sorted((first, second) for first, second in pairs.tolist())


def check_kind(expected: Tensor, got: Tensor, name: str) -> None:
    """Raise BankError unless a checkpoint's entry has the shape and dtype expected."""
    if got.shape != expected.shape:
        raise BankError(
            f"the checkpoint's {name} has shape {tuple(got.shape)}, this head expects {tuple(expected.shape)} (number "
            "of prototypes, dimension). Convert the model with the checkpoint's dim and bank before loading."
        )
    if got.dtype != expected.dtype:
        raise BankError(
            f"the checkpoint's {name} has dtype {got.dtype}, prototypes are {expected.dtype} in every model. Leave "
            "them out when a checkpoint is cast; or, if the bank was built as this head's, put them back: "
            f'checkpoint["{name}"] = head.bank.prototypes.'
        )


def check_same_prototypes(expected: Tensor, got: Tensor, name: str) -> None:
    """Raise unless a checkpoint's prototypes are those expected; where these have no values, any.

    Raises:
        BankError: other values.
    """
    if got.is_meta or not has_values(expected):
        return
    difference = float((got.to(expected.device) - expected).abs().max())
    if not difference <= SAME_PROTOTYPES:
        raise BankError(
            f"the checkpoint's {name} holds other prototypes than this head, and no assignment: entries differ by up "
            f"to {difference:.2g}. Which label each stands for is in the key `assignment` beside it: load both, or "
            "neither."
        )
