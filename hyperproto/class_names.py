"""Names of the classes, in the order of the labels: where they come from, and whether a data set has the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hyperproto.arguments import shown, whole_number
from hyperproto.errors import LabelError
from hyperproto.heads import get_heads, require_heads


def read_class_names(value: object) -> tuple[str, ...] | None:
    """Names in the order of the labels, from a sequence of them or from a data set that has them; None of None.

    Args:
        value: strings; or what has `classes` or `class_to_idx`, as torchvision's data sets have, or holds such a one as
            its `dataset` (a loader, a Subset) or `reader` (timm). Several names of one class are joined by commas.

    Raises:
        LabelError: anything else, or two classes of one name.

    Examples:
        >>> from types import SimpleNamespace
        >>> read_class_names(SimpleNamespace(class_to_idx={"dog": 1, "cat": 0}))
        ('cat', 'dog')
    """
    if value is None:
        return None
    found = value if isinstance(value, list | tuple) else next(_in_data_set(value), None)
    if isinstance(found, Mapping):
        numbered = {whole_number(label, "a class's label", error=LabelError): name for name, label in found.items()}
        found = [numbered[label] for label in sorted(numbered)] if set(numbered) == set(range(len(found))) else None
    names = [_joined(each) for each in found or ()]
    if not names or not _is_strings(names):
        raise LabelError(
            f"expected class_names to be a list of names or a data set that has classes or class_to_idx, got "
            f"{shown(value)}. Give the names in the order of the labels."
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise LabelError(f"expected a name of its own for each class, got several {twice[:5]}. Number them.")
    return tuple(names)


def check_number_of_names(names: tuple[str, ...] | None, num_classes: int) -> None:
    """Raise unless there are as many names as labels, or none at all.

    Raises:
        LabelError: there are more or fewer.
    """
    if names is not None and len(names) != num_classes:
        raise LabelError(
            f"expected {num_classes} class_names, one for each label, got {len(names)}. Give all of them, and "
            "num_classes where the model was made for another number."
        )


def check_class_names(model: nn.Module, dataset: object) -> None:
    """Raise unless a data set numbers the classes as the model does; changes nothing.

    A folder more or less among those that ImageFolder sorts moves every label behind it, and nothing else would tell.

    Args:
        model: converted with `class_names`, or loaded by `load_pretrained`.
        dataset: a data set, a loader or a list of names, as `convert_model(class_names=...)` takes.

    Raises:
        LabelError: the names are others, or in another order, or the model has none; says which label is the first.
        HeadNotFoundError: the model has no head.

    Examples:
        >>> from hyperproto import convert_model
        >>> model = convert_model(nn.Sequential(nn.Linear(8, 2)), dim=2, classifier="0", class_names=["cat", "dog"])
        >>> check_class_names(model, ["cat", "dog"])
    """
    heads = get_heads(model)
    if not heads:
        require_heads(model)
    own = {head.class_names for head in heads.values()}
    names = read_class_names(dataset)
    if names in own and names is not None:
        return
    expected = next((each for each in own if each is not None), None)
    if expected is None or names is None:
        raise LabelError(
            "expected a model and a data set that both have class names, got none. Give the model its own: "
            "convert_model(model, class_names=...)."
        )
    check_number_of_names(names, len(expected))
    label = next(label for label, pair in enumerate(zip(expected, names, strict=True)) if pair[0] != pair[1])
    raise LabelError(_other_name(label, expected[label], names[label]))


def check_labels_of_names(names: tuple[str, ...] | None, loader: object) -> None:
    """Raise where data have another label for a class of the same name; changes nothing.

    Of data that nobody has said to be in the model's order. Other names, or none, say nothing against it, nor do those
    of a data set that a `target_transform` numbers anew.

    Args:
        names: of the model's classes, in the order of its labels; None if it has none.
        loader: batches, a data set, or anything.

    Raises:
        LabelError: says which class is the first.
    """
    if names is None or any(getattr(each, "target_transform", None) is not None for each in _held(loader)):
        return
    found = next(_in_data_set(loader), ())
    given = found if isinstance(found, Mapping) else {}
    numbered = given or {name: label for label, name in enumerate(map(_joined, found)) if isinstance(name, str)}
    for label, name in enumerate(names):
        if numbered.get(name, label) != label:
            got = next((other for other, own in numbered.items() if own == label), "none")
            raise LabelError(_other_name(label, name, got))


def _other_name(label: int, expected: str, got: object) -> str:
    return (
        f"expected label {label} to be {expected!r}, as the model has it, got {got!r}. Give the "
        "data set the model's order: ImageFolder's find_classes can be overridden, target_transform can renumber."
    )


def _held(value: Any) -> Iterator[Any]:
    """What is given, the data set that it holds, and so on."""
    for _ in range(8):  # wrappers in wrappers
        yield value
        value = getattr(value, "dataset", None) or getattr(value, "reader", None)
        if value is None:
            return


def _in_data_set(value: Any) -> Iterator[Any]:
    """What a data set, or one that it holds, says of its classes."""
    for each in _held(value):
        for attribute in ("classes", "class_to_idx"):
            if isinstance(found := getattr(each, attribute, None), list | tuple | Mapping):
                yield found


def _joined(name: Any) -> Any:
    """One name of a class that has several."""
    return ", ".join(name) if _is_strings(name) else name


def _is_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
