"""Train and eval mode, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and each as it was afterwards.

    Examples:
        >>> model = nn.Sequential(nn.Dropout())
        >>> with eval_mode(model):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
