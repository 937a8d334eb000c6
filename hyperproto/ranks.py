"""The one door to torch.distributed: what ranks add up, and what rank 0 decides for all.

Without other ranks every function here does nothing. A process group of None is that of all ranks.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperproto.arguments import shown
from hyperproto.errors import ArgumentError, AssignmentError, HyperprotoError, RankError, ShapeError

#: The ranks that share out the data.
ProcessGroup = dist.ProcessGroup

#: What `agreement` compares: a number is shown where ranks differ, of a tensor or a text its fingerprint is compared.
Fact = int | str | Tensor

#: Facts of one agreement, at most: ranks that differ in anything send as much as any other.
MOST_FACTS = 15

T = TypeVar("T")


def has_ranks(process_group: ProcessGroup | None = None) -> bool:
    """Whether there are ranks beside this one.

    Examples:
        >>> has_ranks()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def check_member(process_group: ProcessGroup | None) -> None:
    """Raise unless this rank belongs to the process group.

    Raises:
        ArgumentError: it does not, or it is no process group.
    """
    if process_group is None:
        return
    # What torch.distributed.new_group gives to ranks that are not in the group is a number.
    no_member: object = dist.GroupMember.NON_GROUP_MEMBER
    if process_group is not no_member and not isinstance(process_group, dist.ProcessGroup):
        raise ArgumentError(
            f"expected process_group to be None or a group of ranks, got {shown(process_group)}. See "
            "torch.distributed.new_group."
        )
    if dist.get_rank(process_group) < 0:
        raise ArgumentError(
            f"expected a process group that rank {dist.get_rank()} belongs to, got one of other ranks. "
            "Every rank needs the group that it shares out its data with: see torch.distributed.new_subgroups."
        )


@contextmanager
def agreement(
    device: torch.device, *, advice: str = "", process_group: ProcessGroup | None = None
) -> Iterator[dict[str, Fact]]:
    """All ranks leave this block, or all raise; its end is one collective of a fixed size.

    Whatever one rank finds wrong within the block is raised on that rank as it is, and on the others it is said that
    it was. Where the facts that ranks put down within the block differ, all raise the same. There must be no other
    collective within the block: a rank that raises would not reach it.

    Args:
        device: where the collective takes place.
        advice: what to do where facts differ.
        process_group: the ranks.

    Yields:
        The facts by their names, of the same names on all ranks that raise nothing; empty at first.

    Raises:
        RankError: another rank has raised, or facts differ.

    Examples:
        >>> with agreement(torch.device("cpu")) as facts:
        ...     facts["the number of labels"] = 10
    """
    facts: dict[str, Fact] = {}
    record: list[int] | None = None
    try:
        yield facts
        record = [_number(fact) for fact in facts.values()] if has_ranks(process_group) else []
    finally:
        records = _gather(record, device, process_group)
    _check_records(records, facts, advice)


def fingerprint(value: Tensor | str) -> int:
    """63 bits of a hash of a text, or of the values of a tensor: equal for equal bits, and hardly ever for others.

    Examples:
        >>> fingerprint(torch.arange(3)) == fingerprint(torch.arange(3)), fingerprint("a") == fingerprint("b")
        (True, False)
    """
    data = value.encode() if isinstance(value, str) else value.detach().cpu().contiguous().numpy().data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _number(fact: Fact) -> int:
    return fact if isinstance(fact, int) else fingerprint(fact)


def _gather(record: list[int] | None, device: torch.device, process_group: ProcessGroup | None) -> list[list[int]]:
    """The records of all ranks: whether it raised, and the numbers of its facts."""
    if not has_ranks(process_group):
        return []
    numbers = [1] if record is None else [0, *record]
    own = torch.tensor(numbers + [0] * (1 + MOST_FACTS - len(numbers)), dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(every, own, group=process_group)
    return torch.stack(every).tolist()


def _check_records(records: list[list[int]], facts: dict[str, Fact], advice: str) -> None:
    raised = [rank for rank, record in enumerate(records) if record[0]]
    if raised:
        raise RankError(
            f"ranks {raised} of {len(records)} have raised an error, which they show; this rank stops with them, and "
            "nothing has changed."
        )
    differences = []
    for (name, fact), numbers in zip(facts.items(), list(zip(*records, strict=True))[1:], strict=False):
        others = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
        if others:
            differences.append(f"{name} ({list(numbers) if isinstance(fact, int) else f'of ranks {others}'})")
    if differences:
        raise RankError(
            f"expected all ranks to have what rank 0 has; they differ in {', '.join(differences)}. Nothing has "
            f"changed. {advice}"
        )


def decided_by_first(decide: Callable[[], T], device: torch.device, *, process_group: ProcessGroup | None = None) -> T:
    """What the first rank computes, on all ranks, which wait for it; where it raises, all raise the same.

    Args:
        decide: called on the first rank only; returns what can be pickled.
        device: where the collective takes place.
        process_group: the ranks.

    Raises:
        RankError: it raised what is no error of this library.

    Examples:
        >>> decided_by_first(lambda: 3, torch.device("cpu"))
        3
    """
    if not has_ranks(process_group):
        return decide()
    outcome: list[T | HyperprotoError] = [RankError("rank 0 has raised an error, which it shows; nothing has changed.")]
    try:
        if dist.get_rank(process_group) == 0:
            outcome = [decide()]
    except HyperprotoError as error:
        outcome = [error]
    finally:
        dist.broadcast_object_list(outcome, src=_first_rank(process_group), group=process_group, device=device)
    if isinstance(outcome[0], HyperprotoError):
        raise outcome[0]
    return outcome[0]


def share_first_(tensor: Tensor, *, process_group: ProcessGroup | None = None) -> None:
    """Copy the first rank's tensor to all ranks, in place; of one shape and dtype on all."""
    if has_ranks(process_group):
        shared = tensor.contiguous()
        dist.broadcast(shared, src=_first_rank(process_group), group=process_group)
        tensor.copy_(shared)


def check_whole(tensor: Tensor, what: str) -> None:
    """Raise if a buffer was made a tensor of a device mesh, parts or copies of which lie on several ranks.

    Raises:
        ShapeError: it was.
    """
    mesh = sys.modules.get("torch.distributed.tensor")
    if mesh is not None and isinstance(tensor, mesh.DTensor):
        raise ShapeError(
            f"expected {what} to be a tensor of its rank alone, got a DTensor: distribute_module of "
            "torch.distributed.tensor makes one of every buffer. Distribute the layers before the head instead of the "
            "whole model, or use torch.distributed.fsdp.fully_shard, which leaves buffers alone."
        )


def check_not_sharded(model: nn.Module, fitted: Iterable[Tensor]) -> None:
    """Raise if what is written into these parameters of a model would be lost, since they are gathered from all ranks.

    Raises:
        ArgumentError: fully_shard or FullyShardedDataParallel has been there, or a parameter is a DTensor.
    """
    sharding, mesh = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrappers = () if sharding is None else (sharding.FSDPModule, sharding.FullyShardedDataParallel)
    if any(isinstance(each, wrappers) for each in model.modules()) or (
        mesh is not None and any(isinstance(each, mesh.DTensor) for each in fitted)
    ):
        raise ArgumentError(
            "expected a model whose parameters are whole on each rank, got one that is sharded: what is fitted would "
            "be lost when they are gathered next. Fit first and call fully_shard (or what else shards) afterwards, or "
            "fit a copy that is not sharded and has loaded the full state_dict."
        )


def add_up_ranks(tensors: list[Tensor], device: torch.device, *, process_group: ProcessGroup | None = None) -> None:
    """Sum each tensor over the ranks, in place and in one collective for each dtype.

    Args:
        tensors: equal in number, shape and dtype on all ranks.
        device: where the collective takes place; the tensors may lie elsewhere.
        process_group: the ranks.
    """
    if not has_ranks(process_group):
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike]).to(device)
        dist.all_reduce(flat, group=process_group)
        for tensor, part in zip(alike, torch.split(flat, [tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_rows(rows: Tensor, device: torch.device, *, process_group: ProcessGroup | None = None) -> Tensor:
    """The rows (N, ...) of all ranks, as many as each has, one rank's behind the other's.

    Args:
        rows: of one width and dtype on all ranks.
        device: where the collectives take place; the rows may lie elsewhere.
        process_group: the ranks.
    """
    if not has_ranks(process_group):
        return rows
    rank = dist.get_rank(process_group)
    sizes = torch.zeros(dist.get_world_size(process_group), dtype=torch.int64, device=rows.device)
    sizes[rank] = len(rows)
    add_up_ranks([sizes], device, process_group=process_group)
    gathered, start = rows.new_zeros(int(sizes.sum()), *rows.shape[1:]), int(sizes[:rank].sum())
    gathered[start : start + len(rows)] = rows
    add_up_ranks([gathered], device, process_group=process_group)
    return gathered


def shared_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are to be the same on all ranks, by name: all but those of modules with `buffers_are_per_rank`."""
    kept = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "buffers_are_per_rank", False))
    return {name: buffer for name, buffer in model.named_buffers() if not name.startswith(kept)}


def share_state_(module: nn.Module, *, process_group: ProcessGroup | None = None) -> None:
    """Copy what the first rank's `state_dict` has to all ranks, in place."""
    for tensor in module.state_dict().values():
        share_first_(tensor, process_group=process_group)


def steered_by_first(
    steer: Callable[[Callable[[], Tensor]], object],
    evaluate: Callable[[], Tensor],
    places: list[Tensor],
    *,
    process_group: ProcessGroup | None = None,
) -> None:
    """Let the first rank decide where, and how often, all ranks evaluate what they add up; all end where it ends.

    Ranks that round differently would come to other decisions, and wait for each other for ever.

    Args:
        steer: on the first rank only, called with a function that evaluates on all ranks.
        evaluate: at the present places; ends in a collective.
        places: tensors that `steer` moves, in place.
        process_group: the ranks.
    """
    if not has_ranks(process_group):
        steer(evaluate)
        return
    goes_on = torch.zeros((), dtype=torch.int64, device=places[0].device)

    def share() -> None:
        for tensor in (goes_on, *places):
            share_first_(tensor.detach(), process_group=process_group)

    def evaluate_on_all() -> Tensor:
        goes_on.fill_(1)
        share()
        return evaluate()

    if dist.get_rank(process_group) == 0:
        try:
            steer(evaluate_on_all)
        finally:
            goes_on.fill_(0)
            share()
        return
    share()
    while bool(goes_on):
        evaluate()
        share()


def bit_of_this_rank(process_group: ProcessGroup | None = None) -> int:
    """What this rank of a process group signs with, where it matters who wrote something: one bit of 63."""
    return 1 << (dist.get_rank(process_group) % 63 if dist.is_available() and dist.is_initialized() else 0)


def _first_rank(process_group: ProcessGroup | None) -> int:
    return 0 if process_group is None else dist.get_global_rank(process_group, 0)


def check_not_overwritten(num_ranks: Tensor) -> None:
    """Raise if ranks found their buffers written by others.

    Raises:
        AssignmentError: num_ranks () is not zero.
    """
    if bool(num_ranks > 0):
        raise AssignmentError(
            f"on {int(num_ranks)} ranks the assigner's buffers were overwritten by another rank's: it is part of a "
            "module wrapped by DistributedDataParallel. Wrap with forward_sync_buffers=False (before torch 2.13: "
            "broadcast_buffers=False), or keep the assigner, and the criterion that holds it, outside of what is "
            "wrapped."
        )
