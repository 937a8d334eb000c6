"""What a `state_dict` must hold for a module of this library to load it: a format that is known, the same prototypes.

A buffer carries the version of the format rather than torch's metadata, which safetensors and
torch.distributed.checkpoint drop.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperproto.errors import BankError, CheckpointError

#: To be raised whenever entries of a `state_dict` change their name or their meaning.
FORMAT_VERSION = 1

KEY = "format_version"

#: Largest difference of an entry between prototypes that count as the same: what other machines' rounding makes of one
#: construction, and far below what separates two.
SAME_PROTOTYPES = 1e-4


def format_version() -> Tensor:
    """The buffer `format_version` of a module: () int64.

    Examples:
        >>> format_version()
        tensor(1)
    """
    return torch.tensor(FORMAT_VERSION, dtype=torch.int64, device="cpu")


def check_format(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise if what a `state_dict` holds under a prefix was written by a later version of this library.

    Raises:
        CheckpointError: it was.
    """
    found = state_dict.get(prefix + KEY)
    if found is not None and not found.is_meta and int(found) > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint's {prefix}{KEY} is {int(found)}, and this version of hyperproto reads formats up to "
            f"{FORMAT_VERSION}. Update hyperproto to load it."
        )


def stamp_format_(state_dict: dict[str, Any], prefix: str) -> None:
    """Let what a `state_dict` holds under a prefix say the present version, in place; nothing if it holds nothing.

    A module that loads an older format, or one from before there were versions, has the present one from then on.
    """
    for name, value in state_dict.items():
        if name.startswith(prefix):
            state_dict[prefix + KEY] = format_version().to(value.device)
            break


def check_same_prototypes(expected: Tensor, got: Tensor, name: str) -> None:
    """Raise unless a checkpoint's prototypes are those of the head that loads them.

    Args:
        expected: (P, D), the head's. Without values (on the device "meta", or NaN after `to_empty`) it takes any of its
            shape.
        got: the checkpoint's.
        name: its name there, for the message.

    Raises:
        BankError: another shape or dtype, or other values.
    """
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
    if got.is_meta or expected.is_meta or expected.isnan().any():
        return
    difference = float((got.to(expected.device) - expected).abs().max())
    if not difference <= SAME_PROTOTYPES:
        raise BankError(
            f"the checkpoint's {name} holds other prototypes than this head: entries differ by up to {difference:.2g}. "
            "Build the head with the same method and seed, or with the checkpoint's own prototypes: "
            f'bank=PrototypeBank.from_tensor(checkpoint["{name}"]).'
        )
