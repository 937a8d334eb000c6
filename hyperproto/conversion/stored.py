"""A `state_dict` from wherever it is kept: nothing is unpickled, and nothing is believed before its size is known."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperproto.arguments import shown
from hyperproto.checkpoint import prefix_of
from hyperproto.errors import ArgumentError, CheckpointError

State: TypeAlias = Mapping[str, Tensor]

#: Files that a folder may keep its weights in, the first one there being read.
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth")

#: What DistributedDataParallel and torch.compile put in front of every name.
WRAPPED = ("module.", "_orig_mod.")

#: What a head has in every checkpoint of any format.
OF_A_HEAD = ("assignment", "logit_scale")


def read_state(state_or_path: State | str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a converted model by name, on the CPU where they come from a file; nothing is copied.

    Args:
        state_or_path: a `state_dict`; a file written by `torch.save` or safetensors; or a folder with one. Where the
            `state_dict` is an entry of a checkpoint beside others (an assigner's, an optimiser's), it is found by the
            heads in it.

    Raises:
        ArgumentError: none of these.
        CheckpointError: a file that cannot be read or would have to be unpickled, one without a head or with several
            models, or entries that claim to be larger than what there is of them.

    Examples:
        >>> from torch import nn
        >>> from hyperproto import convert_model
        >>> model = convert_model(nn.Sequential(nn.Linear(16, 4)), dim=2, classifier="0")
        >>> sorted(read_state({"model": model.state_dict(), "epoch": 3}))[:2]
        ['0.assignment', '0.assignment_record']
    """
    if isinstance(state_or_path, str | os.PathLike):
        path = _file_in(Path(state_or_path))
        loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        where = f"{path.name}"
    else:
        loaded, where = state_or_path, "the state_dict"
    if not isinstance(loaded, Mapping):
        raise ArgumentError(
            f"expected a state_dict, or the path of a file or folder with one, got {shown(loaded)}. Of a model pass "
            "model.state_dict()."
        )
    state = _with_heads(loaded, where)
    for prefix in WRAPPED * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    heads = tuple(map(prefix_of, head_names(state)))
    for name, value in state.items():
        if name.startswith(heads):
            _check_size(name, value)
    return state


def head_names(state: Mapping[str, Any]) -> list[str]:
    """Dotted names of the heads that the entries of a `state_dict` belong to.

    Examples:
        >>> head_names({"fc.assignment": 0, "fc.logit_scale": 0, "conv.weight": 0})
        ['fc']
    """
    first, *others = OF_A_HEAD
    ends = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
    return [end.removesuffix(".") for end in ends if all(end + other in state for other in others)]


def _file_in(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise CheckpointError(
                f"expected one of {', '.join(IN_FOLDERS)} in the folder {path.name}, got none of them. Pass the file."
            )
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"expected a file or a folder, and there is none at {path}.")
    return path


def _read_safetensors(path: Path) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(f"{path.name} is read by the package safetensors. pip install safetensors.") from error
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}. It is damaged, or no safetensors file.") from error


def _read_torch(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"expected {path.name} to be a file of torch.save as it is since torch 1.6, which can be read without "
            "being believed, got something else. Load it where you trust it, and save it anew."
        )
    try:
        # Mapped into memory: nothing is read before it is asked for, whatever the file says of its size.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read without running what it says, or is damaged ({type(error).__name__}). Where "
            "you trust it, pass the state_dict of what torch.load(path, weights_only=False) returns."
        ) from error


def _with_heads(loaded: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The one `state_dict` with heads: the mapping itself, or one of its entries."""
    if head_names(_tensors_of(loaded)):
        return _tensors_of(loaded)
    inside = {name: _tensors_of(each) for name, each in loaded.items() if isinstance(each, Mapping)}
    found = {name: state for name, state in inside.items() if head_names(state)}
    if len(found) > 1:
        names = ", ".join(map(repr, found))
        raise CheckpointError(f"{where} has several converted models, {names}. Pass the state_dict of one of them.")
    if not found:
        raise CheckpointError(
            f"expected {where} to have the entries of a HypersphericalHead (NAME.assignment, NAME.logit_scale), got "
            f"{len(loaded)} others. A plain model's checkpoint is loaded before the model is converted."
        )
    [state] = found.values()
    return state


def _tensors_of(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The mapping where all of it are tensors by name, else nothing."""
    fits = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in mapping.items())
    return dict(mapping) if fits else {}


def _check_size(name: str, value: Tensor) -> None:
    """Raise unless a tensor is dense and as large as it says."""
    if value.is_meta:
        raise CheckpointError(f"the checkpoint's {name} has no values (device meta). Save the model when it has some.")
    plain = value.layout == torch.strided and not value.is_quantized
    if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise CheckpointError(
            f"the checkpoint's {name} of shape {tuple(value.shape)} is not all there: its entries are one number many "
            "times over, or it is sparse. Save what model.state_dict() returns."
        )
