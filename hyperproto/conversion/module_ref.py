"""A module held weakly, by what the module itself holds: a converted model is freed when it is no longer used."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn


class ModuleRef:
    """A weak reference that copies and pickles as the module does, so that a copy of a model refers to its own parts.

    Examples:
        >>> module = nn.Linear(2, 2)
        >>> ModuleRef(module)() is module
        True
    """

    def __init__(self, module: nn.Module) -> None:
        self._target = weakref.ref(module)

    def __call__(self) -> nn.Module:
        """The module, which whatever holds this reference is part of."""
        module = self._target()
        if module is None:
            raise ReferenceError("the module that this refers to is gone.")
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRef:
        return ModuleRef(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[type[ModuleRef], tuple[nn.Module]]:
        return ModuleRef, (self(),)
