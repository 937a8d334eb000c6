"""Hooks that a user has put on a layer, when another one takes its place or when the layer itself is looked at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Where nn.Module keeps what runs around a forward or a backward pass.
TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hand_hooks_over(old: nn.Module, new: nn.Module) -> None:
    """Let the hooks of one module run around another.

    Both have the same tables afterwards, so that handles go on removing. Where torch.nn.utils computes the old weight
    in a hook, which is no business of the new module, that table is a copy without it.
    """
    for table in TABLES:
        hooks = getattr(old, table)
        setattr(new, table, hooks if not _of_torch(hooks) else _others(hooks))
    new._is_full_backward_hook = old._is_full_backward_hook


def drop_hooks(module: nn.Module) -> None:
    """Take all hooks off a module but those by which torch.nn.utils computes its weight."""
    for table in TABLES:
        setattr(module, table, _of_torch(getattr(module, table)))


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The module by itself: no hook runs but those by which torch.nn.utils computes its weight.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_forward_hook(lambda *_: print("called"))
        >>> with without_hooks(layer):
        ...     _ = layer(torch.zeros(1, 2))
    """
    before = {table: getattr(module, table) for table in TABLES}
    drop_hooks(module)
    try:
        yield
    finally:
        for table, hooks in before.items():
            setattr(module, table, hooks)


def _of_torch(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils"))


def _others(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    own = _of_torch(hooks)
    return OrderedDict((key, hook) for key, hook in hooks.items() if key not in own)
