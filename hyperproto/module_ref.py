"""A module held weakly, by what it holds itself or what was made for it: it is freed when it is no longer used."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class ModuleRef:
    """A weak reference that copies and pickles as the module does, so that a copy of a model refers to its own parts.

    Attributes:
        is_copy: whether it came with a copy or a pickle. A module that is gone then is one that nothing else was copied
            with.

    Examples:
        >>> module = nn.Linear(2, 2)
        >>> ModuleRef(module)() is module, copy.deepcopy(ModuleRef(module)).module
        (True, None)
    """

    def __init__(self, module: nn.Module | None, *, is_copy: bool = False) -> None:
        self._target: Callable[[], nn.Module | None] = _gone if module is None else weakref.ref(module)
        self.is_copy = is_copy and module is not None

    def __call__(self) -> nn.Module:
        """The module, which whatever holds this reference is part of."""
        module = self.module
        if module is None:
            raise ReferenceError("the module that this refers to is gone.")
        return module

    @property
    def module(self) -> nn.Module | None:
        """The module, or None if it is gone."""
        return self._target()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRef:
        return _copied(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Callable[[nn.Module | None], ModuleRef], tuple[nn.Module | None]]:
        return _copied, (self.module,)


def _copied(module: nn.Module | None) -> ModuleRef:
    return ModuleRef(module, is_copy=True)


def _gone() -> None:
    return None
