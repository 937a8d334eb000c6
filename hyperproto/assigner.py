"""Which label each prototype stands for: running class means, and the matching once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from hyperproto.arguments import SMALLEST_INT, choice, places, share, whole_number
from hyperproto.assignment_step import AssignmentStep
from hyperproto.checkpoint import check_format, format_version, stamp_format_
from hyperproto.class_means import check_finite, update_by_labels_, update_by_weights_
from hyperproto.codebook import check_shared_bank
from hyperproto.errors import ArgumentError, AssignmentError, CheckpointError, LabelError, ShapeError
from hyperproto.head import HypersphericalHead, require_heads
from hyperproto.matching.problem import total_similarity
from hyperproto.matching.solve import AssignmentMethod, solve_assignment
from hyperproto.precision import full_precision, keeping_dtype
from hyperproto.ranks import ProcessGroup, add_up_ranks, bit_of_this_rank, check_member, has_ranks
from hyperproto.readout import Readout
from hyperproto.separation import is_simplex
from hyperproto.sphere import normalise
from hyperproto.targets import IGNORE_INDEX, Target, check_target, evidence, has_memory, is_seen, read_target


class DynamicAssigner(nn.Module):
    r"""Keeps a running mean embedding of every label and matches labels to prototypes by it.

    $$
    m_c \leftarrow \operatorname{normalise}(\mu \, m_c + (1 - \mu) \, \bar z_c), \qquad
        \sigma = \arg\max_{\sigma \text{ injective}} \sum_c \langle m_c, w_{\sigma(c)} \rangle
    $$

    The criteria of this library call `update` with each training batch; the training loop calls `step` once an epoch.
    All heads of a model share one bank and one assignment, and both stay on the heads: an assigner can be thrown away
    after training. The means follow the model's device by themselves.

    Args:
        source: a converted model (bare or wrapped), or a head.
        momentum: weight mu of the OLD mean, in [0, 1); None for the plain mean of all embeddings since the last step.
            The code published with the paper has an effective 0.95 where the paper says 0.9.
        solver: method of `functional.solve_assignment`.
        process_group: the ranks that `step` combines, those that share out the data; by default all. Where several
            ranks get the same data, as in tensor parallelism, it is the group of one of each.

    Attributes:
        class_means: (C, D) float32 buffer, unit rows; zero for a label never seen.
        class_counts: (C,) float32 buffer, samples seen of each label (sums of weights for soft targets): by all ranks
            up to the last step, by this one since.
        pending_counts: (C,) float32 buffer, samples that this rank has seen since the last step.
        combined_counts: (C,) float32 buffer, samples seen by all ranks up to the last step: apart from what this rank
            adds batch by batch, which rounds otherwise than what other ranks add.
        class_sums: (C, D) float32 buffer, sums of the embeddings since the last step; with `momentum=None` only.
        frozen: () bool buffer; see `freeze`.
        prices: (P,) float32 buffer, where the next matching starts from; it saves time, decides nothing, and is in no
            checkpoint.
        lost_counts: (C,) float32 buffer, samples since the last step that are in no mean, since the model returned NaN
            or infinity for them; in no checkpoint.
        writers: () int64 buffer, the ranks that fed what is pending, as bits; in no checkpoint.
        format_version: () int64 buffer, of the checkpoint's format.

    Raises:
        HeadNotFoundError: source has no head.
        BankError: its heads do not share one bank.
        ArgumentError: momentum outside [0, 1), or a process group without this rank.

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=2)
        >>> assigner = DynamicAssigner(head)
        >>> assigner.update(head(torch.randn(16, 8)), torch.arange(16) % 4)
        >>> assigner.step().unseen
        ()

    References:
        Saadabadi et al., CVPR 2024, section 3.2. Differs from the published code in that all samples of a label in a
        batch count (there the last one wins), and that the assignment is part of the model's state.
    """

    #: For `ranks.share_buffers_`: the means are of each rank's own data.
    buffers_are_per_rank = True

    class_means: Tensor
    class_counts: Tensor
    combined_counts: Tensor
    pending_counts: Tensor
    lost_counts: Tensor
    class_sums: Tensor | None
    frozen: Tensor
    prices: Tensor
    writers: Tensor

    def __init__(
        self,
        source: nn.Module,
        *,
        momentum: float | None = 0.9,
        solver: AssignmentMethod = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        momentum = (
            None if momentum is None else share(momentum, "momentum, the weight of the old mean,", below_one=True)
        )
        choice(solver, "solver", get_args(AssignmentMethod))
        check_member(process_group)
        # In a tuple, so that the model does not become a submodule of the criterion.
        self._heads = require_heads(source)
        check_shared_bank(self._heads)
        self.momentum = momentum
        self.solver: AssignmentMethod = solver
        self.process_group = process_group
        self._history: list[AssignmentStep] = []
        head = self.head
        means = torch.zeros(head.num_classes, head.dim, dtype=torch.float32, device=head.assignment.device)
        self.register_buffer("class_means", means)
        self.register_buffer("class_counts", means.new_zeros(head.num_classes))
        # At the last step. What this rank adds to, batch by batch, rounds otherwise than what other ranks add to.
        self.register_buffer("combined_counts", means.new_zeros(head.num_classes))
        self.register_buffer("format_version", format_version().to(means.device))
        # Of the samples since the last step: what each rank weighs by when ranks are combined.
        self.register_buffer("pending_counts", means.new_zeros(head.num_classes))
        self.register_buffer("lost_counts", means.new_zeros(head.num_classes), persistent=False)
        self.register_buffer("class_sums", torch.zeros_like(means) if momentum is None else None)
        # Where the next matching starts from. It saves time and decides nothing: not part of the state_dict.
        prices = torch.zeros(head.bank.num_prototypes, dtype=torch.float32, device=means.device)
        self.register_buffer("prices", prices, persistent=False)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=means.device))
        # Ranks that fed what is pending, as bits. Not in checkpoints: the rank that loads one need not be who saved it.
        self.register_buffer("writers", torch.zeros((), dtype=torch.int64, device=means.device), persistent=False)
        self._equiangular = is_simplex(head.bank.prototypes)

    @property
    def head(self) -> HypersphericalHead:
        """The head (the first one, where a model has several)."""
        return self._heads[0]

    @property
    def history(self) -> tuple[AssignmentStep, ...]:
        """The steps of this process so far."""
        return tuple(self._history)

    def freeze(self) -> None:
        """Keep the assignment as it is in all steps to come; the class means go on."""
        self.frozen.fill_(True)

    def unfreeze(self) -> None:
        """Let steps change the assignment again."""
        self.frozen.fill_(False)

    @torch.no_grad()
    def forget(self, labels: Sequence[int]) -> None:
        """Drop the class means of these labels and what is pending for them; in place. Their prototypes stay.

        Under torch.distributed every rank must call it with the same labels.

        Raises:
            LabelError: not labels in [0, C).
        """
        index = places(labels, "labels", error=LabelError)
        check_target(index, len(index), self.head.num_classes)
        for buffer in (self.class_means, self.class_sums, self.pending_counts, self.lost_counts):
            if buffer is not None:
                buffer.index_fill_(0, index.to(buffer.device), 0.0)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> None:
        """Feed a batch to the class means; in place.

        Costs O(B D) from embeddings and O(B D^2) from logits, whose embeddings are recovered by least squares. A
        sample for which the model returned NaN or infinity is left out; `step` raises where most were.

        Args:
            output: what the model returned in training: logits (B, C) or embeddings (B, D).
            target: labels (B,) int64, or soft targets (B, C), whose entries, less the smallest of their row, weigh the
                samples: the uniform part of label smoothing says nothing about a label. Where a label's weights add up
                to less than one sample, its mean moves by that fraction of a step; below half a sample it starts none.
            ignore_index: label of samples that feed no mean.

        Raises:
            ShapeError, LabelError: output or target do not fit; nothing has changed then.
            ArgumentError: within a transform of torch.func, which allows no change of state.
        """
        readout, device = self.head.read(output), output.device
        ignored = whole_number(ignore_index, "ignore_index", smallest=SMALLEST_INT)
        self.feed(readout, read_target(target, len(output), self.head.num_classes, device, ignore_index=ignored))

    @torch.no_grad()
    def feed(self, readout: Readout, target: Target) -> None:
        """What `update` does with an output that has been read and a target that has been checked."""
        if target.values.shape[0] == 0:
            return
        if not torch.compiler.is_compiling() and not has_memory(readout.output):
            raise ArgumentError(
                "expected to feed the assigner outside of torch.func's transforms, which change no state. Make the "
                "criterion from the model, and call assigner.update(output, target) outside."
            )
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
                for each in counts:
                    each.add_(weights.sum(dim=0))
                self.lost_counts.add_(lost.sum(dim=0))
        self.writers.bitwise_or_(bit_of_this_rank())

    def step(self) -> AssignmentStep:
        r"""Match labels to prototypes by the class means and write the assignment into the heads; in place.

        Under torch.distributed every rank of the process group must call it: means are combined over the ranks in one
        collective, and all arrive at the same means and the same assignment, bit for bit. With `momentum=None` they
        are what one process would have that saw all batches, to rounding. With a momentum every rank moves its own
        means by its own batches, and they are combined with weights n, the samples of the label on each rank since
        the last step; no order of the ranks enters but that in which torch.distributed adds up.

        $$ m_c = \operatorname{normalise}\Big(\sum_r n_{rc} \, m_{rc}\Big) $$

        Returns:
            What changed.

        Raises:
            HeadNotFoundError: the head is no longer part of its model.
            AssignmentError: the model returned NaN or infinity for half of the samples or more, with the labels, or
                state of one rank that was written over another's; the same on every rank. Means and assignment stay.
        """
        started = time.perf_counter()
        head = self.head
        head.check_in_use()
        combined, total = self._combine_ranks()
        means, prototypes, before = combined.cpu(), head.bank.prototypes.cpu(), head.assignment.cpu().clone()
        if bool(self.frozen):
            after, solver, optimal = before, "frozen", False
            similarity = similarity_before = total_similarity(means, prototypes, before)
        else:
            solution = solve_assignment(means, prototypes, current=before, method=self.solver, prices=self.prices)
            after, solver, optimal = solution.assignment, solution.method, solution.optimal
            similarity, similarity_before = solution.similarity, solution.similarity_of_current
            if solution.prices is not None:
                self.prices.copy_(solution.prices)
            for each in self._heads:
                each.assign_(after.to(each.assignment.device))
        self._begin_round(combined, total)
        moved = torch.nonzero(after != before).flatten().tolist()
        record = AssignmentStep(
            changed=len(moved),
            moved_labels=tuple(moved),
            similarity_before=similarity_before,
            similarity_after=similarity,
            unseen=tuple(torch.nonzero(~means.any(dim=1)).flatten().tolist()),
            solver=solver,
            optimal=optimal,
            seconds=time.perf_counter() - started,
            equiangular=self._equiangular,
        )
        self._history.append(record)
        return record

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"num_classes={self.head.num_classes}, dim={self.head.dim}, momentum={self.momentum}"

    def _follow_device(self, device: torch.device) -> None:
        if self.class_means.device != device:
            self.to(device)

    @torch.no_grad()
    def _combine_ranks(self) -> tuple[Tensor, Tensor]:
        """Class means (C, D) of all ranks, checked, and the samples (C,) that they have seen since the last step."""
        # A rank without a batch has not followed the model yet, and NCCL takes no tensor of the CPU.
        self._follow_device(self.head.assignment.device)
        means, total, lost = self.class_means, self.pending_counts, self.lost_counts
        checked = means
        if has_ranks(self.process_group):
            sums = means * total[:, None] if self.class_sums is None else self.class_sums.clone()
            overwritten = ((self.writers & ~bit_of_this_rank()) != 0).float()
            total, lost = total.clone(), lost.clone()
            add_up_ranks([sums, total, lost, overwritten], means.device, process_group=self.process_group)
            _check_not_overwritten(overwritten)
            checked = sums
            # A label that has but slivers, on all ranks together, starts no mean; with a momentum none was started.
            moved = total > 0 if self.class_sums is None else is_seen(total)
            means = torch.where(moved[:, None], normalise(sums), means)
        check_finite(checked, total, lost)
        return means, total

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicAssigner:
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
                    f"{tuple(own.shape)}. It was made for {self.head.num_classes} labels in dimension {self.head.dim}."
                )
        has_sums = prefix + "class_sums" in state_dict
        if prefix + "class_means" in state_dict and has_sums != (self.class_sums is not None):
            saved, own_momentum = "momentum=None" if has_sums else "a momentum", f"momentum={self.momentum}"
            raise CheckpointError(
                f"the checkpoint's {prefix}class_means were kept with {saved}, this assigner has {own_momentum}. "
                "Make the assigner with the checkpoint's momentum before loading."
            )


def _check_not_overwritten(num_ranks: Tensor) -> None:
    if bool(num_ranks > 0):
        raise AssignmentError(
            f"on {int(num_ranks)} ranks the assigner's buffers were overwritten by another rank's: it is part of a "
            "module wrapped by DistributedDataParallel. Wrap with forward_sync_buffers=False (before torch 2.13: "
            "broadcast_buffers=False), or keep the assigner, and the criterion that holds it, outside of what is "
            "wrapped."
        )
