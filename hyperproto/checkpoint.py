"""The format of what this library writes into a `state_dict`, and whether it can be read.

A buffer carries the version of the format rather than torch's metadata, which safetensors and
torch.distributed.checkpoint drop.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperproto.errors import CheckpointError

#: To be raised whenever entries of a `state_dict` change their name or their meaning.
FORMAT_VERSION = 1

KEY = "format_version"


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
