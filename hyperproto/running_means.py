"""The running mean embedding of every label, over all batches and ranks: all of an assigner but the matching."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyperproto.arguments import share
from hyperproto.checkpoint import check_format, format_version, stamp_format_
from hyperproto.class_means import check_finite, update_by_labels_, update_by_weights_
from hyperproto.errors import ArgumentError, CheckpointError, ShapeError
from hyperproto.precision import full_precision, keeping_dtype
from hyperproto.ranks import (
    ProcessGroup,
    add_up_ranks,
    bit_of_this_rank,
    check_member,
    check_not_overwritten,
    has_ranks,
)
from hyperproto.readout import Readout
from hyperproto.sphere import normalise
from hyperproto.targets import Target, evidence, is_seen


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
        self.register_buffer("class_means", means)
        self.register_buffer("class_counts", means.new_zeros(num_classes))
        # At the last step. What this rank adds to, batch by batch, rounds otherwise than what other ranks add to.
        self.register_buffer("combined_counts", means.new_zeros(num_classes))
        self.register_buffer("format_version", format_version().to(device))
        # Of the samples since the last step: what each rank weighs by when ranks are combined.
        self.register_buffer("pending_counts", means.new_zeros(num_classes))
        self.register_buffer("lost_counts", means.new_zeros(num_classes), persistent=False)
        self.register_buffer("class_sums", torch.zeros_like(means) if momentum is None else None)
        # Ranks that fed what is pending, as bits. Not in checkpoints: the rank that loads one need not be who saved it.
        self.register_buffer("writers", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

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
                    each.index_add_(0, labels, counting)
                self.lost_counts.index_add_(0, labels, (target.kept & ~finite).float())
            else:
                weights = evidence(target.values)
                lost = torch.where(finite[:, None], 0.0, weights)
                weights = weights - lost
                update_by_weights_(means, sums, self.pending_counts, embeddings, weights, momentum=self.momentum)
                fed = weights.sum(dim=0)
                for each in counts:
                    each.add_(fed)
                self.lost_counts.add_(lost.sum(dim=0))
        self.writers.bitwise_or_(bit_of_this_rank())

    @torch.no_grad()
    def _combine_ranks(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Class means (C, D) of all ranks, checked, and the samples (C,) since the last step, seen and lost."""
        # A rank without a batch has not followed the model yet, and NCCL takes no tensor of the CPU.
        self._follow_device(device)
        means, total, lost = self.class_means, self.pending_counts, self.lost_counts
        checked = means
        if has_ranks(self.process_group):
            sums = means * total[:, None] if self.class_sums is None else self.class_sums.clone()
            overwritten = ((self.writers & ~bit_of_this_rank()) != 0).float()
            total, lost = total.clone(), lost.clone()
            add_up_ranks([sums, total, lost, overwritten], means.device, process_group=self.process_group)
            check_not_overwritten(overwritten)
            checked = sums
            # A label that has but slivers, on all ranks together, starts no mean; with a momentum none was started.
            moved = total > 0 if self.class_sums is None else is_seen(total)
            means = torch.where(moved[:, None], normalise(sums), means)
        check_finite(checked, total, lost)
        return means, total, lost

    @torch.no_grad()
    def _begin_round(self, means: Tensor, total: Tensor) -> None:
        """Keep what the ranks have combined, and start counting anew."""
        self.class_means.copy_(means)
        self.combined_counts.add_(total)
        self.class_counts.copy_(self.combined_counts)
        self.pending_counts.zero_()
        self.lost_counts.zero_()
        self.writers.zero_()
        if self.class_sums is not None:
            self.class_sums.zero_()

    def _follow_device(self, device: torch.device) -> None:
        if self.class_means.device != device:
            self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMeans:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self._check_checkpoint(state_dict, prefix)
        stamp_format_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_checkpoint(self, state_dict: dict[str, Tensor], prefix: str) -> None:
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


def _old_weight(momentum: object) -> float | None:
    return None if momentum is None else share(momentum, "momentum, the weight of the old mean,", below_one=True)
