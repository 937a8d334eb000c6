"""Which prototype stands for which label: the front of the solvers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hyperproto.arguments import as_tensor, choice, matrix, readable
from hyperproto.errors import ArgumentError, AssignmentError, ShapeError
from hyperproto.matching.dense import solve_dense
from hyperproto.matching.problem import check_assignment, total_similarity
from hyperproto.matching.sparse import solve_sparse
from hyperproto.sphere import normalise

AssignmentMethod = Literal["auto", "dense", "sparse"]

#: From this many labels on, "auto" is "sparse": measured, about where random means take as long by either. Means that
#: nearly coincide or form clusters gain long before.
SPARSE_FROM_CLASSES = 1000

#: Memory that "sparse" may take for a dense solution where its rounds do not close: 4 GiB.
DENSE_BYTES = 2**32


@dataclass(frozen=True)
class AssignmentSolution:
    """Which prototype stands for which label.

    Attributes:
        assignment: (C,) int64 on the CPU, injective.
        similarity: sum over labels of weight times cosine with the matched prototype.
        similarity_of_current: the same of the assignment that was in force.
        optimal: whether no assignment can have a larger similarity (to float rounding): proven by the solver.
        method: the solver used.
        prices: (P,) float64 dual prices of the prototypes, with which "sparse" solves the next problem faster; None
            from "dense".
    """

    assignment: Tensor
    similarity: float
    similarity_of_current: float
    optimal: bool
    method: str
    prices: Tensor | None = None


def solve_assignment(
    class_means: Tensor,
    prototypes: Tensor,
    *,
    current: Tensor | None = None,
    weights: Tensor | None = None,
    method: AssignmentMethod = "auto",
    prices: Tensor | None = None,
) -> AssignmentSolution:
    r"""The one-to-one assignment of labels to prototypes with the largest total cosine.

    $$ \sigma = \arg\max_{\sigma \text{ injective}} \sum_c a_c \langle m_c, w_{\sigma(c)} \rangle $$

    Args:
        class_means: (C, D) mean embeddings; rows are normalised here. A zero row is a label never seen: it keeps
            its prototype unless a seen label needs it.
        prototypes: (P, D), P >= C; rows are normalised here.
        current: (C,) int64, the assignment in force, kept where moving gains nothing; by default label k at k.
        weights: (C,) non-negative importance a of each label; 1 by default. "sparse" is exact to C * 2^-32 times the
            largest: weights that differ by many orders of magnitude are for "dense".
        method: "dense" (scipy's solver on all cosines: O(C P) memory), "sparse" (candidates, and a proof over all
            pairs: O((C + P) D) memory, many times faster for many labels) or "auto", which picks by size. Should
            "sparse" not close within its rounds, "dense" takes over where it needs 4 GiB or less.
        prices: (P,) of the last solution, for "sparse" to start from: where little has changed since, it costs one
            pass over the cosines. They change nothing but which of equally good assignments is found.

    Returns:
        The solution; exact in every mode.

    Raises:
        ShapeError: shapes do not fit.
        AssignmentError: P < C, rows that are not finite (named), an invalid `current`, or no solution within memory.
        ArgumentError: an unknown method, or weights that are negative or not finite.

    Examples:
        >>> means = torch.tensor([[0.0, 1.0], [1.0, 0.1]])
        >>> solve_assignment(means, torch.eye(2)).assignment.tolist()
        [1, 0]

    References:
        Saadabadi et al., CVPR 2024, eq. 7 (the assignment step).
    """
    choice(method, "method", get_args(AssignmentMethod))
    class_means = matrix(class_means, "class means of shape (C, D)", smallest=(0, 1))
    prototypes = matrix(prototypes, "prototypes of shape (P, D)", smallest=(0, 1))
    weights = None if weights is None else as_tensor(weights, "weights of shape (C,)")
    prices = None if prices is None else as_tensor(prices, "prices of shape (P,)")
    named = {"class means": class_means, "prototypes": prototypes, "weights": weights, "prices": prices}
    for name, given in named.items():
        if given is not None:
            readable(given, name)
    _check_problem(class_means, prototypes, weights, prices)
    num_classes, num_prototypes = len(class_means), len(prototypes)
    if current is None:
        current = torch.arange(num_classes, device="cpu")
    current = as_tensor(current, "the current assignment", error=AssignmentError)
    check_assignment(current, num_classes, num_prototypes)
    means, prototypes, current = (
        normalise(class_means.detach()).cpu(),
        normalise(prototypes.detach()).cpu(),
        current.cpu(),
    )
    weights = None if weights is None else weights.detach().cpu().double()
    if prices is not None:
        prices = prices.detach().cpu().double()
    found: Tensor | None = None
    used, new_prices = "dense", None
    if method == "sparse" or (method == "auto" and num_classes >= SPARSE_FROM_CLASSES):
        found, new_prices = _solve_sparse(means, prototypes, current, weights, prices)
    if found is None:
        found = solve_dense(_weighted(means.double() @ prototypes.double().T, weights), current)
    else:
        used = "sparse"
    similarity, of_current = (total_similarity(means, prototypes, each, weights) for each in (found, current))
    if similarity <= of_current:  # equal but for the order of summation
        found, similarity = current.clone(), of_current
    return AssignmentSolution(found, similarity, of_current, optimal=True, method=used, prices=new_prices)


def _solve_sparse(
    means: Tensor, prototypes: Tensor, current: Tensor, weights: Tensor | None, prices: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Assignment and prices, or None and None if it did not close and the dense solution fits into `DENSE_BYTES`."""
    found = solve_sparse(means, prototypes, current, weights=weights, prices=prices)
    if found.proven:
        return found.assignment, found.prices
    needed = 3 * 8 * len(means) * len(prototypes)  # the matrix, its copy with ties broken, and scipy's
    if needed > DENSE_BYTES:
        raise AssignmentError(
            f"the sparse assignment of {len(means)} labels to {len(prototypes)} prototypes did not close. "
            f'method="dense" is always exact and needs {needed / 2**30:.1f} GiB of memory here.'
        )
    return None, None


def _weighted(similarity: Tensor, weights: Tensor | None) -> Tensor:
    return similarity if weights is None else similarity.mul_(weights[:, None])


def _check_problem(class_means: Tensor, prototypes: Tensor, weights: Tensor | None, prices: Tensor | None) -> None:
    if class_means.dim() != 2 or prototypes.dim() != 2 or class_means.shape[1] != prototypes.shape[1]:
        raise ShapeError(
            "expected class means (C, D) and prototypes (P, D) of one dimension D, got "
            f"{tuple(class_means.shape)} and {tuple(prototypes.shape)}."
        )
    if len(class_means) == 0:
        raise AssignmentError("expected class means of at least one label, got none.")
    if len(prototypes) < len(class_means):
        raise AssignmentError(
            f"{len(class_means)} labels need at least as many prototypes, got {len(prototypes)}. "
            "Build the bank with more prototypes."
        )
    for name, rows in (("class means", class_means), ("prototypes", prototypes)):
        finite = torch.isfinite(rows).all(dim=1)
        if not bool(finite.all()):
            wrong = torch.nonzero(~finite).flatten()[:10].tolist()
            raise AssignmentError(f"{name} must be finite; rows {wrong} are not.")
    if prices is not None and (prices.shape != (len(prototypes),) or prices.is_complex()):
        raise ShapeError(
            f"expected real prices of shape ({len(prototypes)},), got {tuple(prices.shape)} and {prices.dtype}."
        )
    if prices is not None and not bool(torch.isfinite(prices).all()):
        raise ArgumentError("expected finite prices, those of the last solution.")
    if weights is None:
        return
    if weights.shape != (len(class_means),) or weights.is_complex():
        raise ShapeError(
            f"expected real weights of shape ({len(class_means)},), got {tuple(weights.shape)} and {weights.dtype}."
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ArgumentError("weights must be finite and not negative.")
