"""Put hyperspherical heads in the place of a model's classifiers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hyperproto.arguments import flag, seed_number, shown, whole_number
from hyperproto.bank import PrototypeBank
from hyperproto.class_names import check_number_of_names, read_class_names
from hyperproto.codebook import TrainingOutput
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.conversion.describe import describe
from hyperproto.conversion.like import Task, find_tasks
from hyperproto.conversion.loading import guard_loading
from hyperproto.conversion.locate import (
    Leaf,
    check_unwrapped,
    find_classifiers,
    known_names,
    num_inputs,
    num_outputs,
    put_in_place,
)
from hyperproto.conversion.reach import check_reach
from hyperproto.conversion.record import RECORD, Conversion, Snapshot, count_parameters, find_reference
from hyperproto.conversion.restore import guard_reset, restore_model
from hyperproto.conversion.stored import State, read_state
from hyperproto.conversion.structures import (
    build_missing_classifier,
    drop_token_head,
    keep_unfused,
    move_behind_pooling,
    name_architecture,
    resize_auxiliary,
    set_num_classes,
    set_num_labels,
)
from hyperproto.conversion.warm_start import centred_weights, warm_start_
from hyperproto.errors import AlreadyConvertedError, ArgumentError
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads
from hyperproto.projection import Projection

logger = logging.getLogger(__name__)


def convert_model(
    model: nn.Module,
    *,
    dim: int | None = None,
    num_classes: int | None = None,
    bank: str | PrototypeBank = "auto",
    classifier: str | None = None,
    projection: Projection = "auto",
    training_output: TrainingOutput = "logits",
    warm_start: bool = False,
    seed: int = 0,
    like: State | str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | Any = None,
) -> nn.Module:
    """Replace the model's classifiers by `HypersphericalHead`s, in place; returns the same model.

    Plans and checks first: on an error the model is as it was. Device, train or eval mode and dtype are kept, every
    other parameter stays bit for bit. Create the optimiser, wrap (DistributedDataParallel, fully_shard,
    torch.compile) and load checkpoints of converted models afterwards.

    Where a model combines several classifiers (distilled pairs, CrossViT, EfficientViM), each gets a head with a
    projection of its own, and all share one bank and one assignment. The output is then a convex combination of
    cosines times the scale, as that of one head is. VOLO's token classifier, which adds a maximum to the logits, is
    taken out, and SqueezeNet's classifier is rebuilt without its ReLU. `describe(model)` tells what was done, and the
    logger "hyperproto.conversion.convert" says the same at level INFO.

    Args:
        model: any timm or torchvision classifier, an image classifier of transformers, open_clip's and fastai's
            wrappers of timm models, or any module with `classifier` given. The classifier is one or more layers
            nn.Linear or nn.Conv2d of size 1. timm's `reset_classifier` on a converted model restores it first.
        dim: dimension D of the embeddings; by default the bank's, or the width of the features (the smallest, where
            several classifiers differ).
        num_classes: number of labels; by default the old classifier's. Needed for models made with num_classes=0.
        bank: a method of `PrototypeBank`, or a bank. "auto" is a warm start's own in fewer than C - 1 dimensions: that
            of the trained class vectors (`PrototypeBank.from_class_vectors`).
        classifier: dotted name of the layer to replace, where the model does not say so itself. A model of several
            tasks is converted once for each of them, with a bank and an assignment of its own; `restore_model` undoes
            all.
        projection: see `HypersphericalHead`.
        training_output: see `HypersphericalHead`.
        warm_start: start from a trained classifier: choose projections and assignment so that the converted model
            ranks classes as the trained one does, as far as D allows. See `conversion.warm_start.warm_start_`.
        seed: of the bank and of the projections' start.
        like: a `state_dict`, file or folder of a converted model of this kind: its heads are found by their keys, and
            this model gets the same, with their prototypes, assignment and scale, but fresh projections. No bank is
            built. `training_output` and `class_names` are in no `state_dict`; the arguments above are, and are not to
            be given beside it. `load_model` does this and loads.
        class_names: C names in the order of the labels, or a data set that has them (`classes` or `class_to_idx`, as
            torchvision's ImageFolder). `describe` and `save_pretrained` show them, `check_class_names` compares them.

    Raises:
        AlreadyConvertedError: the model has a hyperspherical head, and `classifier` names no layer of another task.
        HeadNotFoundError: no classifier found, or one whose output something changes on its way to the model's (an
            activation, an adapter, a further layer), or a model that DistributedDataParallel, fully_shard or
            torch.compile has wrapped already; says what to do.
        BankError, ArgumentError: the heads cannot be built with these arguments.
        ArgumentError, ShapeError: a warm start from no trained classifier, or from one of other classes.
        LabelError: names that are not as many as labels, or not different.
        CheckpointError: what `like` is has no head that this model could have.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> convert_model(model, dim=2, classifier="1") is model
        True
        >>> model(torch.randn(3, 4, 4)).shape
        torch.Size([3, 4])
    """
    names = read_class_names(class_names)
    if like is not None:
        made_of = [dim, num_classes, classifier, *(None if each == "auto" else each for each in (bank, projection))]
        if any(each is not None for each in (*made_of, warm_start or None, seed or None)):
            raise ArgumentError(
                "expected like= without dim, num_classes, bank, classifier, projection, warm_start and seed, which it "
                "tells. Drop these."
            )
        _convert_like(model, read_state(like), training_output, names)
    else:
        wanted = _Wanted(
            training_output=training_output,
            class_names=names,
            classifier=classifier,
            dim=dim,
            num_classes=num_classes,
            bank=bank,
            projection=projection,
            warm_start=warm_start,
            seed=seed,
        )
        _convert(model, wanted)
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", describe(model))
    return model


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What one conversion is asked for: the arguments of `convert_model`, or what a checkpoint says in their place."""

    training_output: TrainingOutput
    class_names: tuple[str, ...] | None
    classifier: str | None = None
    dim: int | None = None
    num_classes: int | None = None
    bank: str | PrototypeBank = "auto"
    projection: Projection = "auto"
    warm_start: bool = False
    seed: int = 0
    task: Task | None = None

    def checked(self) -> _Wanted:
        """The same with numbers of Python's own.

        Raises:
            ArgumentError: of another kind or out of range.
        """
        if self.classifier is not None and not isinstance(self.classifier, str):
            raise ArgumentError(f"expected classifier to be the dotted name of a layer, got {shown(self.classifier)}.")
        count = self.num_classes
        return replace(
            self,
            dim=None if self.dim is None else whole_number(self.dim, "dim"),
            num_classes=None if count is None else whole_number(count, "num_classes", smallest=2),
            warm_start=flag(self.warm_start, "warm_start"),
            seed=seed_number(self.seed),
        )


def _convert_like(
    model: nn.Module, state: State, training_output: TrainingOutput, class_names: tuple[str, ...] | None
) -> None:
    """One conversion for each task that a checkpoint has; all of them or none."""
    others = get_heads(model)
    if others:
        _check_no_head_at(model, others, None)
    try:
        for task in find_tasks(model, state):
            wanted = _Wanted(
                training_output=training_output,
                class_names=class_names,
                classifier=task.classifier,
                num_classes=task.first.num_classes,
                bank=task.build_bank(),
                projection=task.first.projection,
                task=task,
            )
            _convert(model, wanted)
    except BaseException:
        if RECORD in model.__dict__:
            restore_model(model)
        raise


def _convert(model: nn.Module, wanted: _Wanted) -> None:
    wanted = wanted.checked()
    others = get_heads(model)
    _check_no_head_at(model, others, wanted.classifier)
    check_unwrapped(model)
    before = Snapshot(model)
    record = Conversion({}, count_parameters(model))
    with before.undo_on_error():
        leaves = _find_leaves(model, wanted, record)
        heads = _build_heads(leaves, wanted)
        if wanted.warm_start:
            record.notes += _warm_start(heads, leaves)
        found = wanted.classifier is None or wanted.classifier in known_names(model)
        _put_in(model, leaves, heads, record, wanted.seed)
        in_place = dict(zip(record.leaves, heads.values(), strict=True))
        if wanted.task is not None:
            wanted.task.check_names(list(in_place))
            for name, head in in_place.items():
                head.load_state_dict(wanted.task.own_entries(name), strict=False)
        if not others:
            count = next(iter(heads.values())).num_classes
            set_num_classes(model, list(in_place), count)
            set_num_labels(model, count)
            name_architecture(model)
        check_reach(model, in_place, found=found)
        record.num_parameters_after = count_parameters(model)
        record.changes = before.changes()
        record.requires_grad = before.changed_flags()
        earlier = model.__dict__.get(RECORD)
        if earlier is None:
            record.load_check = guard_loading(model)
        else:
            record.add_earlier(earlier)
        model.__dict__[RECORD] = record


def _find_leaves(model: nn.Module, wanted: _Wanted, record: Conversion) -> dict[str, Leaf]:
    """The layers that heads are going to stand for; builds and takes out what the structure asks for."""
    if wanted.classifier is None:
        record.notes += build_missing_classifier(model, wanted.num_classes, wanted.seed)
    if record.notes and wanted.warm_start:
        raise ArgumentError("a warm start needs a trained classifier; this model was made without one.")
    leaves = find_classifiers(model, wanted.classifier)
    if "" in leaves:
        raise ArgumentError("a bare layer cannot be replaced in place: use HypersphericalHead itself.")
    dropped, notes = drop_token_head(model, leaves)
    record.dropped, record.notes = dict(dropped), record.notes + notes
    leaves = {name: leaf for name, leaf in leaves.items() if name not in dropped}
    if wanted.task is not None:
        wanted.task.check_widths({name: num_inputs(leaf) for name, leaf in leaves.items()})
    return leaves


def _check_no_head_at(model: nn.Module, heads: dict[str, HypersphericalHead], classifier: str | None) -> None:
    """Raise if the model is converted already, unless a layer of another task is named."""
    if not heads or (classifier is not None and not any(_overlap(name, classifier) for name in heads)):
        return
    raise AlreadyConvertedError(
        f"{type(model).__name__} already has a hyperspherical head at {', '.join(map(repr, heads))}. "
        "Call hyperproto.restore_model(model) first to convert it differently; for a second task name its layer: "
        'convert_model(model, classifier="dotted.name").'
    )


def _overlap(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _build_heads(leaves: dict[str, Leaf], wanted: _Wanted) -> dict[str, HypersphericalHead]:
    """A head for each leaf, where and in the dtype and mode that the leaf is; all share the first one's bank."""
    dim, num_classes = wanted.dim, wanted.num_classes
    if num_classes is None:
        num_classes = num_outputs(next(iter(leaves.values())))
    bank = _bank_of_warm_start(leaves, dim, num_classes, wanted.bank) if wanted.warm_start else wanted.bank
    if dim is None and isinstance(bank, str):
        dim = min(num_inputs(leaf) for leaf in leaves.values())
    heads: dict[str, HypersphericalHead] = {}
    for index, (name, leaf) in enumerate(leaves.items()):
        kind = ChannelsFirstHead if isinstance(leaf, nn.Conv2d) else HypersphericalHead
        head = kind(
            num_inputs(leaf),
            num_classes,
            dim=dim,
            bank=bank,
            projection=wanted.projection,
            training_output=wanted.training_output,
            seed=wanted.seed + index,
        )
        check_number_of_names(wanted.class_names, num_classes)
        head.class_names = wanted.class_names
        # One object for all heads of a model, which a bank that is in use already would not be.
        head.bank = bank = next(iter(heads.values()), head).bank
        heads[name] = head
    for name, leaf in leaves.items():
        # Quantised weights are integers, which a head cannot be trained in.
        dtype = leaf.weight.dtype if leaf.weight.is_floating_point() else torch.get_default_dtype()
        # What has made the parameters without values, as accelerate and transformers do, leaves the buffers theirs.
        empty = leaf.weight.is_meta and any(parameter.is_meta for parameter in heads[name].parameters())
        heads[name].to(device=None if empty else leaf.weight.device, dtype=dtype).train(leaf.training)
    return heads


def _bank_of_warm_start(
    leaves: dict[str, Leaf], dim: int | None, num_classes: int, bank: str | PrototypeBank
) -> str | PrototypeBank:
    """Where "auto" would make prototypes that the classifier does not fit on, those of its own class vectors."""
    if not (isinstance(bank, str) and bank == "auto") or dim is None or dim >= num_classes - 1:
        return bank
    first = next(iter(leaves.values()))
    return PrototypeBank.from_class_vectors(centred_weights(first, num_classes, num_inputs(first))[0], dim)


def _warm_start(heads: dict[str, HypersphericalHead], leaves: dict[str, Leaf]) -> list[str]:
    """Fit each head to its leaf; the first one chooses the assignment of all."""
    notes: list[str] = []
    assignment = None
    for name, head in heads.items():
        notes.append(f"{name}: {warm_start_(head, leaves[name], assignment=assignment)}")
        assignment = head.assignment
    return notes


def _put_in(
    model: nn.Module, leaves: dict[str, Leaf], heads: dict[str, HypersphericalHead], record: Conversion, seed: int
) -> None:
    """Swap leaves for heads and do what the structure needs beyond that; fills the record."""
    for name, head in heads.items():
        record.notes += keep_unfused(model, name)
        target, notes = move_behind_pooling(model, name)
        record.notes += notes
        record.leaves[target] = leaves[name]
        put_in_place(model, model.get_submodule(target), head)
    num_classes = next(iter(heads.values())).num_classes
    record.notes += resize_auxiliary(model, num_classes, seed)
    record.reference = find_reference(model, record.leaves)
    guard_reset(model)
