"""Vectors without a common frame: the rotation and the matching that bring them nearest to the prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.errors import AssignmentError, ShapeError
from hyperproto.matching.dense import solve_dense
from hyperproto.matching.solve import solve_assignment
from hyperproto.matching.swaps import swap_to_agree

#: A matching that gains less than this share of the similarity gains float64 rounding.
SMALLEST_GAIN = 1e-9

#: Vectors, at most, that are swapped and matched over all cosines: some seconds a start. Beyond that both would take
#: hours and tens of GiB.
MOST_SWAPPED = 2048


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

    $$
    \max_{R, \sigma} \sum_c \langle R v_c, w_{\sigma(c)} \rangle
        \qquad R R^\top = I \text{ or } R^\top R = I, \; \sigma \text{ injective}
    $$

    With sigma fixed this is orthogonal Procrustes, with R fixed an assignment problem; they alternate until neither
    gains. Both steps are exact, so that the similarity never decreases, but the alternation moves little from where
    it starts. Each start is therefore brought to a good assignment by `swap_to_agree` first, and the best of several
    is taken. Turning the vectors turns the rotation and changes no assignment. Long vectors count more; normalise
    them first if they should not. More than `MOST_SWAPPED` vectors get one start, no swaps and the sparse matching,
    in O((C + P) D) memory.

    Args:
        vectors: (C, E) floating point, finite; centre them unless the origin means something.
        prototypes: (P, D), P >= C.
        num_starts: the first start turns principal axes onto principal axes, the others turn them at random.
        seed: of the random rotations.

    Returns:
        The best alignment found, on the CPU.

    Raises:
        ShapeError: not two matrices.
        AssignmentError: P < C, or vectors that are not finite.

    Examples:
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
    axes, target_axes = _principal_axes(points), _principal_axes(targets)
    count = min(points.shape[1], targets.shape[1])
    rotations = [target_axes[:, -count:] @ axes[:, -count:].T]
    if len(points) <= MOST_SWAPPED:
        randoms = (_random_rotation(targets.shape[1], points.shape[1], generator) for _ in range(num_starts - 1))
        rotations += [random @ axes.T for random in randoms]
    return max((_align_from(points, targets, start) for start in rotations), key=lambda found: found.similarity)


def _align_from(vectors: Tensor, prototypes: Tensor, rotation: Tensor) -> Alignment:
    assignment = _match(vectors @ rotation.T, prototypes, torch.arange(len(vectors), device="cpu"))
    if len(vectors) <= MOST_SWAPPED:
        assignment = swap_to_agree(vectors, prototypes, assignment)
    similarities: list[float] = []
    while True:
        rotation, turned = _procrustes(vectors, prototypes[assignment])
        moved = _match(vectors @ rotation.T, prototypes, assignment)
        matched = float(((vectors @ rotation.T) * prototypes[moved]).sum())
        similarities.append(turned)
        if matched <= turned + SMALLEST_GAIN * abs(turned):
            return Alignment(rotation, assignment, tuple(similarities))
        similarities.append(matched)
        assignment = moved


def _match(vectors: Tensor, prototypes: Tensor, current: Tensor) -> Tensor:
    """Assignment (C,) of the largest total similarity."""
    if len(vectors) <= MOST_SWAPPED:
        return solve_dense(vectors @ prototypes.T, current)
    weights = vectors.norm(dim=1)
    return solve_assignment(vectors, prototypes, current=current, weights=weights, method="sparse").assignment


def _procrustes(vectors: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """The (partial) isometry R (D, E) with the largest sum of <R v_c, t_c>, and that sum."""
    left, values, right = torch.linalg.svd(targets.T @ vectors, full_matrices=False)
    return left @ right, float(values.sum())


def _principal_axes(points: Tensor) -> Tensor:
    """(E, E) orthonormal columns, the longest axis last, which turn along with the points (C, E)."""
    axes = torch.linalg.eigh(points.T @ points).eigenvectors
    coordinates = points @ axes  # (C, E)
    # An axis has no sign of its own: the point that lies farthest along it gets a positive coordinate.
    return axes * coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True)).sgn()


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
