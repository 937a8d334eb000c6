"""What the entries of a head in a `state_dict` say of how it was made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperproto.bank import PrototypeBank
from hyperproto.checkpoint import prefix_of
from hyperproto.conversion.locate import is_leaf, known_names
from hyperproto.conversion.stored import State, head_names
from hyperproto.errors import CheckpointError
from hyperproto.projection import Projection

#: Entries of each kind of projection.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PROJECTIONS: dict[frozenset[str], Projection] = {
    frozenset(): "none",
    frozenset({"weight"}): "linear",
    frozenset({"0.weight", *(f"1.{name}" for name in NORM)}): "linear+bn",
}

WEIGHTS: dict[Projection, str] = {"linear": "weight", "linear+bn": "0.weight"}

BY_HAND = (
    "Convert the model with the arguments that the saved one was converted with, and call model.load_state_dict(state)."
)


@dataclass(frozen=True)
class StoredHead:
    """A head as a `state_dict` has it.

    Attributes:
        name: dotted name in the model.
        prototypes: name of the entry that holds its bank, which several heads may share.
        num_classes: C.
        in_features: width of the features.
        projection: its kind.
    """

    name: str
    prototypes: str
    num_classes: int
    in_features: int
    projection: Projection


@dataclass(frozen=True)
class Task:
    """Heads that share a bank and an assignment: one call of `convert_model`.

    Attributes:
        state: all entries.
        heads: at least one.
        classifier: which layer to name, or None where the model itself knows.
    """

    state: State
    heads: tuple[StoredHead, ...]
    classifier: str | None

    @property
    def first(self) -> StoredHead:
        """Any of them: they differ in their names, their widths and what they have learnt."""
        return self.heads[0]

    def build_bank(self) -> PrototypeBank:
        """A bank of the prototypes that are stored: none is constructed.

        Raises:
            BankError: they are none.
        """
        return PrototypeBank.from_checkpoint(self.state, self.first.prototypes)

    def own_entries(self, name: str) -> dict[str, Tensor]:
        """Assignment and scale of the head of that name, by the names that a head has for them."""
        start = prefix_of(name)
        entries = {key.removeprefix(start): value for key, value in self.state.items() if key.startswith(start)}
        return {key: value for key, value in entries.items() if "." not in key}

    def check_names(self, names: list[str]) -> None:
        """Raise unless the heads are where the stored ones were.

        Raises:
            CheckpointError: they are not.
        """
        stored = [head.name for head in self.heads]
        if sorted(names) != sorted(stored):
            raise CheckpointError(
                f"the checkpoint has heads at {', '.join(map(repr, stored))}, and this model's classifier is at "
                f"{', '.join(map(repr, names))}. Make the model as the saved one was made."
            )

    def check_widths(self, widths: dict[str, int]) -> None:
        """Raise unless the layers that heads are going to stand for have the features that the stored heads take.

        Raises:
            CheckpointError: they have not.
        """
        stored = {head.name: head.in_features for head in self.heads}
        if sorted(widths.values()) != sorted(stored.values()):
            raise CheckpointError(
                f"the checkpoint's heads take features of other widths, {stored}, than the model has at its "
                f"classifiers, {widths}. Make the model as the saved one was made."
            )


def find_tasks(model: nn.Module, state: State) -> list[Task]:
    """The heads of a converted model by the keys of its `state_dict`, those that share a bank together.

    Args:
        model: as it is before it is converted likewise.
        state: as `read_state` returns it.

    Raises:
        CheckpointError: entries of one head contradict each other, or are of a kind that `convert_model` does not make.
    """
    known, modules = known_names(model), dict(model.named_modules())
    together: list[StoredHead] = []
    alone: list[StoredHead] = []
    for name in head_names(state):
        head = _read_head(state, name)
        # What the model knows of, or is going to have, is converted by one call.
        (together if name in known or not is_leaf(modules.get(name)) else alone).append(head)
    for head in together[1:]:
        _check_shared(state, together[0], head)
    first = [Task(state, tuple(together), None)] if together else []
    return first + [Task(state, (head,), head.name) for head in alone]


def _read_head(state: State, name: str) -> StoredHead:
    start = prefix_of(name)
    assignment = state[start + "assignment"]
    inside = start + "projection."
    layers = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
    kind = PROJECTIONS.get(frozenset(layers))
    if kind is None:
        raise CheckpointError(
            f"the projection of the checkpoint's head {name!r} has the entries {', '.join(sorted(layers))}, which are "
            f"those of no projection that convert_model makes. {BY_HAND}"
        )
    prototypes = _bank_of(state, name)
    bank = state[prototypes]
    shapes = {"assignment": assignment.shape, "bank.prototypes": bank.shape}
    if kind in WEIGHTS:
        shapes["projection weight"] = layers[WEIGHTS[kind]].shape
    fits = assignment.dim() == 1 and bank.dim() == 2 and 2 <= len(assignment) <= len(bank) and bank.shape[1] >= 2
    in_features = bank.shape[-1]
    if kind in WEIGHTS:
        weight = layers[WEIGHTS[kind]]
        fits = fits and weight.dim() == 2 and len(weight) == bank.shape[1]
        in_features = weight.shape[-1]
    if not fits:
        raise CheckpointError(
            f"the entries of the checkpoint's head {name!r} are not those of one head: expected an assignment (C,), "
            f"prototypes (P, D) with P >= C, and a projection's weight (D, in_features), got {_shown(shapes)}."
        )
    return StoredHead(name, prototypes, len(assignment), in_features, kind)


def _bank_of(state: State, name: str) -> str:
    """The entry with a head's prototypes: its own, or that of the head which shares its bank."""
    own, assignment = (prefix_of(name) + entry for entry in ("bank.prototypes", "assignment"))
    if own in state:
        return own
    # Heads of one model that share a bank share their assignment.
    others = [
        f"{other}bank.prototypes"
        for other in map(prefix_of, head_names(state))
        if f"{other}bank.prototypes" in state
        and torch.equal(state[f"{other}assignment"].cpu(), state[assignment].cpu())
    ]
    if len(others) != 1:
        raise CheckpointError(
            f"the checkpoint's {own} is missing, and {len(others)} other heads have a bank that might be this one's. "
            f"{BY_HAND}"
        )
    return others[0]


def _check_shared(state: State, first: StoredHead, other: StoredHead) -> None:
    """Raise unless two heads, of a model that combines several, have one bank and one assignment."""
    assignments = (prefix_of(first.name) + "assignment", prefix_of(other.name) + "assignment")
    pairs = [assignments, (first.prototypes, other.prototypes)]
    for one, two in pairs:
        if not torch.equal(state[one].cpu(), state[two].cpu()):
            raise CheckpointError(
                f"the checkpoint's {one} and {two} differ, and the model combines what these heads return. {BY_HAND}"
            )


def _shown(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
