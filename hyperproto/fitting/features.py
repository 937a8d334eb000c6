"""One pass over labelled data: the features that reach a model's heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import ArgumentError, HeadNotFoundError, ShapeError
from hyperproto.fitting.statistics import FeatureStatistics
from hyperproto.geometry import normalise
from hyperproto.head import HypersphericalHead
from hyperproto.modes import eval_mode
from hyperproto.projection import has_layers
from hyperproto.targets import check_target

#: Takes the number of a head, features (N, F) float32 that reach it, and the target (N,) or (N, C) of each on the CPU.
Consumer = Callable[[int, Tensor, Tensor], None]


@torch.no_grad()
def feed_features(
    model: nn.Module, heads: tuple[HypersphericalHead, ...], loader: Iterable[Any], consume: Consumer
) -> int:
    """Give `consume` what the model's heads project, batch by batch, in eval mode; the number of samples.

    Under torch.distributed the features of all ranks are those of one model: see `evaluating`.

    Raises:
        HeadNotFoundError: the model does not call all of its heads.
        LabelError, ShapeError: targets that do not fit.
    """
    device = heads[0].assignment.device
    model = unwrapped(model)
    num_samples = 0
    with captured_features(model, [head.projection for head in heads]) as captured:
        for inputs, target, *_ in loader:
            target = target.cpu()
            check_target(target, len(inputs), heads[0].num_classes)
            captured.clear()
            model(inputs.to(device))
            num_samples += len(target)
            for index, features in captured:
                consume(index, features, _target_of_rows(target, len(features)))
            if len(target) and len({index for index, _ in captured}) < len(heads):
                raise HeadNotFoundError(
                    f"{type(model).__name__} does not call all of its {len(heads)} heads in eval mode: "
                    "there are no features to fit them to. Pass the model whose forward pass ends in the head."
                )
    return num_samples


@contextmanager
def captured_features(model: nn.Module, projections: Sequence[nn.Module]) -> Iterator[list[tuple[int, Tensor]]]:
    """A list that the model's forward passes fill with what reaches each projection, by its number.

    In eval mode, and the same model on all ranks: see `evaluating`.
    """
    captured: list[tuple[int, Tensor]] = []

    def keep(index: int, projection: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # Without a projection it is directions that count.
        rows = arguments[0] if has_layers(projection) else normalise(arguments[0])
        captured.append((index, rows.float()))

    # At the projection, where features are rows (N, in_features) whatever the layout of the head.
    hooks = [each.register_forward_pre_hook(partial(keep, index)) for index, each in enumerate(projections)]
    try:
        # A compiled model would not see the hooks.
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; their modes and the global generator are as they were afterwards.

    Under torch.distributed all ranks get rank 0's buffers first, as in a forward pass of DistributedDataParallel: each
    has running statistics of its own since the last one, and would evaluate another model.
    """
    _share_buffers(model)
    # A loader draws its seed from the global generator.
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        yield


def add_up_ranks(tensors: list[Tensor], device: torch.device) -> None:
    """Sum each tensor over the ranks, in place and in one collective; they may lie on another device."""
    if not _has_ranks():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def add_up_statistics(head: HypersphericalHead, statistics: list[FeatureStatistics], num_samples: int) -> int:
    """Let each rank have the statistics of all; the number of samples on all ranks.

    Raises:
        ArgumentError: there are none.
    """
    samples = torch.tensor([num_samples], dtype=torch.float64, device="cpu")
    add_up_ranks([samples, *(tensor for each in statistics for tensor in each.tensors())], head.assignment.device)
    if float(samples) == 0.0:
        raise ArgumentError("the loader gave no samples: a head needs data to be fitted to.")
    return int(samples)


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks, but for assigners, whose means are of each rank's own data."""
    if not _has_ranks():
        return
    assigners = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DynamicAssigner))
    for name, buffer in model.named_buffers():
        if not name.startswith(assigners):
            shared = buffer.contiguous()
            dist.broadcast(shared, src=0)
            buffer.copy_(shared)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what replicates or compiles it.

    DistributedDataParallel would wait in each forward pass for ranks that have fewer batches.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _target_of_rows(target: Tensor, num_rows: int) -> Tensor:
    """The target (B, ...) of each of B times so many rows: positions of feature maps, or tokens, are samples too."""
    positions, rest = divmod(num_rows, max(len(target), 1))
    if rest:
        raise ShapeError(f"expected features of {len(target)} samples at the head, as many as targets, got {num_rows}.")
    return target.repeat_interleave(positions, dim=0)
