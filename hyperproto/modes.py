"""Modes that a model runs in: train and eval, put back as they were; and whether a graph is made of what runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode


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


def makes_graph() -> bool:
    """Whether a graph is being made of what runs (compiled, exported, traced): nothing can be decided by values then.

    Examples:
        >>> makes_graph()
        False
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None  # type: ignore[no-untyped-call]
