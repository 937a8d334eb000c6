"""The assignment problem: labels, prototypes, the cosines between them, and what makes an assignment valid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hyperproto.errors import AssignmentError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Similarities and prices are rounded to multiples of this, so that sums and differences of them are exact in float64
#: and ties are ties. Differences of 1e-16 in their place would make scipy's solver bid them up one by one, for ever.
GRID = 2.0**-32


def check_assignment(assignment: Tensor, num_classes: int, num_prototypes: int) -> None:
    """Raise unless `assignment` is an injective map from C labels into P prototypes.

    Raises:
        AssignmentError: another shape or dtype, a value out of range, or a value twice.
    """
    if assignment.shape != (num_classes,) or assignment.dtype != torch.int64 or assignment.is_meta:
        raise AssignmentError(
            f"expected an assignment of shape ({num_classes},) and dtype torch.int64, got "
            f"{tuple(assignment.shape)} and {assignment.dtype} on {assignment.device}."
        )
    uses = torch.zeros(num_prototypes, dtype=torch.int64, device=assignment.device)
    smallest, largest = int(assignment.min()), int(assignment.max())
    if smallest < 0 or largest >= num_prototypes:
        raise AssignmentError(
            f"an assignment to {num_prototypes} prototypes needs values in [0, {num_prototypes - 1}], "
            f"got values from {smallest} to {largest}."
        )
    uses.index_add_(0, assignment, torch.ones_like(assignment))
    if int(uses.max()) > 1:
        shared = torch.nonzero(uses > 1).flatten()[:5].tolist()
        raise AssignmentError(f"each prototype can stand for one label only; used more than once: {shared}.")


def on_grid(values: FloatArray) -> FloatArray:
    """Nearest multiples of `GRID`.

    Examples:
        >>> bool(on_grid(np.array([0.1]))[0] * 2**32 % 1)
        False
    """
    rounded: FloatArray = np.round(values / GRID) * GRID
    return rounded


def pair_cosines(means: Tensor, prototypes: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    r"""Inner products $\langle m_i, w_j \rangle$ of some pairs, in float64.

    Args:
        means: (C, D).
        prototypes: (P, D).
        labels: (N,) int64, the i.
        columns: (N,) int64, the j.

    Returns:
        (N,) float64.

    Examples:
        >>> pair_cosines(torch.eye(3), torch.eye(3), torch.tensor([0, 1]), torch.tensor([0, 2])).tolist()
        [1.0, 0.0]
    """
    pieces = [
        torch.linalg.vecdot(means[i].double(), prototypes[j].double())
        for i, j in zip(torch.split(labels, 1024), torch.split(columns, 1024), strict=True)
    ]
    return torch.cat(pieces) if pieces else means.new_zeros(0, dtype=torch.float64)


def total_similarity(means: Tensor, prototypes: Tensor, assignment: Tensor, weights: Tensor | None = None) -> float:
    """Sum over labels of weight (1 by default) times the inner product of mean and assigned prototype, in float64."""
    cosines = pair_cosines(means, prototypes, torch.arange(len(means), device="cpu"), assignment)
    return float((cosines if weights is None else cosines * weights).sum())


@dataclass(frozen=True)
class Problem:
    r"""Similarities $S_{ij} = a_i \langle m_i, w_j \rangle$ of C labels to P >= C prototypes, by their factors.

    Attributes:
        means: (C, D) float32 rows of length 1 on the CPU.
        prototypes: (P, D) float32 rows of length 1 on the CPU.
        weights: (C,) float64 in (0, 1], the a.
        current: (C,) prototypes in force.
        occupied: (P,) bool, prototypes that labels outside this problem hold; free ones are taken first in a tie.
    """

    means: Tensor
    prototypes: Tensor
    weights: Tensor
    current: IntArray
    occupied: npt.NDArray[np.bool_]

    @property
    def rounding(self) -> float:
        """Largest possible error of a cosine less a price in `Candidates.scan`: D products and sums of float32."""
        # "high" and "medium" let matrix products round their inputs to as little as eight bits.
        reduced = torch.get_float32_matmul_precision() != "highest"
        return (self.means.shape[1] + 4) * 2.0**-24 + (2.0**-8 if reduced else 0.0)

    def scaled_means(self, labels: Tensor) -> Tensor:
        """Rows a_i m_i of some labels, float32."""
        return self.means[labels] * self.weights[labels, None].float()

    def similarities(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """Similarities of pairs in float64, on the grid."""
        labels = torch.from_numpy(rows)
        cosines = pair_cosines(self.means, self.prototypes, labels, torch.from_numpy(columns))
        return on_grid((cosines * self.weights[labels]).numpy())


def place_unseen(current: Tensor, seen: Tensor, matched: Tensor, num_prototypes: int) -> Tensor:
    """The whole assignment: labels without a mean stay, or take what is free if a seen label took their prototype."""
    assignment = current.clone()
    assignment[seen] = matched
    taken = torch.zeros(num_prototypes, dtype=torch.bool, device="cpu")
    taken[matched] = True
    displaced = taken[current]
    displaced[seen] = False
    taken[assignment[~displaced]] = True
    assignment[displaced] = torch.nonzero(~taken).flatten()[: int(displaced.sum())]
    return assignment
