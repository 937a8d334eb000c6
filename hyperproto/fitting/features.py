"""One pass over labelled data: the features that reach a model's heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.arguments import module
from hyperproto.class_names import check_labels_of_names
from hyperproto.errors import ArgumentError, HeadNotFoundError, ShapeError
from hyperproto.fitting.batches import moved, num_samples, read_batches
from hyperproto.fitting.statistics import FeatureStatistics
from hyperproto.head import HypersphericalHead
from hyperproto.heads import unwrapped
from hyperproto.modes import eval_mode
from hyperproto.projection import has_layers
from hyperproto.ranks import (
    ProcessGroup,
    add_up_ranks,
    agreement,
    check_member,
    share_first_,
    shared_buffers,
)
from hyperproto.sphere import normalise
from hyperproto.targets import check_target

#: Takes the number of a head, features (N, F) float32 that reach it, and the target (N,) or (N, C) of each on the CPU.
Consumer = Callable[[int, Tensor, Tensor], None]


def collect(
    model: nn.Module,
    heads: tuple[HypersphericalHead, ...],
    loader: Iterable[Any],
    keep: Consumer,
    *,
    process_group: ProcessGroup | None,
) -> tuple[list[FeatureStatistics], int]:
    """One pass over the data: statistics of what each head projects, on all ranks, and the number of samples there.

    Args:
        model: it is run in eval mode; under torch.distributed as the model of the first rank.
        heads: of the model.
        loader: see `read_batches`.
        keep: gets the features as they come, where the model is.
        process_group: the ranks that share out the data.

    Raises:
        HeadNotFoundError: the model does not call all of its heads.
        LabelError, ShapeError: targets that do not fit.
        ArgumentError: there are no samples.
    """
    statistics = [FeatureStatistics(head.num_classes, head.in_features) for head in heads]

    def consume(index: int, features: Tensor, target: Tensor) -> None:
        statistics[index].add(features.cpu(), target)
        keep(index, features, target)

    samples = torch.tensor([_feed(model, heads, loader, consume, process_group)], dtype=torch.float64, device="cpu")
    sums = [tensor for each in statistics for tensor in each.tensors()]
    add_up_ranks([samples, *sums], heads[0].assignment.device, process_group=process_group)
    if float(samples) == 0.0:
        raise ArgumentError("the loader gave no samples: a head needs data to be fitted to.")
    return statistics, int(samples)


@contextmanager
def checking(model: nn.Module, *, process_group: ProcessGroup | None) -> Iterator[None]:
    """For what is checked before the pass over the data: all ranks leave this block, or all raise.

    Raises:
        ArgumentError: no model, or a process group without this rank.
        RankError: another rank has raised, or has a model with other buffers.
    """
    check_member(process_group)
    advice = "Build the model with the same arguments on all ranks."
    with agreement(_device_of(module(model)), advice=advice, process_group=process_group) as facts:
        yield
        buffers = shared_buffers(unwrapped(model)).items()
        facts["the buffers of the model"] = str([(name, each.shape, each.dtype) for name, each in buffers])


@torch.no_grad()
def run_batches(model: nn.Module, loader: Iterable[Any], head: HypersphericalHead) -> Iterator[tuple[Any, Tensor]]:
    """What the model returns for each batch of a loader, and the batch's target on the CPU, checked.

    The target is labels (B,), soft targets (B, C), or labels (B, ...) of the positions of maps or of tokens. What is
    taken for a loader and for a batch is said in `read_batches`.

    Raises:
        ArgumentError: no loader, or batches that are not inputs and targets.
        LabelError, ShapeError: targets that do not fit; a data set that numbers the head's classes otherwise.
    """
    check_labels_of_names(head.class_names, loader)
    device = _device_of(model)
    for inputs, target in read_batches(loader):
        if is_of_positions(target):
            check_target(target.flatten(), target.numel(), head.num_classes)
            if len(target) != num_samples(inputs):
                raise ShapeError(
                    f"expected labels of the {num_samples(inputs)} samples of the inputs, got {tuple(target.shape)}."
                )
        else:
            check_target(target, num_samples(inputs), head.num_classes)
        yield model(moved(inputs, device)), target


def is_of_positions(target: Tensor) -> bool:
    """Whether these are labels (B, ...) of each position of maps, or of each token."""
    return target.dim() > 1 and not target.is_floating_point()


@torch.no_grad()
def _feed(
    model: nn.Module,
    heads: tuple[HypersphericalHead, ...],
    loader: Iterable[Any],
    consume: Consumer,
    process_group: ProcessGroup | None,
) -> int:
    """Give `consume` what the model's heads project, batch by batch; the number of samples."""
    model = unwrapped(model)
    count = 0
    projections = [head.projection for head in heads]
    with captured_features(model, projections, process_group=process_group) as captured:
        for _, target in run_batches(model, loader, heads[0]):
            count += target.numel() if is_of_positions(target) else len(target)
            for index, features in captured:
                consume(index, features, _target_of_rows(target, len(features)))
            if len(target) and len({index for index, _ in captured}) < len(heads):
                raise HeadNotFoundError(
                    f"{type(model).__name__} does not call all of its {len(heads)} heads in eval mode: "
                    "there are no features to fit them to. Pass the model whose forward pass ends in the head."
                )
            captured.clear()
    return count


@contextmanager
def captured_features(
    model: nn.Module, projections: Sequence[nn.Module], *, process_group: ProcessGroup | None = None
) -> Iterator[list[tuple[int, Tensor]]]:
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
        with evaluating(model, process_group=process_group), torch.compiler.set_stance("force_eager"):
            yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module, *, process_group: ProcessGroup | None = None) -> Iterator[None]:
    """All modules in eval mode; their modes and the global generator are as they were afterwards.

    Under torch.distributed all ranks get rank 0's buffers first, as in a forward pass of DistributedDataParallel: each
    has running statistics of its own since the last one, and would evaluate another model. An error of one rank stops
    all.
    """
    for buffer in shared_buffers(model).values():
        share_first_(buffer, process_group=process_group)
    # A loader draws its seed from the global generator.
    with agreement(_device_of(model), process_group=process_group), eval_mode(model), torch.random.fork_rng(devices=[]):
        yield


def _device_of(model: nn.Module) -> torch.device:
    """Where the model begins."""
    return next(itertools.chain(model.parameters(), model.buffers(), [torch.zeros(0, device="cpu")])).device


def _target_of_rows(target: Tensor, num_rows: int) -> Tensor:
    """The target (B, ...) of each of B times so many rows: positions of feature maps, or tokens, are samples too."""
    if is_of_positions(target):
        if target.numel() != num_rows:
            raise ShapeError(
                f"expected labels for each of the {num_rows} positions that reach the head, got {tuple(target.shape)}. "
                "Bring labels to the size of the head's maps; one-hot targets have to be floating point."
            )
        return target.flatten()
    positions, rest = divmod(num_rows, max(len(target), 1))
    if rest:
        raise ShapeError(f"expected features of {len(target)} samples at the head, as many as targets, got {num_rows}.")
    return target.repeat_interleave(positions, dim=0)
