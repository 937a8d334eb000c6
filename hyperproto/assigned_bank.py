"""Fixed prototypes, and which of them stands for which label, through averages, copies and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperproto.arguments import as_tensor
from hyperproto.assignment_record import (
    NUM_EXTRA,
    count_of,
    is_average_with,
    is_of_another,
    next_count,
    read_assignment,
    record_of,
)
from hyperproto.bank import PrototypeBank
from hyperproto.checkpoint import check_format, format_version, stamp_format_
from hyperproto.errors import AssignmentError, BankError
from hyperproto.matching.problem import check_assignment
from hyperproto.modes import makes_graph
from hyperproto.prototypes import has_values
from hyperproto.ranks import has_ranks
from hyperproto.targets import has_memory, writes_of

#: The buffers that say the assignment.
ENTRIES = ("assignment", "assignment_record", "format_version")

#: What to do where an average has no assignment.
ADVICE = (
    "Averages over buffers do that, and those that leave integers as they are. Give the average the model's assignment "
    "before each evaluation, averaged_head.assign_(head.assignment), or average in one of the ways that copy buffers: "
    "timm's ModelEmaV3, torch's AveragedModel(use_buffers=False)."
)


@dataclass(frozen=True)
class _LastSet:
    """What was last set in a head by `assign_`, by loading or by putting it right.

    Attributes:
        writes: the buffers, and how often each had been written then.
        record: of the assignment, as `record_of` makes it, on the CPU.
    """

    writes: tuple[tuple[int, int], ...] = ()
    record: Tensor | None = None


class AssignedBank(nn.Module):
    r"""C labels on prototypes of a bank, $w_{\sigma(k)}$ for label k.

    No prototype ever trains or moves; what changes is `assignment`, an integer buffer, gathered at use. Whatever
    averages, copies or loads the buffers, the assignment is what they had in common or the newest, or evaluation
    raises; `hyperproto.assignment_record` says how. What a user writes into `assignment` is followed.

    Args:
        bank: at least C prototypes. One that another head uses already is copied, so that each moves by itself.
        num_classes: number of labels C, at least 2.

    Attributes:
        assignment: (C,) int64 buffer, the row of the bank that stands for each label.
        assignment_record: (C + 2,) float64 buffer (float32 on a device without), the same for averages to keep.
        format_version: () int64 buffer, of the checkpoint's format, and how often the assignment was set.

    Raises:
        BankError: fewer prototypes than labels.
    """

    assignment: Tensor
    assignment_record: Tensor
    format_version: Tensor

    def __init__(self, bank: PrototypeBank, num_classes: int) -> None:
        super().__init__()
        if bank.num_prototypes < num_classes:
            raise BankError(
                f"expected a bank of at least {num_classes} prototypes, got {bank.num_prototypes}. "
                "Build the bank with more prototypes."
            )
        self.num_classes = num_classes
        self.dim = bank.dim
        self.bank = copy.deepcopy(bank) if bank.in_use else bank
        self.bank.in_use = True
        #: The buffers, and how often each had been written, when they were last looked at in eval mode.
        self._seen: tuple[tuple[int, int], ...] = ()
        self._last_set = _LastSet()
        #: What was wrong with the buffers when the model was put into eval mode.
        self._trouble = ""
        start = torch.arange(num_classes, device="cpu")
        #: Whether it was made or moved to where nothing has values, and no checkpoint has been loaded since.
        self._awaits_values = torch.get_default_device().type == "meta"
        if self._awaits_values:  # what fills the model replaces buffers that have values as well
            self.bank.keep_values()
        self.register_buffer("assignment", start)
        self.register_buffer("assignment_record", record_of(start, count=1))
        self.register_buffer("format_version", format_version(count=1))

    @property
    def class_prototypes(self) -> Tensor:
        """(C, D): row k is the prototype that stands for label k now."""
        return self.bank()[self.assignment]

    def assign_(self, assignment: Tensor) -> None:
        """Let label k be represented by prototype `assignment[k]` from now on; in place.

        Args:
            assignment: (C,) int64, no value twice, each in [0, P).

        Raises:
            AssignmentError: anything else; the old assignment stays.
        """
        assignment = as_tensor(assignment, "an assignment", error=AssignmentError)
        check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
        if self._entries()[0].is_meta:
            raise AssignmentError("the head has no values yet (device meta). Load a checkpoint first.")
        assignment = assignment.detach().cpu()
        self._write(assignment, self._count(assignment))

    def train(self, mode: bool = True) -> AssignedBank:
        """As of any module. The buffers are looked at once more for the next evaluation: some writes leave no trace.

        And here too, for graphs, which cannot look: what is wrong is raised when one is made, or called.
        """
        self._seen, self._trouble = (), ""
        super().train(mode)
        if not (mode or self._awaits_values):
            try:
                self._look()
            except AssignmentError as error:
                self._trouble = str(error)
            self._seen = ()
        return self

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise unless this head can load what a `state_dict` holds for it under a prefix; changes nothing.

        Prototypes are data, and come with their assignment.

        Raises:
            CheckpointError: written by a later version of this library.
            BankError: prototypes of another shape or dtype, rows that are no prototypes, or others without assignment.
            AssignmentError: made for another number of labels, or no assignment.
        """
        check_format(state_dict, prefix)
        self.bank.check_checkpoint(state_dict, prefix + "bank.", alone=prefix + "assignment" not in state_dict)
        self._read_checkpoint(state_dict, prefix)

    def _read_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> Tensor | None:
        """The assignment (C,) of a checkpoint, on the CPU; None where it has none, or no values."""
        assignment, record, stamp = (state_dict.get(prefix + name) for name in ENTRIES)
        if assignment is None or any(each is not None and each.is_meta for each in (assignment, record, stamp)):
            return None
        try:
            return read_assignment(assignment, record, stamp, self.num_classes, self.bank.num_prototypes)
        except AssignmentError as error:
            raise AssignmentError(
                f"the checkpoint's {prefix}assignment does not fit this head of {self.num_classes} labels: {error} "
                "Convert the model with the checkpoint's num_classes before loading; of an average over checkpoints, "
                "average those of one assignment only; or drop the keys of the head to load the others."
            ) from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_checkpoint(state_dict, prefix)
        assignment = self._read_checkpoint(state_dict, prefix)
        count = self._count(assignment)
        if assignment is not None:
            record = state_dict.get(prefix + "assignment_record")
            if record is not None:
                count = count_of(record, state_dict.get(prefix + "format_version"))
            device = state_dict[prefix + "assignment"].device
            state_dict[prefix + "assignment"] = assignment.to(device)
            state_dict[prefix + "assignment_record"] = record_of(assignment, count).to(self.assignment_record.dtype)
        stamp_format_(state_dict, prefix, count)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if assignment is not None:
            self._last_set, self._trouble = _LastSet(writes_of(self._entries()), record_of(assignment, count)), ""

    def _count(self, assignment: Tensor | None) -> int:
        """How often an assignment was set, once this one (C,) is set, or none; 1 where there were no values."""
        present = self._entries()[0]
        if present.is_meta or not has_values(self.bank.prototypes):
            return 1
        is_new = assignment is not None and not torch.equal(assignment, present.cpu())
        return (next_count if is_new else count_of)(self.assignment_record, self.format_version)

    def __getattr__(self, name: str) -> Any:
        # Read by hand, an average has its assignment too, before it is evaluated; what trains is not kept waiting.
        buffer = self._buffers.get(name) if name == "assignment" else None
        if buffer is not None and buffer.device.type == "cpu" and not (self._awaits_values or has_ranks()):
            self._look(in_training=True)
        return super().__getattr__(name)

    def _entries(self) -> list[Tensor]:
        """The three buffers that say the assignment, as they are: to read `assignment` is to look at them."""
        return [cast(Tensor, nn.Module.__getattr__(self, name)) for name in ENTRIES]

    def _look(self, *, in_training: bool = False) -> None:
        """Let the three entries of the assignment say the same again, where something else has written to them.

        Waits for a GPU, but only in eval() and once after it or a write, and in evaluation only: in training buffers
        may be written at every step (DistributedDataParallel broadcasts them), and a graph cannot raise by value.

        Args:
            in_training: look in train mode too, as reading by hand does.

        Raises:
            AssignmentError: they are an average over different assignments, or hold none.
        """
        if makes_graph():
            if self._trouble and not self.training:
                raise AssignmentError(self._trouble)
            return
        if self.training and torch.is_grad_enabled() and not in_training:
            return
        entries = self._entries()
        # Other classes of tensors may have no values to look at, and tensors made in inference mode count no writes.
        if any(type(each) is not Tensor or each.is_meta or each.is_inference() for each in entries):
            return
        if writes_of(entries) == self._seen or not all(map(has_memory, entries)) or not has_values(self.bank()):
            return
        assignment, record, stamp = (each.cpu() for each in entries)
        try:
            found = read_assignment(assignment, record, stamp, self.num_classes, self.bank.num_prototypes)
        except AssignmentError as error:
            # An average that takes the model's place for an evaluation, as Lightning's callbacks let it, comes through
            # `.data`, which counts no writes. What was set here last is then the newest that is in it.
            newest = self._last_set.record if self._last_set.writes == writes_of(entries) else None
            if newest is None or not is_average_with(newest, record, self.bank.num_prototypes):
                raise AssignmentError(f"the buffer `assignment` was written from outside: {error} {ADVICE}") from error
            self._write(newest[:-NUM_EXTRA].long(), int(newest[-1]))
            return
        count = count_of(record, stamp) + int(is_of_another(record, found))
        if not torch.equal(found, assignment) or not torch.equal(record, record_of(found, count).to(record.dtype)):
            self._write(found, count)
        self._note_seen()

    def _note_seen(self) -> None:
        self._trouble = ""
        entries = self._entries()
        if not any(each.is_inference() for each in entries):
            self._seen = writes_of(entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": (), "_last_set": _LastSet()}  # of these tensors, not of a copy's

    @torch.no_grad()
    def _write(self, assignment: Tensor, count: int) -> None:
        entries, record = self._entries(), record_of(assignment, count)
        for entry, value in zip(entries, (assignment, record, format_version(count)), strict=True):
            entry.copy_(value)
        self._note_seen()
        self._last_set = _LastSet(self._seen, record)
