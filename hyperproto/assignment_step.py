"""The record of one assignment step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AssignmentStep:
    """What one assignment step did.

    Attributes:
        changed: number of labels that moved to another prototype.
        moved_labels: those labels, ascending.
        similarity_before: sum over labels of the cosine between class mean and prototype, before the step.
        similarity_after: the same after it; never smaller.
        unseen: labels without a class mean so far, ascending; they count as similarity 0.
        solver: the method that solved, or "frozen".
        optimal: whether no assignment has a larger similarity.
        seconds: wall time of the step.
        equiangular: all prototypes are at one angle from each other (a simplex): any permutation of labels is then an
            isometry, and the step cannot change the geometry between classes, only how far each has to travel.
    """

    changed: int
    moved_labels: tuple[int, ...]
    similarity_before: float
    similarity_after: float
    unseen: tuple[int, ...]
    solver: str
    optimal: bool
    seconds: float
    equiangular: bool

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
