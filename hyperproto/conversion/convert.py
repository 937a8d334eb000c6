"""Put a hyperspherical head in the place of a model's classifier, and take it out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperproto.bank import PrototypeBank
from hyperproto.conversion.locate import find_classifier
from hyperproto.errors import AlreadyConvertedError, ArgumentError, HeadNotFoundError
from hyperproto.head import HypersphericalHead, TrainingOutput, get_heads
from hyperproto.projection import Projection

_RECORD = "_hyperproto_conversion"


@dataclass
class Conversion:
    """What a conversion changed, kept on the model for `restore_model`.

    Attributes:
        name: dotted name of the classifier.
        original: the layer that was there.
        num_classes: the model's attributes of that name before, by dotted name of their module.
    """

    name: str
    original: nn.Linear
    num_classes: dict[str, int]


def convert_model(
    model: nn.Module,
    *,
    dim: int | None = None,
    num_classes: int | None = None,
    bank: str | PrototypeBank = "auto",
    classifier: str | None = None,
    projection: Projection = "auto",
    training_output: TrainingOutput = "logits",
    seed: int = 0,
) -> nn.Module:
    """Replace the model's classifier by a `HypersphericalHead`, in place; returns the same model.

    Plans and checks first: on an error the model is as it was. Device, train or eval mode and dtype are kept, every
    other parameter stays bit for bit. Create the optimiser and load checkpoints of converted models afterwards.

    Args:
        model: any timm or torchvision classifier with one plain nn.Linear as its last layer, or any module with
            `classifier` given.
        dim: dimension D of the embeddings; by default the width of the features.
        num_classes: number of labels; by default the old classifier's.
        bank: a method of `PrototypeBank`, or a bank.
        classifier: dotted name of the layer to replace, where the model does not say so itself.
        projection: see `HypersphericalHead`.
        training_output: see `HypersphericalHead`.
        seed: of the bank and of the projection's start.

    Raises:
        AlreadyConvertedError: the model has a hyperspherical head.
        HeadNotFoundError: no classifier found, or one of a structure that cannot be replaced; says why.
        BankError, ArgumentError: the head cannot be built with these arguments.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> convert_model(model, dim=2, classifier="1") is model
        True
        >>> model(torch.randn(3, 4, 4)).shape
        torch.Size([3, 4])
    """
    if get_heads(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} already has a hyperspherical head at {', '.join(map(repr, get_heads(model)))}. "
            "Call hyperproto.restore_model(model) first to convert it differently."
        )
    name = find_classifier(model, classifier)
    if name == "":
        raise ArgumentError("a bare layer cannot be replaced in place: use HypersphericalHead itself.")
    original = model.get_submodule(name)
    if not isinstance(original, nn.Linear):  # find_classifier has made sure; tells the type checker
        raise HeadNotFoundError(f"{name!r} is not an nn.Linear.")
    head = HypersphericalHead(
        original.in_features,
        original.out_features if num_classes is None else num_classes,
        dim=dim,
        bank=bank,
        projection=projection,
        training_output=training_output,
        seed=seed,
    )
    head.to(device=original.weight.device, dtype=original.weight.dtype)
    head.train(original.training)
    _replace(model, name, original, head)
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Put the original classifier back, bit for bit, in place; returns the same model.

    Raises:
        HeadNotFoundError: the model was not converted by `convert_model`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> linear = model[1]
        >>> restore_model(convert_model(model, dim=2, classifier="1"))[1] is linear
        True
    """
    record = model.__dict__.get(_RECORD)
    if not isinstance(record, Conversion):
        raise HeadNotFoundError(
            f"{type(model).__name__} was not converted: there is nothing to restore. "
            "For a wrapped model (DistributedDataParallel, torch.compile) pass the model inside."
        )
    head = model.get_submodule(record.name)
    reference = next(head.parameters(), None)
    where = reference if reference is not None else next(head.buffers())
    record.original.to(device=where.device)
    if reference is not None:
        record.original.to(dtype=reference.dtype)
    record.original.train(head.training)
    model.set_submodule(record.name, record.original)
    _set_num_classes(model, record.num_classes)
    del model.__dict__[_RECORD]
    return model


def _replace(model: nn.Module, name: str, original: nn.Linear, head: HypersphericalHead) -> None:
    parents = ["", *(name.rpartition(".")[0].split(".") if "." in name else ())]
    paths = list(dict.fromkeys(".".join(name.split(".")[:depth]) for depth in range(len(parents))))
    counts = {path: getattr(model.get_submodule(path), "num_classes", None) for path in paths}
    before = {path: count for path, count in counts.items() if isinstance(count, int)}
    record = Conversion(name, original, before)
    model.set_submodule(name, head)
    _set_num_classes(model, dict.fromkeys(before, head.num_classes))
    model.__dict__[_RECORD] = record


def _set_num_classes(model: nn.Module, values: dict[str, Any]) -> None:
    for path, value in values.items():
        setattr(model.get_submodule(path), "num_classes", value)  # noqa: B010 (not an attribute of nn.Module)
