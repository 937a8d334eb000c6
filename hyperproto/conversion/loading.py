"""Checkpoints into converted models: all that the heads can refuse is refused before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hyperproto.heads import get_heads


def guard_loading(model: nn.Module) -> RemovableHandle:
    """Let `load_state_dict` of the model, also from within a wrapper, ask every head before it copies anything.

    A head that refuses a checkpoint by itself does so when the layers before it are loaded already.

    Returns:
        What takes the check off again.
    """
    return model.register_load_state_dict_pre_hook(_check_heads)  # type: ignore[no-untyped-call]


# On module level, so that converted models can be pickled.
def _check_heads(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    for name, head in get_heads(model).items():
        head.check_checkpoint(state_dict, f"{prefix}{name}.")
