"""What people pass for a loader, read as batches of inputs and targets: the one place that does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hyperproto.errors import ArgumentError, LabelError, ShapeError

#: Samples of a batch where whole arrays or a data set come in the place of a loader.
BATCH_SIZE = 64

#: Names in dictionaries that can mean one thing only.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
INPUT_NAMES = ("image", "images", "img", "pixel_values", "input", "inputs", "x", "features", "data")


def read_batches(loader: Iterable[Any] | Dataset[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of each batch, the targets on the CPU.

    Args:
        loader: an iterable of batches, a data set of samples, or a pair of whole arrays (X, y). A batch is a sequence
            of inputs, targets and more, or a dictionary with one of `TARGET_NAMES` and, unless there is but one other
            entry, one of `INPUT_NAMES`. Inputs are a tensor, or tuples, lists or dictionaries of some; arrays and lists
            of numbers are made into tensors.

    Raises:
        ArgumentError: anything else, with what came.
        LabelError: targets that are no numbers, or one for a whole batch.
        ShapeError: a pair of unequal lengths.

    Examples:
        >>> [(inputs.shape, labels.tolist()) for inputs, labels in read_batches((np.zeros((3, 5)), [0, 2, 1]))]
        [(torch.Size([3, 5]), [0, 2, 1])]
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        loader = DataLoader(loader, batch_size=BATCH_SIZE)
    elif _is_pair(loader):
        loader = _split(*loader)
    for batch in _iterated(loader):
        inputs, target = _from_mapping(batch) if isinstance(batch, Mapping) else _from_sequence(batch)
        yield _as_inputs(inputs), _as_target(target)


def num_samples(inputs: Any) -> int:
    """Samples of a batch: the length of its first tensor.

    Raises:
        ArgumentError: there is none.
    """
    for tensor in _tensors(inputs):
        if tensor.dim():
            return len(tensor)
    raise ArgumentError(
        f"expected inputs with a tensor of shape (B, ...) among them, got {_shown(inputs)}: the loader has to give "
        "batches, whose images or other data are tensors already."
    )


def moved(inputs: Any, device: torch.device) -> Any:
    """The inputs with all of their tensors on a device."""
    return _mapped(inputs, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def _is_pair(loader: Any) -> bool:
    """Whether these are all inputs and all labels, and not two batches: an array is no batch."""
    return isinstance(loader, tuple | list) and len(loader) == 2 and _is_array(loader[0])


def _split(inputs: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
    rows, labels = _as_inputs(inputs), _as_target(target)
    if not rows.dim() or len(rows) != len(labels):
        raise ShapeError(f"expected as many labels as rows, got {tuple(rows.shape)} and {tuple(labels.shape)}.")
    return list(zip(torch.split(rows, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True))


def _iterated(loader: Any) -> Iterator[Any]:
    if not isinstance(loader, str | bytes | Mapping) and not _is_array(loader):
        try:
            return iter(loader)
        except TypeError:
            pass
    raise ArgumentError(
        f"expected a loader of batches (inputs, labels), a data set or a pair of arrays (X, y), got {_shown(loader)}."
    )


def _from_sequence(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ArgumentError(
            f"expected batches (inputs, labels) from the loader, got {_shown(batch)}. Give pairs, such as "
            "((inputs_of(batch), labels_of(batch)) for batch in loader)."
        )
    return batch[0], batch[1]


def _from_mapping(batch: Mapping[Any, Any]) -> tuple[Any, Any]:
    targets = [name for name in batch if name in TARGET_NAMES]
    others = [name for name in batch if name not in targets]
    inputs = others if len(others) == 1 else [name for name in others if name in INPUT_NAMES]
    if len(targets) != 1 or len(inputs) != 1:
        raise ArgumentError(
            f"a batch of the loader is a dict of {', '.join(map(repr, batch))}, and which entries are inputs and label "
            "is not obvious. Give pairs: ((batch['the inputs'], batch['the labels']) for batch in loader)."
        )
    return batch[inputs[0]], batch[targets[0]]


def _as_target(target: Any) -> Tensor:
    if not isinstance(target, Tensor):
        try:
            array = np.asarray(target)
            target = torch.as_tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array)
        except (TypeError, ValueError) as error:
            raise LabelError(
                f"expected the labels of a batch as a tensor, an array or a list of whole numbers, got "
                f"{_shown(target)}. Number the classes from 0."
            ) from error
    if not target.dim():
        raise LabelError(
            "expected labels (B,) of a batch, got a single one: the loader gives samples, not batches. Wrap what it "
            "reads from in torch.utils.data.DataLoader(..., batch_size=...)."
        )
    return target.detach().cpu()


def _as_inputs(inputs: Any) -> Any:
    return _mapped(inputs, lambda leaf: _as_tensor(leaf) if _is_array(leaf) and not isinstance(leaf, Tensor) else leaf)


def _as_tensor(array: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(np.asarray(array))
    except TypeError as error:
        raise ArgumentError(f"expected inputs that are numbers, got {_shown(array)}.") from error
    # NumPy's floats are double by default, and models are not.
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _mapped(inputs: Any, change: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _mapped(each, change) for name, each in inputs.items()}
    if isinstance(inputs, tuple | list):
        parts = [_mapped(each, change) for each in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return change(inputs)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for each in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _tensors(each)


def _is_array(value: Any) -> bool:
    """Whether NumPy reads it as one: tensors, arrays, series and tables, and no list."""
    return hasattr(value, "__array__")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(each).__name__ for each in value[:4]) or 'nothing'}"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if isinstance(shape, tuple) else type(value).__name__
