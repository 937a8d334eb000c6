"""Checkpoints into converted models: all that can be refused is refused before anything is copied."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hyperproto.heads import get_heads
from hyperproto.running_means import RunningMeans


def guard_loading(model: nn.Module) -> RemovableHandle:
    """Let `load_state_dict` of the model, also from within a wrapper, ask every head before it copies anything.

    A head that refuses a checkpoint by itself does so when the layers before it are loaded already. An assigner that
    is loaded together with the model, as part of one module, is asked as well.

    Returns:
        What takes the check off again.
    """
    return model.register_load_state_dict_pre_hook(_check_parts)  # type: ignore[no-untyped-call]


# On module level, so that converted models can be pickled.
def _check_parts(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    for name, head in get_heads(model).items():
        head.check_checkpoint(state_dict, f"{prefix}{name}.")
    root, whole = _under_way(model, state_dict)
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, RunningMeans):
            module.check_checkpoint(whole, f"{name}.")


def _under_way(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The module that is being loaded, and all of what it was given.

    torch hands a module within it its own entries alone, in order; what stands beside the model is only known by who
    asked. Where nobody has called `load_state_dict`, this is the model itself.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return frame.f_locals["self"], frame.f_locals["state_dict"]
        frame = frame.f_back
    return model, state_dict
