"""Prototypes with a prior: class vectors, such as a trained classifier's weights, spread over D dimensions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hyperproto.constructions._check import check_size
from hyperproto.errors import BankError
from hyperproto.sphere import largest_cosines

Array = NDArray[np.float64]

#: Singular values below this share of the largest one, and lengths below this, are rounding.
ROUNDING = 1e-6
#: rho of `unit_metric`: from 0.01 to 0.3 the banks differ little; far less diverges where unit length cannot be had.
SLACK = 0.1
#: Prototypes beyond this cosine (0.26 degrees) coincide: no embedding could tell them apart in half precision.
LARGEST_COSINE = 1.0 - 1e-5


def class_vector_points(vectors: Tensor, dim: int) -> Tensor:
    r"""Unit prototypes that a linear map takes to the class vectors, spread as evenly as that allows.

    $$ V - \bar v = U S R^\top, \qquad w_c = M^{1/2} u_c \text{ with } \lVert w_c \rVert = 1 $$

    U are the D leading left singular vectors: the tight frame, which weighs each direction alike, with the column space
    of the best classifier of rank D. Its rows have different lengths, and dividing by these would change which class
    a linear classifier prefers. M gives them one length within the column space instead, by `unit_metric`: the
    logits of a trained classifier are then those of the prototypes behind a linear projection, wherever D dimensions
    leave enough freedom, C <= D (D + 1) / 2, and nearly so below. With D >= C - 1 independent directions the
    prototypes are the regular simplex.

    Args:
        vectors: (C, E) float64 on the CPU, finite, none of them the mean of all.
        dim: D >= 2.

    Returns:
        (C, D) float32 unit rows, row i for vector i. If E = D, in the coordinates of the vectors, so that embeddings
        which point along the vectors point along these rows too; else in coordinates of their own, with zeros behind
        the last direction there is.

    Raises:
        BankError: a size that no construction takes, a class that has no part in the D leading directions, or classes
            whose prototypes coincide.

    Examples:
        >>> points = class_vector_points(torch.eye(3, dtype=torch.float64), 2)
        >>> points @ points.T + 0.0
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])
    """
    check_size(len(vectors), dim)
    left, singular_values, right = torch.linalg.svd(vectors - vectors.mean(dim=0), full_matrices=False)
    rank = int((singular_values > ROUNDING * singular_values[0]).sum())
    frame = left[:, : min(dim, rank)]
    pointless = torch.nonzero(frame.norm(dim=1) < ROUNDING).flatten().tolist()
    if pointless:
        raise BankError(
            f"expected class vectors that differ within their {frame.shape[1]} leading directions, got "
            f"{len(pointless)} classes that have no part in these, the first at {pointless[:5]}. Take more dimensions, "
            "or give those classes other vectors."
        )
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.from_numpy(unit_metric(frame.numpy())))
    spread = F.normalize(frame @ (eigenvectors * eigenvalues.sqrt()) @ eigenvectors.T, dim=1)
    coinciding = torch.nonzero(largest_cosines(spread) > LARGEST_COSINE).flatten().tolist()
    if coinciding:
        raise BankError(
            f"expected class vectors that differ within their leading directions, got {len(coinciding)} classes whose "
            f"prototypes coincide with another's, the first at {coinciding[:5]}. Take more dimensions, or give those "
            "classes other vectors."
        )
    if vectors.shape[1] == dim:
        return (spread @ right[: frame.shape[1]]).float()
    return F.pad(spread, (0, dim - frame.shape[1])).float()


def unit_metric(frame: Array) -> Array:
    r"""The roundest metric in which all rows have about unit length.

    $$ \max_M \; \log \det M - \tfrac{1}{2 \rho} \sum_c (u_c^\top M u_c - 1)^2 $$

    Concave in M. Its dual has one variable a row: with $M^{-1} = \sum_c \lambda_c u_c u_c^\top$,

    $$ \min_\lambda \; \log \det M + \sum_c \lambda_c + \tfrac{\rho}{2} \lVert \lambda \rVert^2, $$

    whose gradient $1 + \rho \lambda_c - u_c^\top M u_c$ shows that lengths miss 1 by little where rho is small.
    Products with its Hessian cost O(C D^2), and no C x C matrix is needed.

    Args:
        frame: (C, D) orthonormal columns.

    Returns:
        M, (D, D) symmetric, positive definite.

    Examples:
        >>> frame = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 50)))[0]
        >>> squared_lengths = ((frame @ unit_metric(frame)) * frame).sum(axis=1)
        >>> bool(np.ptp((frame * frame).sum(axis=1)) > 0.3 and np.ptp(squared_lengths) < 0.1)
        True
    """
    from scipy.optimize import minimize  # imported where it is needed: it takes longer than the rest of the package

    num_rows, dim = frame.shape

    def weighted(weights: Array) -> Array:
        """Sum of w_c u_c u_c^T: at the multipliers, the inverse of M."""
        return np.asarray(frame.T @ (weights[:, None] * frame))

    def value(multipliers: Array) -> float:
        eigenvalues = np.linalg.eigvalsh(weighted(multipliers))
        # Inside its domain the matrix is positive definite; a step that leaves it is refused.
        if eigenvalues[0] <= 0:
            return np.inf
        return float(-np.log(eigenvalues).sum() + multipliers.sum() + 0.5 * SLACK * multipliers @ multipliers)

    def gradient(multipliers: Array) -> Array:
        squared_lengths = ((frame @ np.linalg.inv(weighted(multipliers))) * frame).sum(axis=1)
        return np.asarray(1.0 + SLACK * multipliers - squared_lengths)

    def hessian_product(multipliers: Array, direction: Array) -> Array:
        rows = frame @ np.linalg.inv(weighted(multipliers))
        return np.asarray(((rows @ weighted(direction)) * rows).sum(axis=1) + SLACK * direction)

    start = np.full(num_rows, dim / num_rows)
    found = minimize(value, start, jac=gradient, hessp=hessian_product, method="trust-ncg", options={"gtol": 1e-8})
    return np.asarray(np.linalg.inv(weighted(found.x)))
