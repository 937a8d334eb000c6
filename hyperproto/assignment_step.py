"""The record of one assignment step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


def packed_labels(chosen: Tensor) -> bytes:
    """The labels that a mask (C,) on the CPU chooses, at a bit a label: an assigner keeps those of many steps."""
    return np.packbits(chosen.numpy()).tobytes()


def _unpacked(packed: bytes) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8))).tolist())


@dataclass(frozen=True)
class AssignmentStep:
    """What one assignment step did.

    Attributes:
        changed: number of labels that moved to another prototype.
        similarity_before: sum over labels of the cosine between class mean and prototype, before the step.
        similarity_after: the same after it; never smaller.
        solver: the method that solved, or "frozen".
        optimal: whether no assignment has a larger similarity.
        seconds: wall time of the step.
        equiangular: all prototypes are at one angle from each other (a simplex): any permutation of labels is then an
            isometry, and the step cannot change the geometry between classes, only how far each has to travel.
        packed_moved, packed_unseen: what `moved_labels` and `unseen` read; see `packed_labels`.
    """

    changed: int
    similarity_before: float
    similarity_after: float
    solver: str
    optimal: bool
    seconds: float
    equiangular: bool
    packed_moved: bytes = field(repr=False)
    packed_unseen: bytes = field(repr=False)

    @property
    def moved_labels(self) -> tuple[int, ...]:
        """Labels that moved to another prototype, ascending."""
        return _unpacked(self.packed_moved)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Labels without a class mean so far, ascending; they count as similarity 0."""
        return _unpacked(self.packed_unseen)

    def __str__(self) -> str:
        text = (
            f"{self.changed} labels moved, similarity {self.similarity_before:.4f} -> {self.similarity_after:.4f} "
            f"({self.solver}{', optimal' if self.optimal else ''}, {self.seconds:.3f} s)"
        )
        if self.unseen:
            text += f"; {len(self.unseen)} labels not seen yet"
        if self.equiangular:
            text += "; the prototypes form a simplex: no assignment changes the geometry between classes"
        return text
