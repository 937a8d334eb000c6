"""The one door to torch.distributed: what ranks add up, and what rank 0 decides for all.

Without other ranks every function here does nothing. A process group of None is that of all ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperproto.arguments import shown
from hyperproto.errors import ArgumentError, AssignmentError

#: The ranks that share out the data.
ProcessGroup = dist.ProcessGroup


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


def add_up_ranks(tensors: list[Tensor], device: torch.device, *, process_group: ProcessGroup | None = None) -> None:
    """Sum each tensor over the ranks, in place and in one collective.

    Args:
        tensors: equal in number and shape on all ranks, all of one dtype.
        device: where the collective takes place; the tensors may lie elsewhere.
        process_group: the ranks.
    """
    if not has_ranks(process_group):
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    dist.all_reduce(flat, group=process_group)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def share_buffers_(model: nn.Module, *, process_group: ProcessGroup | None = None) -> None:
    """Copy the first rank's buffers to all ranks, in place.

    Buffers of modules that say `buffers_are_per_rank` stay: they are of each rank's own data.
    """
    if not has_ranks(process_group):
        return
    first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    kept = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "buffers_are_per_rank", False))
    for name, buffer in model.named_buffers():
        if not name.startswith(kept):
            shared = buffer.contiguous()
            dist.broadcast(shared, src=first, group=process_group)
            buffer.copy_(shared)


def bit_of_this_rank() -> int:
    """What this rank signs with, where it matters who wrote something: one bit of 63."""
    return 1 << (dist.get_rank() % 63 if dist.is_available() and dist.is_initialized() else 0)


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
