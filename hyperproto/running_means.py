"""The running mean embedding of every label, over all batches and ranks: all of an assigner but the matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperproto.arguments import share
from hyperproto.checkpoint import check_format, format_version, stamp_format_
from hyperproto.class_means import update_by_labels_, update_by_weights_
from hyperproto.errors import ArgumentError, CheckpointError, ShapeError
from hyperproto.group_handle import GroupHandle
from hyperproto.precision import full_precision, keeping_dtype, widest_float
from hyperproto.ranks import (
    Fact,
    ProcessGroup,
    add_up_ranks,
    bit_of_this_rank,
    check_member,
    check_not_overwritten,
    fingerprint,
    has_ranks,
)
from hyperproto.readout import Readout
from hyperproto.sphere import normalise
from hyperproto.targets import Target, evidence, is_seen

#: The bit of it in `writers`.
FIRST_RANK = 1

#: Buffers that hold numbers of samples.
COUNTS = ("class_counts", "combined_counts", "pending_counts", "lost_counts")


class Combined(NamedTuple):
    """What all ranks together have seen.

    Attributes:
        means: (C, D) class means.
        sums: (C, D) that they follow from.
        total: (C,) samples since the last step.
        lost: (C,) samples since the last step whose embeddings were not finite.
    """

    means: Tensor
    sums: Tensor
    total: Tensor
    lost: Tensor


class RunningMeans(nn.Module):
    """Class means of C labels in dimension D, and how many samples they are of; see `DynamicAssigner` for the buffers.

    Args:
        num_classes: C.
        dim: D.
        device: of the model.
        momentum: weight of the old mean, or None for plain means.
        process_group: the ranks that share out the data.
    """

    #: For `ranks.share_buffers_`: the means are of each rank's own data.
    buffers_are_per_rank = True

    class_means: Tensor
    class_counts: Tensor
    combined_counts: Tensor
    pending_counts: Tensor
    lost_counts: Tensor
    class_sums: Tensor | None
    writers: Tensor
    format_version: Tensor
    _momentum: float | None

    def __init__(
        self,
        num_classes: int,
        dim: int,
        device: torch.device,
        momentum: float | None,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.momentum = _old_weight(momentum)  # before nn.Module sees it, which would make a module a submodule
        check_member(process_group)
        self.process_group = process_group
        self.num_classes = num_classes
        self.dim = dim
        means = torch.zeros(num_classes, dim, dtype=torch.float32, device=device)
        counts = torch.zeros(num_classes, dtype=widest_float(device), device=device)
        self.register_buffer("class_means", means)
        self.register_buffer("class_counts", counts)
        # At the last step. What this rank adds to, batch by batch, rounds otherwise than what other ranks add to.
        self.register_buffer("combined_counts", torch.zeros_like(counts))
        self.register_buffer("format_version", format_version().to(device))
        # Of the samples since the last step: what each rank weighs by when ranks are combined.
        self.register_buffer("pending_counts", torch.zeros_like(counts))
        self.register_buffer("lost_counts", torch.zeros_like(counts), persistent=False)
        self.register_buffer("class_sums", torch.zeros_like(means) if momentum is None else None)
        # Ranks that fed what is pending, as bits. In checkpoints where it was another than the first.
        self.register_buffer("writers", torch.zeros((), dtype=torch.int64, device=device))
        # Of the means that the ranks had in common when they last had any; 0 where that is not known.
        self._common_means = 0

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that a step combines; None for all."""
        return self._group.group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        check_member(process_group)
        self._group = GroupHandle(process_group)

    @property
    def momentum(self) -> float | None:
        """Weight of the old mean, or None for plain means; a number may be set to another one at any time."""
        return self._momentum

    @momentum.setter
    def momentum(self, momentum: float | None) -> None:
        momentum = _old_weight(momentum)
        if hasattr(self, "class_sums") and (momentum is None) != (self.class_sums is not None):
            raise ArgumentError(
                f"an assigner with momentum={self._momentum} keeps other sums than one with momentum={momentum}: "
                "make a new one, DynamicAssigner(model, momentum=...)."
            )
        self._momentum = momentum

    @torch.no_grad()
    def _take_in(self, readout: Readout, target: Target) -> None:
        """Move the means by a batch; samples that are ignored, or not finite, do not count."""
        device = readout.output.device
        self._follow_device(device)
        means, sums, counts = self.class_means, self.class_sums, (self.class_counts, self.pending_counts)
        with full_precision(device):
            embeddings = readout.embeddings()
            finite = torch.isfinite(embeddings).all(dim=1)  # (B,)
            embeddings = torch.where(finite[:, None], embeddings, 0.0)
            if target.kept is not None:
                labels, counting = target.places(), (target.kept & finite).float()
                embeddings = target.where_kept(embeddings, 0.0)
                update_by_labels_(means, sums, embeddings, labels, counting, momentum=self.momentum)
                for each in counts:
                    each.index_add_(0, labels, counting.to(each.dtype))
                self.lost_counts.index_add_(0, labels, (target.kept & ~finite).to(self.lost_counts.dtype))
            else:
                weights = evidence(target.values)
                lost = torch.where(finite[:, None], 0.0, weights)
                weights = weights - lost
                update_by_weights_(means, sums, self.pending_counts, embeddings, weights, momentum=self.momentum)
                fed = weights.sum(dim=0)
                for each in counts:
                    each.add_(fed)
                self.lost_counts.add_(lost.sum(dim=0))
        self.writers.bitwise_or_(bit_of_this_rank(self.process_group))

    def _facts(self) -> dict[str, Fact]:
        """What every rank must have alike for their means to be combined."""
        return {
            "the momentum": str(self.momentum),
            "the counts of samples up to the last step": self.combined_counts,
            "the class means of the last step": str(self._common_means),
        }

    @torch.no_grad()
    def _combine_ranks(self) -> Combined:
        """What all ranks have seen; they must be known to have means of one shape."""
        means, total, lost = self.class_means, self.pending_counts, self.lost_counts
        if not has_ranks(self.process_group):
            return Combined(means, means, total, lost)
        sums = means * total[:, None].float() if self.class_sums is None else self.class_sums.clone()
        overwritten = ((self.writers & ~bit_of_this_rank(self.process_group)) != 0).float()
        total, lost = total.clone(), lost.clone()
        add_up_ranks([sums, overwritten, total, lost], means.device, process_group=self.process_group)
        check_not_overwritten(overwritten)
        # A label that has but slivers, on all ranks together, starts no mean; with a momentum none was started.
        moved = total > 0 if self.class_sums is None else is_seen(total)
        return Combined(torch.where(moved[:, None], normalise(sums), means), sums, total, lost)

    @torch.no_grad()
    def _begin_round(self, means: Tensor, total: Tensor) -> None:
        """Keep what the ranks have combined, and start counting anew."""
        self.class_means.copy_(means)
        self._common_means = fingerprint(means) if has_ranks(self.process_group) else 0
        self.combined_counts.add_(total)
        self.class_counts.copy_(self.combined_counts)
        self.pending_counts.zero_()
        self.lost_counts.zero_()
        self.writers.zero_()
        if self.class_sums is not None:
            self.class_sums.zero_()

    def _follow_device(self, device: torch.device) -> None:
        if self.class_means.is_meta:
            self.to_empty(device=device)
        elif self.class_means.device != device:
            self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMeans:
        before = dict(self.named_buffers())
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        widest = widest_float(self.class_means.device)
        for name in COUNTS:
            self._buffers[name] = getattr(self, name).to(widest)
        if any(_values_lost(buffer, getattr(self, name)) for name, buffer in before.items()):
            self._start_anew()
        return self

    def _start_anew(self) -> None:
        """Be as a new one: `to_empty` leaves in buffers whatever the memory held, and no checkpoint brings them all."""
        for buffer in self.buffers():
            buffer.zero_()
        self.format_version.copy_(format_version())
        self._common_means = 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.writers.is_meta or int(self.writers) <= FIRST_RANK:
            del destination[prefix + "writers"]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self.check_checkpoint(state_dict, prefix)
        stamp_format_(state_dict, prefix)
        self._leave_to_others_(state_dict, prefix)
        for name, own in self.named_buffers():
            if prefix + name in state_dict:  # with assign=True it takes the place of the buffer
                state_dict[prefix + name] = state_dict[prefix + name].to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, own in dict(self.named_buffers()).items():
            if own.is_meta and not self.class_means.is_meta:  # in no checkpoint
                self._buffers[name] = torch.zeros_like(own, device=self.class_means.device)
        self._common_means = 0

    def _leave_to_others_(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Drop from a `state_dict`, in place, what other ranks than this one have fed since the last step.

        Where all ranks load what one of them has saved between two steps, its samples count on that rank alone.
        """
        pending = state_dict.get(prefix + "pending_counts")
        if pending is None or pending.is_meta:
            state_dict[prefix + "writers"] = self.writers
            return
        own = bit_of_this_rank(self.process_group)
        writers = int(state_dict.get(prefix + "writers", FIRST_RANK)) if has_ranks(self.process_group) else own
        if not writers & own:
            for name in ("pending_counts", "class_sums"):
                if prefix + name in state_dict:
                    state_dict[prefix + name] = torch.zeros_like(state_dict[prefix + name])
            if prefix + "combined_counts" in state_dict:
                state_dict[prefix + "class_counts"] = state_dict[prefix + "combined_counts"].clone()
        held = bool(state_dict[prefix + "pending_counts"].any())
        state_dict[prefix + "writers"] = torch.tensor(writers if held else 0, device=pending.device)

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise unless these means can be loaded from what a `state_dict` holds under a prefix; changes nothing.

        Raises:
            CheckpointError: written by a later version of this library, or means of the other kind.
            ShapeError: of another number of labels or another dimension.
        """
        check_format(state_dict, prefix)
        for name, own in self.named_buffers():
            value = state_dict.get(prefix + name)
            if value is not None and value.shape != own.shape:
                raise ShapeError(
                    f"the checkpoint's {prefix}{name} has shape {tuple(value.shape)}, this assigner expects "
                    f"{tuple(own.shape)}. It was made for {self.num_classes} labels in dimension {self.dim}."
                )
        has_sums = prefix + "class_sums" in state_dict
        if prefix + "class_means" in state_dict and has_sums != (self.class_sums is not None):
            saved, own_momentum = "momentum=None" if has_sums else "a momentum", f"momentum={self.momentum}"
            raise CheckpointError(
                f"the checkpoint's {prefix}class_means were kept with {saved}, this assigner has {own_momentum}. "
                "Make the assigner with the checkpoint's momentum before loading."
            )


def _values_lost(before: Tensor, after: Tensor) -> bool:
    """Whether a buffer was replaced by one that does not hold its values."""
    if after is before or after.is_meta:
        return False
    if before.is_meta:
        return True
    before, after = before.cpu(), after.cpu()
    return not bool(((before == after) | (before.isnan() & after.isnan())).all())


def _old_weight(momentum: object) -> float | None:
    return None if momentum is None else share(momentum, "momentum, the weight of the old mean,", below_one=True)
