"""Checkpoints into converted models: all that can be refused is refused before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hyperproto.checkpoint import loading_under_way, prefix_of
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
        head.check_checkpoint(state_dict, prefix + prefix_of(name))
    root, whole = loading_under_way() or (model, state_dict)
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, RunningMeans):
            module.check_checkpoint(whole, prefix_of(name))
