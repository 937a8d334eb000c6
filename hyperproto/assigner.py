"""Which label each prototype stands for: running class means, and the matching once an epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hyperproto.arguments import SMALLEST_INT, choice, flag, places, whole_number
from hyperproto.assignment_step import AssignmentStep, packed_labels
from hyperproto.attachment import Attachment
from hyperproto.class_means import check_finite
from hyperproto.errors import ArgumentError, AssignmentError, LabelError
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads, unwrapped
from hyperproto.matching.problem import total_similarity
from hyperproto.matching.solve import AssignmentMethod, AssignmentSolution, solve_assignment
from hyperproto.module_ref import ModuleRef
from hyperproto.oversights import NUM_NOTICED, Oversights, count_batch_
from hyperproto.ranks import Fact, ProcessGroup, agreement, check_whole, decided_by_first, fingerprint, share_first_
from hyperproto.readout import Readout
from hyperproto.running_means import Combined, RunningMeans
from hyperproto.separation import is_simplex
from hyperproto.targets import IGNORE_INDEX, Target, check_target, has_memory

#: Steps of which `history` keeps the record: enough for one an epoch, and flat where one follows each batch.
KEPT_STEPS = 1000

#: Entry of a `state_dict`: batches since the last step, of an assigner that counts them.
NUM_BATCHES = "num_batches"

#: How ranks that differ come to agree again.
ADVICE = (
    "Make model and assigner with the same arguments on all ranks, and call freeze, forget, assign_ and "
    "load_state_dict on all alike. Unequal machines build unequal banks: DistributedDataParallel gives all ranks those "
    "of rank 0, and so does loading one checkpoint."
)


class DynamicAssigner(RunningMeans):
    r"""Keeps a running mean embedding of every label and matches labels to prototypes by it.

    $$
    m_c \leftarrow \operatorname{normalise}(\mu \, m_c + (1 - \mu) \, \bar z_c), \qquad
        \sigma = \arg\max_{\sigma \text{ injective}} \sum_c \langle m_c, w_{\sigma(c)} \rangle
    $$

    The criteria of this library call `update` with each training batch; the training loop calls `step` once an epoch.
    All heads of a model share one bank and one assignment, and both stay on the heads: an assigner can be thrown away
    after training. The means follow the model's device by themselves. A deep copy of the model is another model:
    an assigner made for the original moves the labels of the original alone.

    Args:
        source: a converted model (bare or wrapped), or a head.
        momentum: weight mu of the OLD mean, in [0, 1); None for the plain mean of all embeddings since the last step.
            The code published with the paper has an effective 0.95 where the paper says 0.9.
        solver: method of `functional.solve_assignment`.
        process_group: the ranks that `step` combines, those that share out the data; by default all. Where several
            ranks get the same data, as in tensor parallelism, it is the group of one of each. Copies have it too; a
            pickle has none, and what comes out of it asks for it.
        attach: let this state travel in the model's own `state_dict`, behind its other entries, for engines that save
            nothing else. It is no part of the model, copies and averages of which have none; checkpoints with and
            without it load into models with and without it.
        step_every: batches after which `step` is called by itself, for engines without a hook at the end of an epoch;
            counted in the `state_dict`.

    Attributes:
        class_means: (C, D) float32 buffer, unit rows; zero for a label never seen.
        class_counts: (C,) float64 buffer, samples seen of each label (sums of weights for soft targets): by all ranks
            up to the last step, by this one since.
        pending_counts: (C,) float64 buffer, samples that this rank has seen since the last step.
        combined_counts: (C,) float64 buffer, samples seen by all ranks up to the last step: apart from what this rank
            adds batch by batch, which rounds otherwise than what other ranks add.
        class_sums: (C, D) float32 buffer, sums of the embeddings since the last step; with `momentum=None` only.
        frozen: () int64 buffer, 1 or 0; see `freeze`.
        prices: (P,) float32 buffer, where the next matching starts from; it saves time, decides nothing, and is in no
            checkpoint.
        lost_counts: (C,) float64 buffer, samples since the last step that are in no mean, since the model returned NaN
            or infinity for them; in no checkpoint.
        writers: () int64 buffer, the ranks that fed what is pending, as bits; in checkpoints where it was another than
            the first.
        noticed: (4,) int64 buffer, batches since the last step that look like a mistake; in no checkpoint.
        format_version: () int64 buffer, of the checkpoint's format.

    Counts are float32 on devices without float64 (Apple's GPUs), where they end at 2^24 for a label. After `to_empty`
    an assigner is as a new one.

    Raises:
        HeadNotFoundError: source has no head.
        BankError: its heads do not share one bank.
        ArgumentError: momentum outside [0, 1), or a process group without this rank.
        ShapeError: the model's buffers are DTensors.

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

    frozen: Tensor
    prices: Tensor
    noticed: Tensor

    def __init__(
        self,
        source: nn.Module,
        *,
        momentum: float | None = 0.9,
        solver: AssignmentMethod = "auto",
        process_group: ProcessGroup | None = None,
        attach: bool = False,
        step_every: int | None = None,
    ) -> None:
        heads = require_heads(source)
        first = heads[0]
        check_whole(first.assignment, "the head's assignment")
        super().__init__(first.num_classes, first.dim, first.assignment.device, momentum, process_group)
        choice(solver, "solver", get_args(AssignmentMethod))
        # In a tuple, so that the model does not become a submodule of the criterion.
        self._heads = heads
        self.solver: AssignmentMethod = solver
        self._history: deque[AssignmentStep] = deque(maxlen=KEPT_STEPS)
        self._oversights = Oversights(ModuleRef(unwrapped(source)))
        head = self.head
        # Where the next matching starts from. It saves time and decides nothing: not part of the state_dict.
        prices = torch.zeros(head.bank.num_prototypes, dtype=torch.float32, device=self.class_means.device)
        self.register_buffer("prices", prices, persistent=False)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int64, device=self.class_means.device))
        noticed = torch.zeros(NUM_NOTICED, dtype=torch.int64, device=self.class_means.device)
        self.register_buffer("noticed", noticed, persistent=False)
        self.step_every = None if step_every is None else whole_number(step_every, "step_every", smallest=1)
        self._num_batches = 0
        self._num_pauses = 0
        if flag(attach, "attach"):
            head.attach(self)
            unwrapped(source).register_state_dict_post_hook(Attachment(head, self))  # type: ignore[no-untyped-call]

    @property
    def head(self) -> HypersphericalHead:
        """The head (the first one, where a model has several)."""
        return self._heads[0]

    @property
    def history(self) -> tuple[AssignmentStep, ...]:
        """The steps of this process so far, of more than 1,000 the latest."""
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
        if len(index):
            self._common_means = fingerprint(f"{self._common_means} without {sorted(set(index.tolist()))}")
        for buffer in (self.class_means, self.class_sums, self.pending_counts, self.lost_counts):
            if buffer is not None:
                buffer.index_fill_(0, index.to(buffer.device), 0.0)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> None:
        """Feed a batch to the class means; in place.

        Costs O(B D) from embeddings and O(B D^2) from logits, whose embeddings are recovered by least squares. A
        sample for which the model returned NaN or infinity is left out; `step` tells, and raises where most were.

        Args:
            output: what the model returned in training: logits (B, C) or embeddings (B, D), or those of positions; see
                `Codebook.read`.
            target: labels (B,) int64, or soft targets (B, C), whose entries, less the smallest of their row, weigh the
                samples: the uniform part of label smoothing says nothing about a label. Where a label's weights add up
                to less than one sample, its mean moves by that fraction of a step; below half a sample it starts none.
                Of positions labels (B, ...), and soft targets with C where the output has it.
            ignore_index: label of samples that feed no mean.

        Raises:
            ShapeError, LabelError: output or target do not fit; nothing has changed then.
            ArgumentError: within a transform of torch.func, which allows no change of state.
        """
        readout = self.head.read(output)
        ignored = whole_number(ignore_index, "ignore_index", smallest=SMALLEST_INT)
        self.feed(readout, readout.read_target(target, ignore_index=ignored))

    @torch.no_grad()
    def feed(self, readout: Readout, target: Target) -> None:
        """What `update` does with an output that has been read and a target that has been checked."""
        if self._num_pauses:
            return
        if target.values.shape[0] > 0:
            self._feed(readout, target)
        if self.step_every is not None:
            self._num_batches += 1
            if self._num_batches >= self.step_every:
                self.step()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this block no batch is fed: for what calls a criterion twice for a batch, or for no training.

        Such as closures of L-BFGS, the second pass of SAM, and searches for a learning rate.
        """
        self._num_pauses += 1
        try:
            yield
        finally:
            self._num_pauses -= 1

    def _feed(self, readout: Readout, target: Target) -> None:
        if not torch.compiler.is_compiling() and not has_memory(readout.output):
            raise ArgumentError(
                "expected to feed the assigner outside of torch.func's transforms, which change no state. Make the "
                "criterion from the model, and call assigner.update(output, target) outside."
            )
        self._take_in(readout, target)
        count_batch_(self.noticed, readout, target)
        self._oversights.watch(self.head, readout)

    def leave_out(self, *, criterion_trains: bool) -> None:
        """Note, for the next step to tell, that a loss has gradients and that its criterion does not feed this."""
        self._oversights.leave_out(criterion_trains=criterion_trains)

    def step(self) -> AssignmentStep:
        r"""Match labels to prototypes by the class means and write the assignment into the heads; in place.

        Under torch.distributed every rank of the process group must call it. Ranks that differ in prototypes,
        assignment, momentum, counts, kept means or whether they are frozen all raise. Means are combined over the
        ranks, and the first one solves: all have its means and its assignment then, bit for bit, also where their
        machines round differently. With `momentum=None` the means are what one process would have that saw all
        batches, to rounding. With a momentum every rank moves its own means by its own batches, and they are combined
        with weights n, the samples of the label on each rank since the last step; no order of the ranks enters but
        that in which torch.distributed adds up.

        $$ m_c = \operatorname{normalise}\Big(\sum_r n_{rc} \, m_{rc}\Big) $$

        Returns:
            What changed.

        Raises:
            HeadNotFoundError: the head is no longer part of its model, or not the one that is called.
            RankError: ranks differ, or another one raised an error; on every rank but that one.
            HyperprotoWarning: once for each cause, what was probably not meant, such as that no batch came.
            AssignmentError: the model returned NaN or infinity for half of the samples or more, with the labels, or
                state of one rank that was written over another's; the same on every rank. Means and assignment stay
                as they were.
        """
        started = time.perf_counter()
        head, group = self.head, self.process_group
        device = head.assignment.device
        self._group.check()
        with agreement(device, advice=ADVICE, process_group=group) as facts:
            head.placement.check(head)
            self._heads = self._oversights.heads(self._heads)
            check_whole(head.assignment, "the head's assignment")
            if head.assignment.is_meta:
                raise AssignmentError("expected a model to step, got one without values. Load a checkpoint first.")
            # A rank without a batch has not followed the model yet, and NCCL takes no tensor of the CPU.
            self._follow_device(device)
            facts.update(self._facts())
        combined = self._combine_ranks()
        solution = decided_by_first(lambda: self._solve(combined), device, process_group=group)
        means, total, lost = combined.means.clone(), combined.total.clone(), combined.lost.clone()
        share_first_(means, process_group=group)
        moved = solution.assignment != head.assignment.cpu()
        if solution.prices is not None:
            self.prices.copy_(solution.prices)
        if not bool(self.frozen):
            for each in self._heads:
                each.assign_(solution.assignment.to(each.assignment.device))
        self._begin_round(means, total)
        self._num_batches = 0
        record = AssignmentStep(
            changed=int(moved.sum()),
            similarity_before=solution.similarity_of_current,
            similarity_after=solution.similarity,
            solver=solution.method,
            optimal=solution.optimal,
            seconds=time.perf_counter() - started,
            equiangular=is_simplex(head.bank()),
            packed_moved=packed_labels(moved),
            packed_unseen=packed_labels(~means.any(dim=1).cpu()),
        )
        self._history.append(record)
        self._oversights.tell(head, self.class_counts, total, lost, self.noticed)
        self.noticed.zero_()
        return record

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.step_every is not None:
            destination[prefix + NUM_BATCHES] = torch.tensor(self._num_batches, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        num_batches = state_dict.pop(prefix + NUM_BATCHES, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._num_batches = 0 if num_batches is None else int(num_batches)

    def _facts(self) -> dict[str, Fact]:
        bank = self.head.bank
        return {
            "the number of labels": self.num_classes,
            "the dimension": self.dim,
            "the number of prototypes": bank.num_prototypes,
            "the prototypes": bank(),
            "the assignment": self.head.assignment,
            "whether it is frozen": int(self.frozen),
            **super()._facts(),
        }

    def _solve(self, combined: Combined) -> AssignmentSolution:
        check_finite(combined.sums, combined.total, combined.lost)
        head, means = self.head, combined.means.cpu()
        prototypes, current = head.bank().cpu(), head.assignment.cpu()
        if bool(self.frozen):
            similarity = total_similarity(means, prototypes, current)
            return AssignmentSolution(current, similarity, similarity, optimal=False, method="frozen")
        return solve_assignment(means, prototypes, current=current, method=self.solver, prices=self.prices)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"num_classes={self.head.num_classes}, dim={self.head.dim}, momentum={self.momentum}"
