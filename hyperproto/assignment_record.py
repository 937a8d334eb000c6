r"""What a head's entries say of its assignment, whoever has copied, averaged, cast or written them.

An assignment is kept three times, since no two kinds of averages treat entries alike: as integers $\sigma$; as a
record in float64, the same numbers, a checksum that is not linear in them and how often it was set; and that count once
more as an integer. From whatever is left of the three the assignment that they had in common is read, or the newest.

| | integers | floats |
|---|---|---|
| average over buffers (torch with `use_buffers=True`, timm's `ModelEmaV2`) | averaged, and cut | averaged |
| timm's `ModelEmaV3` | copied | averaged |
| ema-pytorch, ultralytics, loops over floating entries | left as they are | averaged |
| torch's `AveragedModel`, Lightning's and ignite's by default | copied | copied |

An average over equal records is that record, but for rounding, and one over different records has no checksum: it is
told. Integers that were averaged have lost the low half of their count in float32; integers that were left behind count
less than the floats do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperproto.checkpoint import count_in
from hyperproto.errors import AssignmentError
from hyperproto.matching.problem import check_assignment

#: What averaging numbers up to P that are equal may add to them, and to their checksum: this, and this share of P.
NOISE, SHARE_OF_NOISE = 1e-6, 1e-10

#: The same of a count, which is smaller, and whose average moves by little with the first update after a change.
COUNT_NOISE = 1e-7

#: Assignments are not set more often than that.
LARGEST_COUNT = 2**30

#: Entries of a record behind the labels'.
NUM_EXTRA = 2


def record_of(assignment: Tensor, count: int) -> Tensor:
    r"""The assignment $\sigma$ in floating point, $\sum_k \sin(k + \phi \, \sigma_k)$, and how often it was set.

    Args:
        assignment: (C,) int64 on the CPU.
        count: how often.

    Returns:
        (C + 2,) float64.

    Examples:
        >>> record_of(torch.tensor([2, 0, 1]), 5)[[0, 1, 2, -1]]
        tensor([2., 0., 1., 5.], dtype=torch.float64)
    """
    values = assignment.double()
    return torch.cat([values, _checksum(values)[None], values.new_tensor([count])])


def read_assignment(
    assignment: Tensor, record: Tensor | None, stamp: Tensor | None, num_classes: int, num_prototypes: int
) -> Tensor:
    """The assignment that these entries have in common, or the newest of them.

    Args:
        assignment: (C,), whole numbers in any dtype.
        record: (C + 2,), as `record_of` makes it, in any floating dtype; None where there is none, as in checkpoints of
            format 1.
        stamp: () entry `format_version`, or None likewise.
        num_classes: C.
        num_prototypes: P.

    Returns:
        (C,) int64 on the CPU, an assignment.

    Raises:
        AssignmentError: they say different things, as averages over different assignments do, or nothing that is one.

    Examples:
        >>> from hyperproto.checkpoint import format_version
        >>> ours, stamp = torch.tensor([2, 0, 1]), format_version(5)
        >>> cut = torch.tensor([1, 0, 0])  # what an average over integers makes of it
        >>> read_assignment(cut, record_of(ours, 5), (0.9 * stamp).long(), 3, 3)
        tensor([2, 0, 1])
        >>> read_assignment(ours, record_of(ours, 5).lerp(record_of(ours.flip(0), 6), 0.1), stamp, 3, 3)
        Traceback (most recent call last):
        hyperproto.errors.AssignmentError: the entries are an average over different assignments, which is none.
    """
    written = assignment.detach().cpu()
    if written.shape != (num_classes,):
        raise AssignmentError(f"expected an assignment of shape ({num_classes},), got {tuple(written.shape)}.")
    if record is not None:
        record = record.detach().cpu()
        if record.shape != (num_classes + NUM_EXTRA,) or not record.is_floating_point():
            raise AssignmentError(
                f"expected a record of shape ({num_classes + NUM_EXTRA},) in a floating dtype, got "
                f"{tuple(record.shape)} and {record.dtype}."
            )
        intact = None if stamp is None else count_in(stamp)  # of the integers; None where they were averaged
        count, rounding = float(record[-1]), torch.finfo(record.dtype).eps
        if intact is None or count > intact + COUNT_NOISE + rounding * count:  # or left behind
            recorded = _recorded(record, num_prototypes)
            if recorded is None:
                raise AssignmentError("the entries are an average over different assignments, which is none.")
            return recorded
    # Copied, or written by hand, or of a checkpoint of format 1.
    whole = written.double().round()
    if written.is_floating_point() and not bool(((written - whole).abs() <= NOISE).all()):
        raise AssignmentError("the entries are no whole numbers, as in an average over different assignments.")
    found = whole.long()
    check_assignment(found, num_classes, num_prototypes)
    return found


def count_of(record: Tensor | None, stamp: Tensor | None) -> int:
    """How often an assignment was set, by the entry that says the most; at least 1.

    Examples:
        >>> from hyperproto.checkpoint import format_version
        >>> count_of(record_of(torch.tensor([1, 0]), 3), format_version(4))
        4
    """
    recorded = 0.0 if record is None else float(record[-1])
    intact = (None if stamp is None else count_in(stamp)) or 0
    # Anything may stand in memory that nothing was written to.
    return max(*(math.ceil(each - COUNT_NOISE) if 0.0 < each < LARGEST_COUNT else 1 for each in (recorded, intact)))


def next_count(record: Tensor, stamp: Tensor) -> int:
    """How often an assignment was set, once another one is set where these entries are.

    In an average over different counts the last one is as good as another: the model that was averaged may have it, and
    none that is set there later may have the same number as this one.

    Examples:
        >>> from hyperproto.checkpoint import format_version
        >>> older, newer = record_of(torch.tensor([0, 1]), 3), record_of(torch.tensor([1, 0]), 4)
        >>> next_count(newer, format_version(4)), next_count(older.lerp(newer, 0.1), format_version(3))
        (5, 4)
    """
    recorded, newest = float(record[-1]), count_of(record, stamp)
    is_averaged = recorded > (count_in(stamp) or 0) and not abs(recorded - round(recorded)) <= COUNT_NOISE
    return newest if is_averaged else newest + 1


def is_of_another(record: Tensor, assignment: Tensor) -> bool:
    """Whether a record is as `record_of` made it, and of another assignment (C,): that was written by hand."""
    values = record[:-NUM_EXTRA].double()
    if torch.equal(values, assignment.double()) or not torch.equal(values, values.round()):
        return False
    return bool((_checksum(values) - record[-NUM_EXTRA]).abs() <= _noise(record, len(values)))


def is_average_with(newest: Tensor, record: Tensor, num_prototypes: int) -> bool:
    """Whether a record may be an average over different ones, of which `newest`, another record, is the newest.

    Examples:
        >>> older, newer = record_of(torch.tensor([0, 1]), 3), record_of(torch.tensor([1, 0]), 4)
        >>> [is_average_with(each, older.lerp(newer, 0.1), 2) for each in (newer, older)]
        [True, False]
    """
    if not bool(record.isfinite().all()) or float(record[-1]) > float(newest[-1]) + COUNT_NOISE:
        return False
    return _recorded(record, num_prototypes) is None


def _recorded(record: Tensor, num_prototypes: int) -> Tensor | None:
    """The assignment (C,) that a record is of; None for one that is of none or of several."""
    values, noise = record[:-NUM_EXTRA].double(), _noise(record, num_prototypes)
    whole = values.round()
    # NaN and infinity are far from everything.
    if not bool(((values - whole).abs() <= noise).all() & ((_checksum(whole) - record[-NUM_EXTRA]).abs() <= noise)):
        return None
    try:
        check_assignment(whole.long(), len(whole), num_prototypes)
    except AssignmentError:
        return None
    return whole.long()


def _noise(record: Tensor, num_prototypes: int) -> float:
    return NOISE + max(SHARE_OF_NOISE, 4.0 * torch.finfo(record.dtype).eps) * num_prototypes


def _checksum(values: Tensor) -> Tensor:
    """() float64, of whole numbers (C,) as float64: what no average over different ones has."""
    places = torch.arange(len(values), dtype=torch.float64, device="cpu")
    return torch.sin(places + 1.618034 * values).sum()
