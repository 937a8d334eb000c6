"""Arguments as people write them, made into what the library computes with: the one place that converts.

A number may be an int, a float, a number of NumPy or a tensor of one value; a matrix may be a tensor, an array or a
list. What cannot be meant is refused in one kind of message: what was expected, what came, and what to do.
"""

from collections.abc import Mapping, Set
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hyperproto.errors import ArgumentError, HyperprotoError, ShapeError

Choice = TypeVar("Choice", bound=str)

#: Smallest int64.
SMALLEST_INT = -(2**63)

#: Largest int64, and largest seed.
LARGEST_INT = 2**63 - 1


def whole_number(
    value: object,
    name: str,
    *,
    smallest: int = 0,
    largest: int = LARGEST_INT,
    error: type[HyperprotoError] = ArgumentError,
) -> int:
    """A plain int in [smallest, largest].

    Raises:
        HyperprotoError: of the class `error`.

    Examples:
        >>> whole_number(6 / 2, "dim"), whole_number(torch.tensor(3), "dim"), whole_number(np.int64(3), "dim")
        (3, 3, 3)
    """
    number = _plain(value)
    if number is None or number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise error(f"expected {name} to be a whole number (int), got {shown(value)}. For a quotient use //.")
    number = int(number)
    if not smallest <= number <= largest:
        bounds = f"of at least {smallest}" if largest == LARGEST_INT else f"in [{smallest}, {largest}]"
        raise error(f"expected {name} to be a whole number (int) {bounds}, got {name}={number}.")
    return number


def positive_number(value: object, name: str) -> float:
    """A plain float above zero that float32 holds.

    Raises:
        ArgumentError: anything else.

    Examples:
        >>> positive_number(16, "scale")
        16.0
    """
    number, limits = _plain(value), torch.finfo(torch.float32)
    if number is None or not limits.tiny <= number <= limits.max:  # NaN compares false
        raise ArgumentError(f"{name} must be a number that is finite and positive in float32, got {shown(value)}.")
    return float(number)


def share(value: object, name: str, *, below_one: bool = False) -> float:
    """A plain float in [0, 1], or in [0, 1).

    Raises:
        ArgumentError: anything else.

    Examples:
        >>> share(np.float32(0.5), "momentum")
        0.5
    """
    number = _plain(value)
    if number is None or not 0.0 <= number <= 1.0 or (below_one and number == 1.0):
        interval = "[0, 1)" if below_one else "[0, 1]"
        raise ArgumentError(f"{name} must be a number and lie in {interval}, got {shown(value)}.")
    return float(number)


def not_negative(value: object, name: str) -> float:
    """A plain float of zero or more, and finite.

    Raises:
        ArgumentError: anything else.
    """
    number = _plain(value)
    if number is None or not 0.0 <= number < float("inf"):
        raise ArgumentError(f"{name} must be a number that is finite and >= 0, got {shown(value)}.")
    return float(number)


def seed_number(value: object) -> int:
    """A seed: a plain int in [0, 2**63 - 1].

    Raises:
        ArgumentError: anything else.
    """
    number = _plain(value)
    if number is None or not 0 <= number <= LARGEST_INT or number != int(number):
        raise ArgumentError(f"expected seed to be a whole number (int) in [0, 2**63 - 1], got {shown(value)}.")
    return int(number)


def choice(value: Choice, name: str, choices: tuple[str, ...]) -> Choice:
    """One of some strings.

    Raises:
        ArgumentError: another value.
    """
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")
    return value


def flag(value: object, name: str) -> bool:
    """True or False.

    Raises:
        ArgumentError: anything else: what counts as true in an `if` is mostly a mistake.

    Examples:
        >>> flag(np.True_, "half_space")
        True
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"expected {name} to be True or False, got {shown(value)}.")
    return bool(value)


def module(value: object, name: str = "model") -> nn.Module:
    """A model.

    Raises:
        ArgumentError: a name, an optimiser or anything else that is no module.
    """
    if not isinstance(value, nn.Module):
        raise ArgumentError(
            f"expected {name} to be a model (torch.nn.Module), got {shown(value)}. A model is made from its name by "
            "timm.create_model(name)."
        )
    return value


def as_tensor(value: object, name: str, *, error: type[HyperprotoError] = ShapeError) -> Tensor:
    """A tensor itself, and arrays and lists of real numbers as a tensor of their own on the CPU.

    Raises:
        HyperprotoError: of the class `error`, for what holds no real numbers, and for sparse and nested tensors.

    Examples:
        >>> as_tensor([[1, 2], [3, 4]], "matrix").shape
        torch.Size([2, 2])
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise error(f"expected {name} to be a dense tensor, got one of layout {value.layout}: see to_dense().")
        return value
    try:
        array = np.array(value)
        if array.dtype.kind in "biuf":
            return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # rows of different lengths, dtypes that torch has not, tensors on other devices
    raise error(
        f"expected {name} to be a tensor, or an array or list of numbers, got {shown(value)}. torch.as_tensor makes "
        "one of most things."
    )


def readable(tensor: Tensor, name: str, *, error: type[HyperprotoError] = ShapeError) -> Tensor:
    """The tensor, whose values are there to be looked at.

    Raises:
        HyperprotoError: of the class `error`, on the device "meta".
    """
    if tensor.is_meta:
        raise error(f"expected {name} with values, got a tensor of shape {tuple(tensor.shape)} on the device meta.")
    return tensor


def places(value: object, name: str, *, error: type[HyperprotoError] = ArgumentError) -> Tensor:
    """(N,) int64 on the CPU from a sequence or set of whole numbers, such as labels; their range is not checked.

    Raises:
        HyperprotoError: of the class `error`.

    Examples:
        >>> places({2, 1}, "labels"), places([], "labels")
        (tensor([1, 2]), tensor([], dtype=torch.int64))
    """
    numbers = as_tensor(list(value) if isinstance(value, Set) else value, name, error=error).detach()
    if isinstance(value, Set):
        numbers = numbers.sort().values
    if numbers.dim() == 1 and numbers.numel() == 0:
        return numbers.new_zeros(0, dtype=torch.int64, device="cpu")
    if numbers.dim() != 1 or numbers.dtype != torch.int64 or numbers.is_meta:
        raise error(
            f"expected {name} to be a sequence of int, of shape (N,) and dtype torch.int64, got {tuple(numbers.shape)} "
            f"and {numbers.dtype} on {numbers.device}."
        )
    return numbers.cpu()


def matrix(value: object, what: str, *, smallest: tuple[int, int] = (1, 1), width: int | None = None) -> Tensor:
    """A floating-point matrix of at least so many rows and columns.

    Args:
        value: a tensor, array or list of lists; of integers too, where it is no tensor.
        what: it is, for the message.
        smallest: numbers of rows and columns.
        width: the number of columns, where it is one alone.

    Raises:
        ShapeError: anything else.
    """
    tensor = as_tensor(value, what)
    if not isinstance(value, Tensor) and not tensor.is_floating_point():
        tensor = tensor.float()
    fits = tensor.dim() == 2 and tensor.shape[0] >= smallest[0] and tensor.shape[1] >= smallest[1]
    fits = fits and width in (None, tensor.shape[1])
    if not fits or not tensor.is_floating_point():
        raise ShapeError(f"expected {what}, in a floating dtype, got {tuple(tensor.shape)} and {tensor.dtype}.")
    return tensor


def numbers_by_label(value: object, name: str, num_labels: int) -> Tensor:
    """(C,) float64 on the CPU: one number for each label.

    Args:
        value: a tensor, an array, a list, or a dictionary or Counter by label.
        name: of the argument.
        num_labels: C.

    Raises:
        ArgumentError: no numbers, more or fewer than C, or other labels.

    Examples:
        >>> numbers_by_label({1: 20, 0: 10}, "class_counts", 2)
        tensor([10., 20.], dtype=torch.float64)
    """
    if isinstance(value, Mapping):
        of_label = {whole_number(label, f"a label in {name}"): number for label, number in value.items()}
        missing = sorted(set(range(num_labels)) ^ set(of_label))
        if missing:
            raise ArgumentError(
                f"{name} must have a number for each of the labels 0 to {num_labels - 1}, and for no others; they "
                f"differ in {missing[:5]}. Give a list of {num_labels} numbers, or complete the dictionary."
            )
        value = [of_label[label] for label in range(num_labels)]
    numbers = as_tensor(value, name, error=ArgumentError)
    if numbers.shape != (num_labels,) or numbers.is_complex() or numbers.dtype == torch.bool or numbers.is_meta:
        raise ArgumentError(
            f"{name} must be {num_labels} numbers, of shape ({num_labels},), got {tuple(numbers.shape)} in "
            f"{numbers.dtype} on {numbers.device}."
        )
    return numbers.detach().cpu().double()


def shown(value: object) -> str:
    """A value as a message shows it: with its type, and no longer than a line.

    Examples:
        >>> shown("16"), shown(None), shown(1.5), shown(torch.ones(2))
        ("'16' (str)", 'None', '1.5', 'a Tensor of shape (2,)')
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    text = text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
    return (
        text
        if value is None or type(value) in (int, float) or text.startswith("a ")
        else (f"{text} ({type(value).__name__})")
    )


def _plain(value: object) -> int | float | None:
    """A real number as Python's own; None for what is none."""
    # Tuples of types, not unions: torch.compile knows no union of NumPy's.
    if isinstance(value, (Tensor, np.ndarray)):
        readable = value.ndim == 0 and not (isinstance(value, Tensor) and value.is_meta)
        value = value.item() if readable else None
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
