"""Vectors without a common frame: the rotation and the matching that bring them nearest to the prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.errors import AssignmentError, ShapeError
from hyperproto.matching.dense import solve_dense
from hyperproto.matching.swaps import swap_to_agree

#: A matching that gains less than this share of the similarity gains float64 rounding.
SMALLEST_GAIN = 1e-9


@dataclass(frozen=True)
class Alignment:
    """A rotation and an assignment of vectors to prototypes.

    Attributes:
        rotation: (D, E) float64, orthonormal rows (D <= E) or columns; `vectors @ rotation.T` lies near the prototypes.
        assignment: (C,) int64, injective: the prototype of each vector.
        similarities: the objective after each rotation and each matching of the best start; never decreasing.
    """

    rotation: Tensor
    assignment: Tensor
    similarities: tuple[float, ...]

    @property
    def similarity(self) -> float:
        """What was reached."""
        return self.similarities[-1]


def align(vectors: Tensor, prototypes: Tensor, *, num_starts: int = 4, seed: int = 0) -> Alignment:
    r"""Rotate vectors and match them one to one with prototypes, so that each lies along its own.

    .. math:: \max_{R, \sigma} \sum_c \langle R v_c, w_{\sigma(c)} \rangle
              \qquad R R^\top = I \text{ or } R^\top R = I, \; \sigma \text{ injective}

    With sigma fixed this is orthogonal Procrustes, with R fixed an assignment problem; they alternate until neither
    gains. Both steps are exact, so that the similarity never decreases, but the alternation moves little from where
    it starts. Each start is therefore brought to a good assignment by `swap_to_agree` first, and the best of several
    is taken. Long vectors count more; normalise them first if they should not.

    Args:
        vectors: (C, E) floating point, finite; centre them unless the origin means something.
        prototypes: (P, D), P >= C.
        num_starts: the first start turns principal axes onto principal axes, the others are random rotations.
        seed: of the random rotations.

    Returns:
        The best alignment found, on the CPU.

    Raises:
        ShapeError: not two matrices.
        AssignmentError: P < C, or vectors that are not finite.

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, -1.0]])
        >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> found = align(corners[[2, 0, 1]] @ quarter_turn, corners)
        >>> found.assignment.tolist(), round(found.similarity, 4)
        ([2, 0, 1], 3.0)

    References:
        Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    _check(vectors, prototypes)
    points, targets = vectors.detach().cpu().double(), prototypes.detach().cpu().double()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rotations = [_principal_rotation(points, targets)]
    rotations += [_random_rotation(targets.shape[1], points.shape[1], generator) for _ in range(num_starts - 1)]
    return max((_align_from(points, targets, start) for start in rotations), key=lambda found: found.similarity)


def _align_from(vectors: Tensor, prototypes: Tensor, rotation: Tensor) -> Alignment:
    start = solve_dense(vectors @ rotation.T @ prototypes.T, torch.arange(len(vectors), device="cpu"))
    assignment = swap_to_agree(vectors, prototypes, start)
    similarities: list[float] = []
    while True:
        rotation, turned = _procrustes(vectors, prototypes[assignment])
        cosines = vectors @ rotation.T @ prototypes.T  # (C, P)
        moved = solve_dense(cosines, assignment)
        matched = float(cosines.gather(1, moved[:, None]).sum())
        similarities.append(turned)
        if matched <= turned + SMALLEST_GAIN * abs(turned):
            return Alignment(rotation, assignment, tuple(similarities))
        similarities.append(matched)
        assignment = moved


def _procrustes(vectors: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """The (partial) isometry R (D, E) with the largest sum of <R v_c, t_c>, and that sum."""
    left, values, right = torch.linalg.svd(targets.T @ vectors, full_matrices=False)
    return left @ right, float(values.sum())


def _principal_rotation(vectors: Tensor, prototypes: Tensor) -> Tensor:
    count = min(vectors.shape[1], prototypes.shape[1])
    sources, targets = (torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -count:] for rows in (vectors, prototypes))
    return targets @ sources.T


def _random_rotation(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    large, small = max(num_rows, num_columns), min(num_rows, num_columns)
    start = torch.randn(large, small, generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(start).Q
    return basis if num_rows == large else basis.T


def _check(vectors: Tensor, prototypes: Tensor) -> None:
    if vectors.dim() != 2 or prototypes.dim() != 2:
        raise ShapeError(
            f"expected vectors (C, E) and prototypes (P, D), got {tuple(vectors.shape)} and {tuple(prototypes.shape)}."
        )
    if len(prototypes) < len(vectors):
        raise AssignmentError(
            f"{len(vectors)} labels need at least as many prototypes, got {len(prototypes)}. "
            "Build the bank with more prototypes."
        )
    if not bool(torch.isfinite(vectors).all()):
        wrong = torch.nonzero(~torch.isfinite(vectors).all(dim=1)).flatten()[:10].tolist()
        raise AssignmentError(f"vectors must be finite; rows {wrong} are not.")
