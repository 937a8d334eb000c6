"""What timm's adaptive gradient clipping leaves out: the last two parameters of a model, or its projections."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm.models
from torch import nn

from hyperproto.heads import get_heads


def spare_projections() -> None:
    """Let `--clip-mode agc` leave out all of a converted model's projections, and nothing of its backbone.

    timm takes the last two parameters of a model for weight and bias of its classifier. A projection has one or three.
    """
    modules: tuple[Any, ...] = (timm.models, timm.models._manipulate)
    for module in modules:
        module.model_parameters = _sparing(module.model_parameters, lambda model: model)
    if find_spec("timm.task"):  # where timm's own scripts ask, since it has tasks
        kinds: list[Any] = [kind for kind in vars(import_module("timm.task")).values() if inspect.isclass(kind)]
        for kind in kinds:
            if "get_clip_parameters" in vars(kind):
                kind.get_clip_parameters = _sparing(kind.get_clip_parameters, _trained_by)


def _trained_by(task: Any) -> nn.Module:
    return task.get_trainable_module()


def _sparing(
    plain: Callable[..., Iterable[nn.Parameter]], model_of: Callable[[Any], nn.Module]
) -> Callable[..., Iterable[nn.Parameter]]:
    @wraps(plain)
    def parameters(owner: Any, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        heads = get_heads(model_of(owner)).values() if exclude_head else ()
        own = {id(parameter) for head in heads for parameter in head.parameters()}
        if not own:
            return plain(owner, exclude_head)
        return [parameter for parameter in plain(owner, False) if id(parameter) not in own]

    return parameters
