"""Exact assignment without the matrix of all cosines: candidates, a sparse matching, and a proof over all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hyperproto.matching.candidates import Candidates
from hyperproto.matching.prices import exact_prices, first_prices, smooth_prices
from hyperproto.matching.problem import GRID, FloatArray, IntArray, Problem, on_grid, place_unseen

if TYPE_CHECKING:
    from scipy.sparse import csr_array

#: Rounds of matching and scanning. One to three close nearly every problem.
MAX_ROUNDS = 30

#: Scans of all labels, at most, before the first matching.
SETTLING_SCANS = 3

#: Pairs a label in the first matching: the tightest at the smoothed prices.
ACTIVE_PER_LABEL = 6

#: Reduced costs are multiples of half of `GRID`; one closer to zero than this is zero.
TIGHT = 0.25 * GRID


@dataclass(frozen=True)
class SparseSolution:
    """An assignment, and the prices that prove it.

    Attributes:
        assignment: (C,) int64.
        prices: (P,) float64 dual prices of the prototypes, from which a problem like this one is solved faster.
        proven: whether every pair was checked against the prices; the assignment is optimal then.
    """

    assignment: Tensor
    prices: Tensor
    proven: bool


def solve_sparse(
    means: Tensor,
    prototypes: Tensor,
    current: Tensor,
    *,
    weights: Tensor | None = None,
    prices: Tensor | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> SparseSolution:
    r"""Injective map sigma that maximises the total similarity; exact, in O(C + P) memory and a chunk.

    $$ \max_\sigma \sum_i S_{i, \sigma(i)}, \qquad S_{ij} = a_i \langle m_i, w_j \rangle $$

    Column generation. The pairs that matter are listed by a scan in chunks, at prices that spread the labels over the
    prototypes. A sparse matching over the listed pairs has an optimal dual; no other pair can improve the matching if
    none is better for its label than what it has, at these prices. For most labels the last scan's thresholds prove
    that, the others are scanned again, and what is found is listed and solved for, until nothing is found.

    The proof is by float32 cosines with the largest error that they can have, and by float64, rounded to `GRID`,
    wherever that decides: no total is larger by more than C * 2^-32 times the largest weight. Labels with more ties
    than a scan lists are the exception, where a pair may be missed that gains less than float32's rounding. Labels
    without a mean stay where they are unless a seen label needs their prototype.

    Args:
        means: (C, D) float32 unit or zero rows on the CPU.
        prototypes: (P, D) float32 unit rows on the CPU, P >= C.
        current: (C,) int64, the assignment to stay close to.
        weights: (C,) float64, not negative; 1 by default.
        prices: (P,) of a problem like this one, to start from. They save time and change nothing but ties.
        max_rounds: matchings before giving up.

    Returns:
        The solution; after `max_rounds` the best so far, not proven.

    Examples:
        >>> solve_sparse(torch.eye(3)[[2, 0, 1]], torch.eye(3), torch.arange(3)).assignment.tolist()
        [2, 0, 1]

    References:
        Jonker, Volgenant, A shortest augmenting path algorithm for dense and sparse linear assignment problems, 1987
        (the matching, scipy's); Dantzig, Wolfe, Decomposition principle for linear programs, 1960 (columns by price).
    """
    weights = torch.ones(len(means), dtype=torch.float64, device="cpu") if weights is None else weights
    seen = torch.nonzero(means.any(dim=1) & (weights > 0)).flatten()
    if len(seen) == 0:
        nothing = torch.zeros(len(prototypes), dtype=torch.float64, device="cpu")
        return SparseSolution(current.clone(), nothing, proven=True)
    scale = weights[seen].max()
    occupied = torch.zeros(len(prototypes), dtype=torch.bool, device="cpu")
    occupied[current] = True
    occupied[current[seen]] = False
    problem = Problem(means[seen], prototypes, weights[seen] / scale, current[seen].numpy(), occupied.numpy())
    warm = None if prices is None else (prices / scale).numpy()
    matched, duals, proven = _generate_columns(problem, warm, max_rounds)
    assignment = place_unseen(current, seen, torch.from_numpy(matched), len(prototypes))
    return SparseSolution(assignment, torch.from_numpy(duals) * scale, proven)


def _generate_columns(problem: Problem, warm: FloatArray | None, max_rounds: int) -> tuple[IntArray, FloatArray, bool]:
    """Assignment and prices of a problem whose labels all have a mean, and whether they are proven optimal."""
    candidates = Candidates(problem)
    prices, nearly_optimal = first_prices(problem, warm)
    if nearly_optimal:
        candidates.scan(prices)
    else:
        prices = _settle(candidates, prices)
    for _ in range(max_rounds):
        assignment, profits, prices = _solve_listed(candidates, prices)
        open_labels = candidates.open_labels(profits, prices)
        added = candidates.scan(prices, open_labels) if len(open_labels) else open_labels
        num_better = _activate_better(candidates, added, profits, prices)
        if num_better == 0:
            proven = bool((candidates.reduced_costs(profits, prices)[candidates.active] < TIGHT).all())
            return _with_fewest_moves(candidates, assignment, profits, prices), prices, proven
        if num_better > 0.1 * len(assignment):
            prices = smooth_prices(candidates, prices)
    return assignment, prices, False


def _settle(candidates: Candidates, prices: FloatArray) -> FloatArray:
    """List candidates at prices near the optimal ones: scan and smooth, again where the smoothing moved prices far."""
    for _ in range(SETTLING_SCANS):
        candidates.scan(prices)
        prices = smooth_prices(candidates, prices)
        if len(candidates.open_labels(candidates.profits(prices), prices)) <= 0.5 * len(candidates.left_out):
            break
    return prices


def _solve_listed(candidates: Candidates, prices: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
    """Optimal assignment, profits and prices over the listed pairs, only the tightest of which need be matched."""
    _activate_tightest(candidates, prices, ACTIVE_PER_LABEL)
    while True:
        assignment = _match(candidates, prices)
        profits, prices = exact_prices(candidates, assignment, prices)
        close = candidates.reduced_costs(profits, prices) > -candidates.problem.rounding
        missing = np.flatnonzero(close & ~candidates.active)
        if len(missing) == 0:
            return assignment, profits, prices
        candidates.activate(missing)


def _activate_tightest(candidates: Candidates, prices: FloatArray, per_label: int) -> None:
    """Make active the listed pairs of largest reduced cost, so many a label on average."""
    costs = candidates.reduced_costs(candidates.profits(prices), prices)
    count = min(len(costs), per_label * len(candidates.left_out))
    tightest = costs >= np.partition(costs, -count)[-count]
    candidates.activate(np.flatnonzero(tightest & ~candidates.active))


def _match(candidates: Candidates, prices: FloatArray) -> IntArray:
    """Optimal assignment over the active pairs; where they allow none, over twice as many, and so on."""
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    shape = (len(candidates.left_out), len(candidates.prices))
    per_label = ACTIVE_PER_LABEL
    # By reduced costs, which leave the solver little to do. Prices change no comparison of assignments that use all
    # prototypes; where some are left over, only profits may be taken off.
    known = on_grid(prices) if len(prices) == len(candidates.left_out) else np.zeros_like(prices)
    while True:
        active = candidates.active
        losses = -candidates.reduced_costs(on_grid(candidates.profits(known)), known)[active]
        # Shifted above zero, which the solver would take for a missing pair.
        graph = _table(losses - losses.min() + 1.0, candidates.rows[active], candidates.columns[active], shape)
        try:
            _, assignment = min_weight_full_bipartite_matching(graph)
        except ValueError:
            if active.all():
                raise
            per_label *= 2
            _activate_tightest(candidates, prices, per_label)
        else:
            return assignment.astype(np.int64)


def _with_fewest_moves(
    candidates: Candidates, assignment: IntArray, profits: FloatArray, prices: FloatArray
) -> IntArray:
    """Among assignments of equal total, one that keeps most labels at their prototype and takes fewest occupied ones.

    All of them use only pairs whose reduced cost is zero.
    """
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    problem = candidates.problem
    tight = candidates.active & (candidates.reduced_costs(profits, prices) > -TIGHT)
    rows, columns, values = candidates.rows[tight], candidates.columns[tight], candidates.values[tight]
    if len(rows) == len(assignment):
        return assignment
    costs = 2.0 + (problem.current[rows] != columns) + problem.occupied[columns]
    graph = _table(costs, rows, columns, (len(assignment), len(prices)))
    _, chosen = min_weight_full_bipartite_matching(graph)
    # A prototype that has a price must not be left over.
    table = _table(values + 2.0, rows, columns, graph.shape)
    everyone = np.arange(len(assignment))
    worse = table[everyone, chosen].sum() < table[everyone, assignment].sum() - TIGHT
    return assignment if worse else chosen.astype(np.int64)


def _table(values: FloatArray, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> csr_array:
    """The listed pairs as a sparse matrix, in the 32-bit indices to which scipy's matching is bound before 1.13."""
    from scipy.sparse import csr_array

    return csr_array((values, (rows.astype(np.int32), columns.astype(np.int32))), shape=shape)


def _activate_better(candidates: Candidates, added: IntArray, profits: FloatArray, prices: FloatArray) -> int:
    """Make active, of newly listed pairs, what may be better for a label than what it has; the number that is."""
    close = added[candidates.reduced_costs(profits, prices)[added] > -candidates.problem.rounding]
    candidates.activate(close)
    return int((candidates.reduced_costs(profits, prices)[close] > TIGHT).sum())
