r"""Dual prices of prototypes: they say which pairs matter, and they prove that an assignment is optimal.

For prices v of prototypes (v >= 0, and 0 for prototypes left over, when there are more of them than labels)

$$ \sum_i S_{i, \sigma(i)} \leq \sum_i u_i + \sum_j v_j, \qquad u_i = \max_j (S_{ij} - v_j), $$

whatever the assignment. One that reaches equality is optimal, and every pair it uses is its label's best at these
prices. Many prices prove the same assignment. Good ones leave every other pair well below its label's best, so that
pairs nobody has looked at yet do not turn up as better ones: hence entropic smoothing at the start, and the middle of
the two extreme solutions at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hyperproto.matching.candidates import Candidates
from hyperproto.matching.problem import FloatArray, IntArray, Problem, on_grid

#: Labels held out to tell whether prices learnt from a sample of the labels are of any use to the others.
HELD_OUT = 256

#: Entries of the largest sample of similarities: 64 MiB of float32.
SAMPLE_ENTRIES = 2**24

#: Largest number of labels in a sample.
SAMPLE_ROWS = 1024

#: Temperatures of the smoothing, as parts of the differences that matter, and sweeps at each.
TEMPERATURES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
SWEEPS = 4

#: Below it quotients of float32 lose all meaning; only problems whose pairs are all alike come here.
SMALLEST_TEMPERATURE = 1e-6


def first_prices(problem: Problem, warm: FloatArray | None) -> tuple[FloatArray, bool]:
    r"""Prices to start from: cheap, and good enough to choose candidates by.

    The price of what all labels have in common, $v_j = \langle \bar m, w_j \rangle$, makes means that nearly
    coincide as easy as scattered ones. Labels in tight clusters still want the same few prototypes; prices learnt
    from a sample of the labels by Sinkhorn's iteration spread them. Where labels have no structure, the sample's own
    noise is worse than no prices; so labels held out decide, by their part of the dual objective.

    Args:
        problem: C labels, P prototypes.
        warm: (P,) prices of a problem like this one; taken if they do better than the common ones.

    Returns:
        (P,) prices, and whether they are the warm ones.

    References:
        Cuturi, Sinkhorn distances, NeurIPS 2013; Genevay et al., Stochastic optimization for large-scale optimal
        transport, NeurIPS 2016 (the dual objective by samples).
    """
    num_labels, num_prototypes = len(problem.means), len(problem.prototypes)
    common = (problem.means * problem.weights.float()[:, None]).mean(dim=0)
    prices = _admissible(problem.prototypes @ common, num_labels)
    order = torch.randperm(num_labels, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    num_held_out = min(HELD_OUT, num_labels // 2)
    held_out = problem.scaled_means(order[:num_held_out]) @ problem.prototypes.T  # (held out, P)
    if num_held_out == 0:
        return prices.double().numpy(), False
    least = _dual_objective(held_out, prices, num_labels)
    if warm is not None:
        warm_prices = _admissible(torch.from_numpy(warm).float(), num_labels)
        if _dual_objective(held_out, warm_prices, num_labels) < least:
            return warm_prices.double().numpy(), True
    spread = float((held_out - prices).std(dim=1, correction=0).mean())
    temperature = 2.0 * spread
    # A small sample tells whether there is any structure; a large one is worth its time only then.
    for num_sampled in (num_held_out, max(1, min(SAMPLE_ROWS, SAMPLE_ENTRIES // num_prototypes))):
        sampled = order[num_held_out : num_held_out + num_sampled]
        sample = problem.scaled_means(sampled) @ problem.prototypes.T
        learnt, value, temperature = _anneal(sample, held_out, prices, temperature, num_labels)
        if not value < least - 0.1 * spread * num_labels:
            break
        prices, least = learnt, value
    return prices.double().numpy(), False


def _anneal(
    sample: Tensor, held_out: Tensor, prices: Tensor, temperature: float, num_labels: int
) -> tuple[Tensor, float, float]:
    """Sinkhorn sweeps, cooling while the labels held out gain: prices, their objective and their temperature."""
    best, best_value, best_temperature = prices, float("inf"), temperature
    square = num_labels == len(prices)
    log_mass = float(np.log(num_labels / len(sample)))
    for _ in range(10):
        for _ in range(3):
            shares = (sample - prices).div_(temperature)
            shares = shares.sub_(shares.logsumexp(dim=1, keepdim=True)).exp_()
            prices = prices + temperature * (shares.sum(dim=0).clamp_min_(1e-6).log_() + log_mass)
            prices = prices if square else prices.clamp_min(0.0)
        value = _dual_objective(held_out, prices, num_labels)
        if value >= best_value:
            break
        best, best_value, best_temperature = prices, value, temperature
        temperature *= 0.5
    return best, best_value, best_temperature


def _dual_objective(held_out: Tensor, prices: Tensor, num_labels: int) -> float:
    """The dual objective of the whole problem, estimated by some of its labels."""
    return num_labels * float((held_out - prices).amax(dim=1).mean()) + float(prices.sum())


def _admissible(prices: Tensor, num_labels: int) -> Tensor:
    """Prices shifted so that P - C of them, the prototypes left over, can be zero and none is negative."""
    spare = len(prices) - num_labels
    if spare == 0:
        return prices - prices.mean()
    return (prices - prices.kthvalue(spare).values).clamp_min(0.0)


def smooth_prices(candidates: Candidates, prices: FloatArray) -> FloatArray:
    r"""Entropic prices over the listed pairs: Sinkhorn's iteration at falling temperatures, from `prices`.

    $$ u_i = \tau \log \sum_j e^{(S_{ij} - v_j) / \tau}, \qquad v_j = \tau \log \sum_i e^{(S_{ij} - u_i) / \tau} $$

    They end close to optimal ones, and in the middle of them, at a few operations a listed pair.

    Args:
        candidates: after a scan of all labels.
        prices: (P,).

    Returns:
        (P,).
    """
    by_row, by_column = _Groups(candidates.rows), _Groups(candidates.columns)
    values = candidates.values.astype(np.float32)
    row_columns, column_rows = candidates.columns[by_row.order], candidates.rows[by_column.order]
    row_values, column_values = values[by_row.order], values[by_column.order]
    smoothed = prices.astype(np.float32)
    some_left_over = len(prices) > len(by_row.keys)
    for part in TEMPERATURES:
        temperature = max(part * candidates.scale, SMALLEST_TEMPERATURE)
        for _ in range(SWEEPS):
            profits = by_row.soft_maximum(row_values - smoothed[row_columns], temperature)
            smoothed[by_column.keys] = by_column.soft_maximum(column_values - profits[column_rows], temperature)
            if some_left_over:
                np.maximum(smoothed, 0.0, out=smoothed)
    return smoothed.astype(np.float64)


class _Groups:
    """Places of an array in groups of equal index, for reductions over each group."""

    def __init__(self, index: IntArray) -> None:
        self.order = np.argsort(index, kind="stable")
        ordered = index[self.order]
        self.starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        self.keys = ordered[self.starts]
        self.lengths = np.diff(self.starts, append=len(index))

    def soft_maximum(self, values: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
        """The sum t log sum exp(x / t) over each group of values, which come in `order`."""
        largest = np.maximum.reduceat(values, self.starts)
        exponentials = np.exp((values - np.repeat(largest, self.lengths)) / np.float32(temperature))
        sums: npt.NDArray[np.float32] = np.add.reduceat(exponentials, self.starts)
        return largest + np.float32(temperature) * np.log(sums)


def exact_prices(candidates: Candidates, assignment: IntArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
    r"""Optimal prices of the active pairs, given an optimal assignment over them.

    The price $p_i$ of the prototype of label i must obey one inequality for each active pair (i, j), where k is
    the label that j belongs to:

    $$ p_k \geq p_i + S_{ij} - S_{i, \sigma(i)}, $$

    prices of prototypes left over being 0 and none negative. Raising what is too low until nothing is gives one
    solution, lowering what is too high another (both are longest paths), and so is their mean. From a good start
    few prices move.

    Args:
        candidates: whose active pairs contain the assignment.
        assignment: (C,) optimal over the active pairs.
        start: (P,) prices to stay close to.

    Returns:
        Profits u (C,) and prices v (P,) with $u_i + v_j \geq S_{ij}$ over the active pairs, and equality on the
        assignment.

    References:
        Ahuja, Magnanti, Orlin, Network Flows, 1993, chapters 5 (label correcting) and 9 (potentials of a flow).
    """
    num_labels, num_prototypes = len(assignment), len(start)
    owner = np.full(num_prototypes, num_labels)  # label C stands for "left over"
    owner[assignment] = np.arange(num_labels)
    active = candidates.active
    rows, targets, values = candidates.rows[active], owner[candidates.columns[active]], candidates.values[active]
    matched = targets == rows
    similarity = np.empty(num_labels)
    similarity[rows[matched]] = values[matched]
    sources, targets, lengths = rows[~matched], targets[~matched], (values - similarity[rows])[~matched]
    if num_prototypes > num_labels:
        everyone = np.arange(num_labels)
        sources = np.append(sources, np.full(num_labels, num_labels))
        targets, lengths = np.append(targets, everyone), np.append(lengths, np.zeros(num_labels))
    potentials = np.append(on_grid(start[assignment]), 0.0)
    raised = _raise(potentials, sources, targets, lengths)
    lowered = -_raise(-potentials, targets, sources, lengths)
    middle = 0.5 * (raised - raised[-1] + lowered - lowered[-1])[:-1]
    prices = np.zeros(num_prototypes)
    prices[assignment] = middle
    return similarity - middle, prices


def _raise(potentials: FloatArray, sources: IntArray, targets: IntArray, lengths: FloatArray) -> FloatArray:
    """Smallest potentials above the given ones with p[target] >= p[source] + length; no cycle has positive length."""
    potentials = potentials.copy()
    order = np.argsort(sources, kind="stable")
    sources, targets, lengths = sources[order], targets[order], lengths[order]
    starts = np.searchsorted(sources, np.arange(len(potentials) + 1))
    edges = np.arange(len(sources))
    # No path has more edges than there are potentials.
    for _ in range(len(potentials)):
        if len(edges) == 0:
            break
        needed = potentials[sources[edges]] + lengths[edges]
        low = needed > potentials[targets[edges]]
        reached = targets[edges[low]]
        np.maximum.at(potentials, reached, needed[low])
        # Only what has just been raised can raise others.
        reached = np.unique(reached)
        counts = starts[reached + 1] - starts[reached]
        edges = np.arange(counts.sum()) + np.repeat(starts[reached] - np.cumsum(counts) + counts, counts)
    return potentials
