"""Take hyperspherical heads out of a model and put back what was there."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from hyperproto.conversion.record import RECORD, get_record
from hyperproto.heads import get_heads
from hyperproto.module_ref import ModuleRef


def restore_model(model: nn.Module) -> nn.Module:
    """Put the original classifiers back, bit for bit, in place; returns the same model.

    Everything else that the conversion changed comes back too: `num_classes`, layers taken out or rebuilt. Where the
    model has moved to another device or dtype since, the original layers follow. Criteria and assigners bound to its
    heads raise from then on.

    Raises:
        HeadNotFoundError: the model was not converted by `convert_model`, or it is wrapped (DistributedDataParallel,
            torch.compile): pass the model inside.

    Examples:
        >>> from hyperproto import convert_model
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> linear = model[1]
        >>> restore_model(convert_model(model, dim=2, classifier="1"))[1] is linear
        True
    """
    record = get_record(model, "restore_model")
    heads = list(get_heads(model).values())
    record.undo()
    stay = list(get_heads(model).values())  # those that were put in by hand
    for head in heads:
        head.placement.taken_out = head not in stay
    if record.load_check is not None:
        record.load_check.remove()
    del model.__dict__[RECORD]
    return model


def guard_reset(model: Any) -> None:
    """Let timm's `reset_classifier` restore the model before it does its work; changes the instance only.

    Its new layers would take the heads' place unnoticed. What is bound to those heads raises from then on.
    """
    if hasattr(model, "reset_classifier"):
        model.reset_classifier = partial(_restore_and_reset, ModuleRef(model))


def _restore_and_reset(model: ModuleRef, *args: Any, **kwargs: Any) -> None:
    restore_model(model()).reset_classifier(*args, **kwargs)  # type: ignore[operator]
