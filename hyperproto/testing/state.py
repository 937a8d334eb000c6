"""What a loss must leave alone: state of modules, and what is global."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, object]


def state_of(modules: Mapping[str, nn.Module]) -> State:
    """Copies of all parameters and buffers, and public settings such as `training`, by dotted name."""
    state: State = {}
    for prefix, root in modules.items():
        for path, module in root.named_modules(prefix=prefix):
            for name, setting in vars(module).items():
                if not name.startswith("_") and isinstance(setting, bool | int | float | str):
                    state[f"{path}.{name}"] = setting
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                state[f"{path}.{name}"] = tensor.detach().clone()
                state[f"{path}.{name}.requires_grad"] = tensor.requires_grad
    return state


def changed(before: State, after: State) -> list[str]:
    """Names whose values differ, bit for bit, or that came or went."""
    names = sorted(before.keys() | after.keys())
    return [name for name in names if not _same(before.get(name), after.get(name))]


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
            return False
        equal = first == second
        return bool((equal | (first.isnan() & second.isnan()) if first.is_floating_point() else equal).all())
    return type(first) is type(second) and first == second


def global_state() -> dict[str, object]:
    """What is global to the process, and none of a loss's business."""
    return {
        "torch's global random state": torch.get_rng_state(),
        "NumPy's global random state": pickle.dumps(np.random.get_state()),
        "Python's global random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "whether gradients are on": torch.is_grad_enabled(),
    }


@contextmanager
def everything_kept(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give back global and the modules' state as it was, whatever happens within; gradients are on there."""
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype = torch.get_default_dtype()
    before = {
        name: (tensor, tensor.detach().clone())
        for prefix, root in modules.items()
        for name, tensor in (*root.named_parameters(prefix=prefix), *root.named_buffers(prefix=prefix))
    }
    modes = [(module, module.training) for root in modules.values() for module in root.modules()]
    # Away from what a seed has just set, so that a loss which sets the same seed shows too.
    torch.rand((), device="cpu"), np.random.random(), random.random()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        torch.set_default_dtype(dtype)
        with torch.no_grad():
            for tensor, old in before.values():
                if not _same(tensor.detach(), old):
                    tensor.copy_(old)
        for module, training in modes:
            module.training = training
