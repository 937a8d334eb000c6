"""Whether a head is still where a function of this library put it."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from hyperproto.adapted import set_aside, set_aside_message
from hyperproto.errors import HeadNotFoundError


class Placement:
    """The model and the name under which a head was put into it, if any, until it is taken out.

    Attributes:
        taken_out: whether something took the head out of its model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> placement = Placement()
        >>> placement.put_into(model, "0")
        >>> placement.check(model[0])
    """

    def __init__(self) -> None:
        self.taken_out = False
        self._model: weakref.ref[nn.Module] | None = None
        self._name = ""

    def put_into(self, model: nn.Module, name: str) -> None:
        """Remember that the head is the module of this name now."""
        self._model, self._name = weakref.ref(model), name

    def check(self, head: nn.Module) -> None:
        """Raise if the head was taken out of its model, or something else is called instead of it.

        By this library, by a layer that a user put in its place, or by an adapter.

        Raises:
            HeadNotFoundError: it was.
        """
        if self.taken_out:
            raise HeadNotFoundError(
                "this HypersphericalHead is no longer part of its model: restore_model, to_linear, compress_head or "
                "the model's reset_classifier took it out. If the model has no other one, call "
                "hyperproto.convert_model(model, ...) again; then make a new assigner, criterion and optimizer."
            )
        model = None if self._model is None or torch.compiler.is_compiling() else self._model()
        if model is None:
            return
        path = _path(model, self._name)
        if path[-1] is not head:
            moved_to = next((name for name, module in model.named_modules() if module is head), None)
            if moved_to is not None:
                self._name = moved_to
                path = _path(model, moved_to)
        layer = path[-1]
        if layer is head:
            if any(part is each for outer, part in itertools.pairwise(path) for each in set_aside(outer)):
                raise HeadNotFoundError(set_aside_message(type(model).__name__))
        elif layer is not None and next(layer.parameters(), None) is not None:  # else a backbone, the head behind it
            raise HeadNotFoundError(
                f"expected this HypersphericalHead at {self._name!r} of {type(model).__name__}, where a "
                f"{type(layer).__name__} is now: its outputs are no cosines with this head's prototypes. Put the head "
                "back, or convert the model again (hyperproto.convert_model) and make a new assigner, criterion and "
                "optimizer."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not the module at that place, and a weak reference cannot be pickled.
        return {**self.__dict__, "_model": None}


def _path(model: nn.Module, name: str) -> list[Any]:
    """The modules from a model to the one of this name; from where there is none they are None."""
    path: list[Any] = [model]
    for part in name.split("."):
        path.append(None if path[-1] is None else path[-1]._modules.get(part))
    return path
