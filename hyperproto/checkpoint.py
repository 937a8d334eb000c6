"""The format of what this library writes into a `state_dict`, and whether it can be read.

A buffer carries the version of the format rather than torch's metadata, which safetensors and
torch.distributed.checkpoint drop. For a head it also counts how often labels were given their prototypes: the low 32
bits are the version, those above them the count, and no average keeps both.
"""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.errors import CheckpointError

#: To be raised whenever entries of a `state_dict` change their name or their meaning.
#: 2: heads have `assignment_record`.
FORMAT_VERSION = 2

KEY = "format_version"

#: What the count is of, and what no version reaches: an average of two buffers may have any low half above.
COUNTED_IN, SMALLEST_NO_VERSION = 2**32, 256


def prefix_of(name: str) -> str:
    """What the entries of a module begin with in the `state_dict` of the model that has it by this dotted name.

    Examples:
        >>> prefix_of("head.fc"), prefix_of("")
        ('head.fc.', '')
    """
    return f"{name}." if name else ""


def format_version(count: int = 0) -> Tensor:
    """The buffer `format_version` of a module: () int64.

    Examples:
        >>> format_version()
        tensor(2)
    """
    return torch.tensor(FORMAT_VERSION + count * COUNTED_IN, dtype=torch.int64, device="cpu")


def count_in(stamp: Tensor) -> int | None:
    """The count of a buffer `format_version` of the present format; None if it is no such number, as in averages.

    Examples:
        >>> count_in(format_version(7)), count_in((0.9 * format_version(7)).long())
        (7, None)
    """
    count, version = divmod(int(stamp), COUNTED_IN)
    return count if version == FORMAT_VERSION and count > 0 else None


def check_format(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise if what a `state_dict` holds under a prefix was written by a later version of this library.

    Raises:
        CheckpointError: it was.
    """
    found = state_dict.get(prefix + KEY)
    if found is None or found.is_meta or found.is_floating_point():  # an average, whose low bits say nothing
        return
    count, version = divmod(int(found), COUNTED_IN)
    if version > FORMAT_VERSION and (count == 0 or version < SMALLEST_NO_VERSION):
        raise CheckpointError(
            f"the checkpoint's {prefix}{KEY} is {version}, and this version of hyperproto reads formats up to "
            f"{FORMAT_VERSION}. Update hyperproto to load it."
        )


def stamp_format_(state_dict: dict[str, Any], prefix: str, count: int = 0) -> None:
    """Let what a `state_dict` holds under a prefix say the present version, in place; nothing if it holds nothing.

    A module that loads an older format, or one from before there were versions, has the present one from then on.
    """
    for name, value in state_dict.items():
        if name.startswith(prefix):
            state_dict[prefix + KEY] = format_version(count).to(value.device)
            break


def is_same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are views of one piece of memory; on the device "meta", of what stands for it.

    Examples:
        >>> numbers = torch.ones(3)
        >>> is_same_memory(numbers.detach(), numbers), is_same_memory(numbers.clone(), numbers)
        (True, False)
    """
    if first.shape != second.shape or first.device != second.device:
        return False
    try:
        return first.untyped_storage()._cdata == second.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # within transforms of torch.func, and some classes of tensors
        return first is second


def loading_under_way() -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The module that is being loaded, and all of what it was given; None where nobody has called `load_state_dict`.

    torch hands a module within it its own entries alone, in order; what stands beside them is only known by who asked.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return frame.f_locals["self"], frame.f_locals["state_dict"]
        frame = frame.f_back
    return None
