"""Models in which replacing the last layer is not enough, and what they need.

Each function changes the model in place where it applies, and says so in one sentence for the record. That a model's
output is a convex combination of cosines times the scale, whatever its structure, is what they are for: losses and
`DynamicAssigner.update` rely on it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hyperproto.conversion.locate import Leaf, num_outputs
from hyperproto.errors import HeadNotFoundError
from hyperproto.module_ref import ModuleRef

#: Before the name of a timm architecture, that of its converted models.
CONVERTED = "hp_"

#: The names by which a timm model has its configuration.
CONFIGURATIONS = ("pretrained_cfg", "default_cfg")

#: Classifiers beside the main one, with a loss of their own, by model class; only the number of classes matters.
AUXILIARY_CLASSIFIERS = {
    "GoogLeNet": ("aux1.fc2", "aux2.fc2"),
    "Inception3": ("AuxLogits.fc",),
    "InceptionV3": ("AuxLogits.fc",),
}


def is_kind(model: nn.Module, kind: str) -> bool:
    """Whether the model is of a class of this name, or of one derived from it."""
    return any(base.__name__ == kind for base in type(model).__mro__)


def build_missing_classifier(model: Any, num_classes: int | None, seed: int) -> list[str]:
    """Let a timm model that was made without a classifier make one.

    Args:
        model: changed in place if its `num_classes` is 0.
        num_classes: of the classifier.
        seed: of what the model puts in front of the last layer, such as an MLP.

    Returns:
        What was done.

    Raises:
        HeadNotFoundError: num_classes is missing.
    """
    if getattr(model, "num_classes", None) != 0 or not hasattr(model, "reset_classifier"):
        return []
    if num_classes is None:
        raise HeadNotFoundError(
            f"{type(model).__name__} was made without a classifier (its num_classes is 0). "
            "Say how many classes: convert_model(model, num_classes=K)."
        )
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(seed)
        model.reset_classifier(num_classes)
    return [f"made without a classifier: reset_classifier({num_classes}) came first"]


def drop_token_head(model: Any, leaves: dict[str, Leaf]) -> tuple[dict[str, Leaf], list[str]]:
    """Take out VOLO's second classifier, whose largest value over the tokens is added to the logits.

    A maximum of cosines is not the cosine of any embedding. VOLO itself works without that classifier.

    Returns:
        The dropped layers by name, and what was done.
    """
    if not is_kind(model, "VOLO") or "aux_head" not in leaves:
        return {}, []
    model.aux_head = None
    return (
        {"aux_head": leaves["aux_head"]},
        ["aux_head taken out: a maximum over tokens is added to the logits, which would not be cosines"],
    )


def move_behind_pooling(model: nn.Module, name: str) -> tuple[str, list[str]]:
    """Rebuild SqueezeNet's classifier, which clips the logits at zero and pools them afterwards.

    Returns:
        The name under which the head goes, and what was done.
    """
    if not is_kind(model, "SqueezeNet") or name != "classifier.1":
        return name, []
    old = model.get_submodule("classifier")
    rebuilt = nn.Sequential(old.get_submodule("0"), nn.AdaptiveAvgPool2d(1), nn.Identity(), nn.Flatten(1))
    model.set_submodule("classifier", rebuilt.train(old.training))
    return (
        "classifier.2",
        ["classifier rebuilt as dropout, pooling, head: its ReLU would have clipped negative cosines"],
    )


def keep_unfused(model: nn.Module, name: str) -> list[str]:
    """Let the modules around a head answer `fuse()` with themselves.

    Merging their batch norm into the layer behind it is right for a linear layer only; without it the model computes
    what it did before.
    """
    kept = []
    parts = name.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        wrapper: Any = model.get_submodule(path)
        if callable(getattr(wrapper, "fuse", None)):
            wrapper.fuse = partial(_itself, ModuleRef(wrapper))
            kept.append(path)
    return [f"{path} keeps its batch norm in fuse() and reparameterize_model()" for path in kept]


def set_num_classes(model: nn.Module, names: list[str], num_classes: int) -> None:
    """Set the attribute `num_classes`, where there is one, of the model and of all modules around its heads."""
    paths = {"": None}
    for name in names:
        parts = name.split(".")
        paths |= dict.fromkeys(".".join(parts[:depth]) for depth in range(1, len(parts)))
    for path in paths:
        module: Any = model.get_submodule(path)
        if isinstance(module.__dict__.get("num_classes"), int):
            module.num_classes = num_classes


def set_num_labels(model: Any, num_classes: int) -> None:
    """Let a configuration that counts labels, as models of transformers have one, count those of the head.

    In a copy: the configuration may be somebody else's too.
    """
    config = model.__dict__.get("config")
    if getattr(config, "num_labels", num_classes) != num_classes:
        model.config = copy.copy(config)
        model.config.num_labels = num_classes
    if isinstance(model.__dict__.get("num_labels"), int):
        model.num_labels = num_classes


def name_architecture(model: Any) -> None:
    """Let the configuration of a timm model name the architecture that has the head; see `hyperproto.timm`."""
    config = model.__dict__.get("pretrained_cfg")
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not name or not hasattr(model, "get_classifier"):
        return
    renamed = {**config, "architecture": CONVERTED + name.removeprefix(CONVERTED)}
    for key in CONFIGURATIONS:
        if model.__dict__.get(key) is config:
            setattr(model, key, renamed)


def resize_auxiliary(model: nn.Module, num_classes: int, seed: int) -> list[str]:
    """Give the auxiliary classifiers of GoogLeNet and Inception as many classes as the head has.

    They stay linear, with the cross-entropy of their own that they are trained with. Where the number of classes
    changes they start anew.
    """
    done = []
    for name in (name for kind, names in AUXILIARY_CLASSIFIERS.items() if is_kind(model, kind) for name in names):
        parent: Any = getattr(model, name.partition(".")[0], None)
        if parent is None:
            continue
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear) and num_outputs(old) != num_classes:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                fresh = nn.Linear(old.in_features, num_classes, bias=old.bias is not None, device="cpu")
            fresh.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
            model.set_submodule(name, fresh)
            done.append(f"{name} made anew with {num_classes} classes, and stays linear")
        else:
            done.append(f"{name} stays linear, with its own loss")
    return done


def _itself(module: ModuleRef) -> nn.Module:
    return module()
