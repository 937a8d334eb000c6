"""Layers that an adapter has copied: which of the copies is called."""

from __future__ import annotations

from typing import Any

from torch import nn


def set_aside(layer: nn.Module) -> list[nn.Module]:
    """What a layer holds and does not call now; empty for all layers but those of PEFT's `modules_to_save`.

    These keep the module that they were made of beside a copy for each adapter, and call one of them: it changes with
    `set_adapter` and `disable_adapter`.
    """
    parts = layer._modules
    original, copies = parts.get("original_module"), parts.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return []
    wrapper: Any = layer
    active = wrapper.active_adapters
    is_adapted = bool(active) and not wrapper.disable_adapters and all(name in copies for name in active)
    called = copies[active[0]] if is_adapted else original
    return [each for each in (original, *copies.values()) if each is not called]


def set_aside_message(model: str) -> str:
    """What is said of a head that its model, of this class, keeps and does not call."""
    return (
        f"this head is kept beside a copy of it that the {model} calls instead (PEFT's modules_to_save). Make assigner "
        "and criterion of the model as it trains: after get_peft_model, and anew after set_adapter."
    )
