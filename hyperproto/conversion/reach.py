"""Whether what a head returns is what its model returns: told by the structure where that is plain, else by a run.

An activation, a scale, an adapter or a further layer behind the head would turn its cosines into something else, which
every loss would go on reading as cosines.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hyperproto.conversion.hooks import drop_hooks
from hyperproto.errors import HeadNotFoundError
from hyperproto.head import HypersphericalHead

#: Layers of torch that leave a convex combination of cosines one.
HARMLESS = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    _DropoutNd,
)

#: Packages whose model classes return what their classifier does.
LIBRARIES = ("timm", "torchvision", "transformers")

#: What a forward pass may raise on an input that was guessed.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)

#: Samples of a run: the same logits everywhere, some others, and those with the opposite sign.
SAMPLES = 3

#: Largest error of a logit of size 1 on its way through a model of half precision.
TOLERANCE = 0.02


def check_reach(model: nn.Module, heads: dict[str, HypersphericalHead], *, found: bool) -> None:
    """Raise unless the heads' outputs make the model's.

    A run is a forward pass in eval mode of a copy that shares the weights, on random inputs of a shape that the model's
    first layer takes. Where no such input can be made, and on the device "meta", only the structure tells.

    Args:
        model: with heads in place.
        heads: by their names in it.
        found: whether the model itself or its class told where they are.

    Raises:
        HeadNotFoundError: something stands between; says what, as far as it can be told.
    """
    plain = [_is_plain(model, name, found) for name in heads]
    if not all(plain):
        _check_by_running(model, heads)


def _is_plain(model: nn.Module, name: str, found: bool) -> bool:
    """Whether all modules around a head are known to hand its output on."""
    parts = name.split(".")
    plain = True
    for depth, part in enumerate(parts):
        outer = model.get_submodule(".".join(parts[:depth]))
        if type(outer).forward is nn.Sequential.forward and "forward" not in outer.__dict__:
            keys = list(outer._modules)
            behind = [outer.get_submodule(key) for key in keys[keys.index(part) + 1 :]]
            harmless = [_is_harmless(layer, model, name) for layer in behind]
            plain &= all(harmless)
        else:
            plain &= found and type(outer).__module__.partition(".")[0] in LIBRARIES
    return plain


def _is_harmless(behind: nn.Module, model: nn.Module, name: str) -> bool:
    layers = [layer for layer in behind.modules() if type(layer) is not nn.Sequential]
    for layer in layers:
        if type(layer).__module__.startswith("torch.nn.modules.") and not isinstance(layer, HARMLESS):
            raise HeadNotFoundError(
                f"expected {name!r} to be the last layer of {type(model).__name__}, but {type(layer).__name__} stands "
                "behind it, which would change the cosines of a head. Take it out of the model (losses of this library "
                'read cosines), or name the last layer: convert_model(model, classifier="dotted.name").'
            )
    return all(isinstance(layer, HARMLESS) for layer in layers)


class _Probe(nn.Module):
    """Stands for a head in a run; returns logits that tell what is done to them afterwards."""

    def __init__(self, head: HypersphericalHead, same: Tensor) -> None:
        super().__init__()
        self.same = same  # (C,)
        self.class_dim = head.class_dim
        self.called = False

    def forward(self, features: Tensor) -> Tensor:
        self.called = True
        leading = features.movedim(self.class_dim, -1).shape[:-1]
        logits = self.same.expand(*leading, -1).clone()
        if leading[0] == SAMPLES:
            generator = torch.Generator(device="cpu").manual_seed(1)
            logits[1] = torch.randn(logits[1].shape, generator=generator, device="cpu").to(logits)
            logits[2] = -logits[1]
        return logits.movedim(-1, self.class_dim)


@torch.no_grad()
def _check_by_running(model: nn.Module, heads: dict[str, HypersphericalHead]) -> None:
    reference = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if reference is None or any(parameter.is_meta for parameter in model.parameters()):
        return
    head = next(iter(heads.values()))
    generator = torch.Generator(device="cpu").manual_seed(0)
    same = torch.randn(head.num_classes, generator=generator, device="cpu").to(head.logit_scale)
    probes = {id(each): _Probe(head, same) for each in heads.values()}
    # What starts at zero, as adapters do, has to show.
    shared = {id(each): each if bool(each.any()) else _filled(each) for each in model.parameters()}
    try:
        twin = copy.deepcopy(model, {**shared, **probes}).eval()
    except FAILURES:
        return
    for module in twin.modules():
        drop_hooks(module)
    for inputs in _inputs(model, reference):
        output = _run(twin, inputs)
        if output is None:
            continue
        if all(probe.called for probe in probes.values()) and not any(
            _is_same(each, same) for each in _tensors(output)
        ):
            raise HeadNotFoundError(
                f"expected {type(model).__name__} to return what {', '.join(map(repr, heads))} returns, but something "
                "behind or beside it changes that: an activation, a scale, an adapter, another layer. A head's cosines "
                "have to come out as they are. Take that out of the model's forward, merge adapters, or name the layer "
                'whose output the model returns: convert_model(model, classifier="dotted.name").'
            )
        return


def _filled(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.full_like(parameter, 0.1), requires_grad=False)


def _run(model: nn.Module, inputs: Tensor) -> Any:
    """What the model returns; None where it takes no such input."""
    devices = [inputs.device.index] if inputs.is_cuda else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model(inputs)
        except FAILURES:
            return None


def _inputs(model: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """Random inputs (SAMPLES, ...) that the model may take, the likeliest first."""
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        configured = getattr(module, "pretrained_cfg", None)
        if isinstance(configured, Mapping) and configured.get("input_size"):
            shapes.append(tuple(configured["input_size"]))
        elif isinstance(module, nn.Embedding):
            yield torch.zeros(SAMPLES, 8, dtype=torch.int64, device=like.device)
        elif isinstance(module, nn.Conv2d):
            shapes += [(module.in_channels, size, size) for size in (32, 28, 224)]
        elif isinstance(module, nn.Conv1d):
            shapes.append((module.in_channels, 64))
        elif isinstance(module, nn.RNNBase):
            shapes.append((8, module.input_size))
        elif isinstance(module, nn.Linear):
            shapes.append((module.in_features,))
        else:
            continue
        break
    generator = torch.Generator(device="cpu").manual_seed(2)
    for shape in shapes:
        yield torch.randn(SAMPLES, *shape, generator=generator, device="cpu").to(like)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for part in output.values() for tensor in _tensors(part))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for part in output for tensor in _tensors(part))
    elif hasattr(output, "__dict__"):
        yield from (part for part in vars(output).values() if isinstance(part, Tensor))


def _is_same(output: Tensor, same: Tensor) -> bool:
    """Whether an output is a convex combination of what the probes returned."""
    for dim in {1, output.dim() - 1} if output.dim() > 1 else set[int]():
        if output.shape[dim] != len(same):
            continue
        logits = output.movedim(dim, -1).float()
        odd = len(logits) != SAMPLES or bool((logits[1] + logits[2]).abs().max() <= TOLERANCE * logits[1].abs().max())
        if odd and bool(((logits[0] - same).abs() <= TOLERANCE * same.abs().max()).all()):
            return True
    return False
