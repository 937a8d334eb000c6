"""What a conversion changed: found by comparing the model before and after, kept on it, and undone by it.

Nothing has to be listed by hand: a layer replaced, a classifier built by timm's `reset_classifier`, an attribute
such as `num_classes` are all entries of a module's dictionaries that are another object afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyperproto.arguments import module as check_module
from hyperproto.conversion.locate import Leaf
from hyperproto.errors import HeadNotFoundError
from hyperproto.head import HypersphericalHead
from hyperproto.module_ref import ModuleRef

RECORD = "_hyperproto_conversion"
TABLES = ("_modules", "_parameters", "_buffers")


@dataclass
class Change:
    """One entry of one of a module's dictionaries before the conversion.

    Attributes:
        module: whose dictionary.
        table: one of `TABLES`, or "" for plain attributes.
        key: name of the entry.
        existed: whether it was there.
        before: what it was.
    """

    module: ModuleRef
    table: str
    key: str
    existed: bool
    before: Any

    def entries(self) -> dict[str, Any]:
        """The dictionary that the entry belongs to."""
        attributes = self.module().__dict__
        return attributes[self.table] if self.table else attributes

    def undo(self) -> None:
        """Put the entry back."""
        if self.existed:
            self.entries()[self.key] = self.before
        else:
            self.entries().pop(self.key, None)


@dataclass
class Conversion:
    """What `restore_model`, `to_linear` and `describe` have to know of a converted model.

    Holds modules, not their names, so that a deep copy or a pickle of the model carries its own; weakly those that are
    part of the model, which it must not keep in memory.

    Attributes:
        leaves: the layers that heads stand for now, by the heads' dotted names.
        num_parameters: of the whole model, before.
        num_parameters_after: the same afterwards.
        changes: in the order in which they are undone.
        requires_grad: parameters (module, name) whose flag was changed, and what it was.
        dropped: layers taken out without a head in their place, by dotted name.
        notes: what was done beyond replacing the layers, one sentence each.
        reference: a parameter of the leaves' dtype, by the model and its dotted name, which tells where the model has
            moved, also where another layer has come in its place or something computes it.
        load_check: takes the check of checkpoints off the model.
    """

    leaves: dict[str, Leaf]
    num_parameters: int
    num_parameters_after: int = 0
    changes: list[Change] = field(default_factory=list)
    requires_grad: list[tuple[ModuleRef, str, bool]] = field(default_factory=list)
    dropped: dict[str, Leaf] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: tuple[ModuleRef, str] | None = None
    load_check: RemovableHandle | None = None

    def add_earlier(self, earlier: Conversion) -> None:
        """Take over what an earlier conversion of the same model, for another task, has changed."""
        self.leaves = earlier.leaves | self.leaves
        self.num_parameters = earlier.num_parameters
        self.changes = self.changes + earlier.changes
        self.requires_grad = self.requires_grad + earlier.requires_grad
        self.dropped = earlier.dropped | self.dropped
        self.notes = earlier.notes + self.notes
        self.load_check = earlier.load_check

    def undo(self) -> None:
        """Bring the model back; layers follow the device, dtype and mode that it has now."""
        for change in self.changes:
            if change.table == "_modules" and change.before is not None:
                self._bring_up_to_date(change.before, change.entries().get(change.key), change.module())
            change.undo()
        for module, name, flag in self.requires_grad:
            module().get_parameter(name).requires_grad_(flag)

    def witness(self, replacement: nn.Module | None) -> Tensor | None:
        """A tensor whose device and dtype tell where a layer belongs that comes in the place of another."""
        for parameter in () if replacement is None else replacement.parameters():
            return parameter
        if self.reference is None:
            return None
        found: Any = self.reference[0]()
        for part in self.reference[1].split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, Tensor) else None

    def _bring_up_to_date(self, layer: nn.Module, replacement: nn.Module | None, parent: nn.Module) -> None:
        witness = self.witness(replacement)
        if witness is not None:
            layer.to(device=witness.device, dtype=witness.dtype)
        elif isinstance(replacement, HypersphericalHead):  # without a projection: its buffers keep float32
            layer.to(device=replacement.logit_scale.device)
        if replacement is not None:  # the tables of hooks are the same objects already
            layer._is_full_backward_hook = replacement._is_full_backward_hook
        layer.train(parent.training if replacement is None else replacement.training)


class Snapshot:
    """The model as it is now, by reference: which objects its modules hold."""

    def __init__(self, model: nn.Module) -> None:
        self._entries = [(module, _entries_of(module)) for module in model.modules()]
        self._flags = [
            (module, name, parameter, parameter.requires_grad)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def changes(self) -> list[Change]:
        """Entries that hold another object than at the time of the snapshot."""
        found = []
        for module, before in self._entries:
            after = _entries_of(module)
            for table, key in {**before, **after}:
                existed = (table, key) in before
                if not existed or (table, key) not in after or before[table, key] is not after[table, key]:
                    found.append(Change(ModuleRef(module), table, key, existed, before.get((table, key))))
        return found

    def changed_flags(self) -> list[tuple[ModuleRef, str, bool]]:
        """Parameters whose `requires_grad` is another, and what it was."""
        return [
            (ModuleRef(module), name, flag)
            for module, name, parameter, flag in self._flags
            if parameter.requires_grad != flag
        ]

    @contextmanager
    def undo_on_error(self) -> Iterator[None]:
        """Bring the model back as it was if the block raises."""
        try:
            yield
        except BaseException:
            flags = self.changed_flags()
            for change in self.changes():
                change.undo()
            for module, name, flag in flags:
                module().get_parameter(name).requires_grad_(flag)
            raise


def get_record(model: nn.Module, verb: str) -> Conversion:
    """The record of a converted model.

    Raises:
        HeadNotFoundError: the model was not converted, or the converted model is inside this one.
        ArgumentError: it is no model.
    """
    record = check_module(model).__dict__.get(RECORD)
    if isinstance(record, Conversion):
        return record
    label = type(model).__name__
    for name, module in model.named_modules():
        if RECORD in module.__dict__:
            raise HeadNotFoundError(
                f"{label} wraps a converted model: its structure can be changed from inside only. "
                f"Call {verb}(model.{name}), and wrap what comes back again."
            )
    raise HeadNotFoundError(
        f"{label} was not converted: there is nothing to restore or to fold. "
        "Call hyperproto.convert_model(model) first."
    )


def find_reference(model: nn.Module, leaves: dict[str, Leaf]) -> tuple[ModuleRef, str] | None:
    """A parameter outside the leaves that has their dtype, if there is one."""
    own = {id(parameter) for leaf in leaves.values() for parameter in leaf.parameters()}
    dtypes = {parameter.dtype for leaf in leaves.values() for parameter in leaf.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own and parameter.dtype in dtypes and torch.is_floating_point(parameter):
            return ModuleRef(model), name
    return None


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen weights, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _entries_of(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Every entry of a module's dictionaries by (table, key)."""
    plain = {("", key): value for key, value in module.__dict__.items() if key not in TABLES}
    return plain | {(table, key): value for table in TABLES for key, value in module.__dict__[table].items()}
