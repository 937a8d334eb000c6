"""Prototypes with a prior: classes whose vectors are alike may lie nearer to each other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hyperproto.constructions._optimise import anneal, weighted_sums
from hyperproto.constructions.random import random_points
from hyperproto.constructions.separated import smooth_maximum


def class_vector_points(vectors: Tensor, dim: int, generator: torch.Generator, *, strength: float) -> Tensor:
    r"""Prototypes as separated as can be, with an allowance for similar classes.

    .. math:: \min_W \max_{i \neq j} \left( \langle w_i, w_j \rangle - t \, s_{ij} \right), \qquad
              s_{ij} = \cos(v_i - \bar v, \, v_j - \bar v)

    With t = 0 these are the points of "separated". The larger t, the more their cosines rank as those of the vectors
    do; at t = 1 nothing keeps classes of equal vectors apart. [3] adds a ranking loss over triplets to its separation
    loss and weighs the two; one maximum over pairs has both in it, and needs no triplets.

    Args:
        vectors: (P, E) float64 on the CPU, finite, none of them the mean of all.
        dim: D >= 2.
        generator: of the random start.
        strength: t in [0, 1].

    Returns:
        (P, D) float32 unit rows, row i for vector i.

    Raises:
        BankError: a size that no construction takes.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], dtype=torch.float64)
        >>> points = class_vector_points(vectors, 3, torch.Generator().manual_seed(0), strength=0.5)
        >>> cosines = points @ points.T
        >>> bool(cosines[0, 1] > cosines[0, 2] + 0.4)
        True

    References:
        Mettes et al., NeurIPS 2019, section 3.2 (prototypes with privileged information).
    """
    start = random_points(len(vectors), dim, generator)
    centred = vectors - vectors.mean(dim=0)
    directions = centred / centred.norm(dim=1, keepdim=True)
    allowed = strength * weighted_sums(directions, directions.T)  # (P, P)

    def score(points: Tensor) -> float:
        return float((weighted_sums(points, points.T) - allowed).fill_diagonal_(-torch.inf).max())

    return anneal(partial(smooth_maximum, allowed=allowed), start, score=score).float()
