"""Where a model's classifier is: the dotted names of the layers whose outputs make the logits.

A layer is recognised by what the model says of itself (timm's `get_classifier` and `pretrained_cfg`) or by its class
(torchvision), never by its width alone: dozens of models have inner layers as wide as a small number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import nn

from hyperproto.conversion.hooks import hand_hooks_over
from hyperproto.errors import HeadNotFoundError
from hyperproto.head import HypersphericalHead

#: What can make logits: a linear layer, over the last dimension or over channels.
Leaf: TypeAlias = nn.Linear | nn.Conv2d

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

#: What the image classifiers of transformers call their last layers that do not call them classifiers.
TRANSFORMERS_HEADS = ("head", "dist_head", "fc", "score")

#: Classes of torch that wrap a model, and what makes them.
WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FSDPModule": "fully_shard",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "OptimizedModule": "torch.compile",
}

NAME_IT = 'Name the layer to replace yourself: convert_model(model, classifier="dotted.name").'


def check_unwrapped(model: nn.Module, name: str = "", *, verb: str = "convert_model") -> None:
    """Raise if the model, or a module of it that holds the one of that name, has been wrapped already.

    Args:
        model: what `verb`, a function of this package, was called with.
        name: of the module that is to be replaced.
        verb: for the message.

    Raises:
        HeadNotFoundError: it has; says what to do first.
    """
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        outer = model.get_submodule(".".join(path[:depth]))
        for base in type(outer).__mro__:
            if base.__module__.startswith("torch.") and base.__name__ in WRAPPERS:
                wrap = WRAPPERS[base.__name__]
                raise HeadNotFoundError(
                    f"expected a model that nothing wraps, got one already wrapped by {wrap}, which would not know of "
                    f"the new layers. Pass the model inside and wrap it afterwards: {verb}(model, ...), then "
                    f"{wrap}(model, ...)."
                )


def find_classifiers(model: nn.Module, classifier: str | None) -> dict[str, Leaf]:
    """The layers that make the logits, by dotted name: one, or several whose outputs the model combines.

    Args:
        model: a timm or torchvision classifier, or anything with `classifier` given.
        classifier: the name, if the caller knows it. One of several that the model combines stands for all of them.

    Raises:
        HeadNotFoundError: there is none, or none that can be replaced, or it has been wrapped; says why.
    """
    known = known_names(model)
    names = known if classifier is None or classifier in known else [classifier]
    if not names:
        raise HeadNotFoundError(f"cannot tell where {type(model).__name__} keeps its classifier. {NAME_IT}")
    leaves = {name: _leaf_at(model, name) for name in names}
    widths = {name: num_outputs(leaf) for name, leaf in leaves.items()}
    if len(set(widths.values())) > 1:
        raise HeadNotFoundError(
            f"expected the classifiers of {type(model).__name__} to have one number of classes, got {widths}. "
            "Call model.reset_classifier(K) first."
        )
    return leaves


def known_names(model: Any) -> list[str]:
    """Names of the layers that make the logits, as far as the model's own interface or its class tells."""
    if hasattr(model, "get_classifier"):
        return _timm_names(model)
    for base in type(model).__mro__:
        if base.__module__.startswith("torchvision.models") and base.__name__ in TORCHVISION_CLASSIFIERS:
            return [TORCHVISION_CLASSIFIERS[base.__name__]]
        if "ForImageClassification" in base.__name__ and hasattr(getattr(model, "config", None), "num_labels"):
            return _transformers_names(model)
    return _names_behind_a_body(model)


def num_outputs(leaf: Leaf) -> int:
    """Width of what a leaf returns."""
    return leaf.out_features if isinstance(leaf, nn.Linear) else leaf.out_channels


def num_inputs(leaf: Leaf) -> int:
    """Width of what a leaf takes."""
    return leaf.in_features if isinstance(leaf, nn.Linear) else leaf.in_channels


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let `new` take the place of `old`, hooks included, under every name that the model has for it.

    What is bound to an old head raises from then on.
    """
    hand_hooks_over(old, new)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        model.set_submodule(name, new)
    if isinstance(old, HypersphericalHead):
        old.placement.taken_out = True
    if isinstance(new, HypersphericalHead):
        new.placement.put_into(model, names[0])


def is_leaf(module: object) -> bool:
    """Whether a module maps features to outputs by one matrix: nn.Linear, or nn.Conv2d of size 1."""
    if isinstance(module, nn.Conv2d):
        return (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return isinstance(module, nn.Linear)


def _timm_names(model: Any) -> list[str]:
    """Leaves that the model's config names, and those that `get_classifier` holds and the config forgets."""
    modules = dict(model.named_modules())
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    configured = [configured] if isinstance(configured, str) else configured
    names = [name for name in configured if is_leaf(modules.get(name))]
    by_identity = {id(module): name for name, module in modules.items()}
    try:
        classifier = model.get_classifier()
    except AttributeError:  # a module of the user's is where the model's own had attributes
        return names
    for module in _flatten(classifier):
        own = by_identity.get(id(module), "")
        if any(name == own or name.startswith(own + ".") for name in names):
            continue
        if is_leaf(module):
            names.append(own)
            continue
        if type(module) is nn.Sequential:  # put in by hand: the last layer, however many classes the model claims
            own_leaves = [inner for inner, leaf in module.named_modules() if is_leaf(leaf)]
            names += [f"{own}.{inner}" for inner in own_leaves[-1:]]
            continue
        # Wrappers hold other layers too (an MLP's first, batch norm): only the number of classes tells.
        for inner, leaf in module.named_modules():
            if isinstance(leaf, Leaf) and is_leaf(leaf) and num_outputs(leaf) == getattr(model, "num_classes", None):
                names.append(f"{own}.{inner}")
    return names


def _transformers_names(model: Any) -> list[str]:
    """The last layer of each part of a transformers model that is called a classifier or a head."""
    if hasattr(model, "timm_model"):
        return [f"timm_model.{name}" for name in known_names(model.timm_model)]
    found = []
    for name, part in model.named_children():
        if "classifier" in name or name in TRANSFORMERS_HEADS:
            found += _leaf_names(name, part)[-1:]
    return found


def _names_behind_a_body(model: Any) -> list[str]:
    """The classifier of a timm model in open_clip's wrapper, and that of fastai's pairs of body and head."""
    if type(model).__name__ == "TimmModel" and hasattr(model, "trunk"):
        own = _leaf_names("head", model.head)[-1:] if isinstance(getattr(model, "head", None), nn.Module) else []
        return own or [f"trunk.{name}" for name in known_names(model.trunk)]
    of_fastai = any(type(part).__module__.startswith("fastai.") for part in model.modules())
    if type(model) is nn.Sequential and len(model) == 2 and of_fastai:
        return _leaf_names("1", model[1])[-1:]
    return []


def _leaf_names(name: str, module: nn.Module) -> list[str]:
    """Names of the leaves in a module of that name."""
    return [f"{name}.{inner}".rstrip(".") for inner, leaf in module.named_modules() if is_leaf(leaf)]


def _flatten(classifier: Any) -> Iterator[nn.Module]:
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        for part in classifier:
            yield from _flatten(part)
    elif isinstance(classifier, nn.Module):
        yield classifier


def _check_no_adapter(model: nn.Module, name: str) -> None:
    """Raise if an adapter (LoRA and its like, which keep a `base_layer`) is around the module of that name."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        outer = model.get_submodule(path)
        if "base_layer" in outer._modules:
            raise HeadNotFoundError(
                f"expected a plain layer at {path!r}, got an adapter around one ({type(outer).__name__}). Merge or "
                "remove the adapter, convert the model, and adapt other layers afterwards."
            )


def _leaf_at(model: nn.Module, name: str) -> Leaf:
    """The leaf of that name.

    Raises:
        HeadNotFoundError: there is no such module, or it is no leaf; names the leaves inside it, if any.
    """
    label = type(model).__name__
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None:
        raise HeadNotFoundError(f"{label} has no module named {name!r}. model.named_modules() lists the names.")
    check_unwrapped(model, name)
    _check_no_adapter(model, name)
    if isinstance(module, Leaf) and is_leaf(module):
        return module
    inside = [f"{name}.{inner}".strip(".") for inner, leaf in module.named_modules() if is_leaf(leaf)]
    hint = f"Name a layer inside it, such as {inside[-1]!r}." if inside else NAME_IT
    raise HeadNotFoundError(
        f"expected {name!r} of {label} to be an nn.Linear or an nn.Conv2d of size 1, "
        f"got {type(module).__name__}. {hint}"
    )
