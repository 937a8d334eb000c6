"""Where a model's classifier is: the dotted name of the layer whose outputs are the logits.

A layer is recognised by what the model says of itself (timm's `get_classifier` and `pretrained_cfg`) or by its class
(torchvision), never by its width alone: dozens of models have inner layers as wide as a small number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hyperproto.errors import HeadNotFoundError

#: torchvision's model classes and where each keeps its last layer.
TORCHVISION_CLASSIFIERS = {
    "AlexNet": "classifier.6",
    "ConvNeXt": "classifier.2",
    "DenseNet": "classifier",
    "EfficientNet": "classifier.1",
    "GoogLeNet": "fc",
    "Inception3": "fc",
    "MNASNet": "classifier.1",
    "MaxVit": "classifier.5",
    "MobileNetV2": "classifier.1",
    "MobileNetV3": "classifier.3",
    "RegNet": "fc",
    "ResNet": "fc",
    "ShuffleNetV2": "fc",
    "SqueezeNet": "classifier.1",
    "SwinTransformer": "head",
    "VGG": "classifier.6",
    "VisionTransformer": "heads.head",
}

NAME_IT = 'Name the layer to replace yourself: convert_model(model, classifier="dotted.name").'


def find_classifier(model: nn.Module, classifier: str | None) -> str:
    """Dotted name of the one plain nn.Linear that makes the logits.

    Args:
        model: a timm or torchvision classifier, or anything with `classifier` given.
        classifier: the name, if the caller knows it.

    Raises:
        HeadNotFoundError: there is none, or it is not one plain nn.Linear; says why.
    """
    names = [classifier] if classifier is not None else _find_names(model)
    label = type(model).__name__
    if not names:
        raise HeadNotFoundError(f"cannot tell where {label} keeps its classifier. {NAME_IT}")
    if len(names) > 1:
        raise HeadNotFoundError(f"{label} has {len(names)} classifiers ({', '.join(names)}), expected one. {NAME_IT}")
    [name] = names
    leaf = _resolve(model, name)
    if leaf is None:
        raise HeadNotFoundError(f"{label} has no module named {name!r}. model.named_modules() lists the names.")
    if isinstance(leaf, nn.Identity):
        raise HeadNotFoundError(
            f"{label} was made without a classifier ({name!r} is nn.Identity). Create it with num_classes=K."
        )
    if type(leaf) is not nn.Linear:
        raise HeadNotFoundError(f"the classifier {name!r} of {label} is a {type(leaf).__name__}, not an nn.Linear.")
    parent = model.get_submodule(name.rpartition(".")[0])
    if parent is not model and hasattr(parent, "fuse"):
        raise HeadNotFoundError(
            f"the classifier {name!r} of {label} is wrapped in a {type(parent).__name__} that fuses it with its "
            "batch norm, which is not supported: expected one plain nn.Linear."
        )
    return name


def _find_names(model: nn.Module) -> list[str]:
    if hasattr(model, "get_classifier"):
        return _timm_names(model)
    if any(base.__module__.startswith("torchvision.models") for base in type(model).__mro__):
        known = (TORCHVISION_CLASSIFIERS.get(base.__name__) for base in type(model).__mro__)
        return [name for name in known if name is not None][:1]
    return []


def _timm_names(model: Any) -> list[str]:
    """Names that the model's config and its `get_classifier` point to."""
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = dict.fromkeys([configured] if isinstance(configured, str) else configured)
    by_identity = {id(module): name for name, module in model.named_modules()}
    for module in _flatten(model.get_classifier()):
        if list(module.children()):
            raise HeadNotFoundError(
                f"the classifier of {type(model).__name__} is wrapped in a {type(module).__name__}, "
                "which is not supported: expected one plain nn.Linear."
            )
        names.setdefault(by_identity[id(module)])
    return list(names)


def _flatten(classifier: Any) -> Iterator[nn.Module]:
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        for part in classifier:
            yield from _flatten(part)
    elif isinstance(classifier, nn.Module):
        yield classifier


def _resolve(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)
