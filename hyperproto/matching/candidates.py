"""Candidate pairs of the assignment problem, found in chunks: the matrix of all cosines never exists."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hyperproto.matching.problem import FloatArray, IntArray, Problem
from hyperproto.precision import full_precision

#: Prototypes listed for each label. More make more pairs to solve over, fewer leave more labels to scan again.
PAIRS_PER_LABEL = 24

#: Labels listed for each prototype, so that one which is nobody's favourite still gets a price.
PAIRS_PER_PROTOTYPE = 8

#: Entries of a chunk of cosines: 32 MiB of float32.
CHUNK_ENTRIES = 2**23

#: Largest number of rows of a chunk: what stays in cache between the passes over it.
CHUNK_ROWS = 512

#: Number of blocks, at least, whose maxima are ranked in place of all the entries of a row.
NUM_BLOCKS = 512


class Candidates:
    """Pairs listed so far, in order of label and prototype, and what is known about all the others.

    Attributes:
        problem: whose pairs they are.
        rows, columns: (N,) the pairs; every label has some.
        values: (N,) similarities, with float32's rounding while the pair is not active.
        active: (N,) whether the pair takes part in the matching; its value is exact then.
        prices: (P,) of the last scan.
        left_out: (C,) no pair that is not listed has a larger similarity less price, at `prices`.
        scale: how far the best pair of a label stands above the last one listed for it: the differences that matter.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        # With the pairs in force, one assignment is possible whatever else is listed.
        self.rows: IntArray = np.arange(len(problem.current))
        self.columns = problem.current
        self.values = problem.similarities(self.rows, self.columns)
        self.active = np.zeros(len(self.rows), dtype=bool)
        self.prices = np.zeros(len(problem.prototypes))
        self.left_out = np.full(len(self.rows), np.inf)
        self.scale = 0.0

    def profits(self, prices: FloatArray) -> FloatArray:
        """(C,) each label's largest similarity less price over its listed pairs."""
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1))
        profits: FloatArray = np.maximum.reduceat(self.values - prices[self.columns], starts)
        return profits

    def reduced_costs(self, profits: FloatArray, prices: FloatArray) -> FloatArray:
        """(N,) similarity less profit and price: where positive, the pair is better than what its label has."""
        return self.values - profits[self.rows] - prices[self.columns]

    def open_labels(self, profits: FloatArray, prices: FloatArray) -> IntArray:
        """Labels that may have a better pair than the listed ones; all other labels are proven to have none.

        Prices have moved since the last scan. A pair left out then has gained as much as its prototype's price has
        fallen, so that nothing has gained more than the largest fall.
        """
        bound = self.left_out + (self.prices - prices).max() + self.problem.rounding
        return np.flatnonzero(bound > profits)

    def activate(self, places: IntArray) -> None:
        """Let more of the pairs take part in the matching."""
        self.values[places] = self.problem.similarities(self.rows[places], self.columns[places])
        self.active[places] = True

    def scan(self, prices: FloatArray, labels: IntArray | None = None) -> IntArray:
        r"""List the pairs of each label with the largest $S_{ij} - v_j$, and of each prototype.

        Args:
            prices: v (P,).
            labels: those to scan, ascending; all of them by default, and only then also, for each prototype, labels
                that come close to preferring it to all others.

        Returns:
            Places of the pairs that were not listed before.
        """
        self.left_out += (self.prices - prices).max()
        self.prices = prices
        chosen = torch.from_numpy(np.arange(len(self.left_out)) if labels is None else labels)
        prototypes, offset = self.problem.prototypes, torch.from_numpy(prices).float()
        num_prototypes = len(prototypes)
        favourites = _Favourites(num_prototypes) if labels is None else None
        chunk_rows = min(CHUNK_ROWS, CHUNK_ENTRIES // num_prototypes, -(-len(chosen) // PAIRS_PER_PROTOTYPE))
        chunk_rows = max(1, chunk_rows)
        # Allocated once: what each chunk leaves behind would keep the next from reusing its memory.
        buffer = torch.empty(chunk_rows, num_prototypes, dtype=torch.float32, device="cpu")
        marks = torch.empty(chunk_rows, num_prototypes, dtype=torch.bool, device="cpu")
        found, spans = [], []
        for chunk in torch.split(chosen, chunk_rows):
            gains = buffer[: len(chunk)]  # (rows of the chunk, P)
            with full_precision(prototypes.device):
                torch.mm(self.problem.scaled_means(chunk), prototypes.T, out=gains)
            gains.sub_(offset)
            threshold, places = _largest(gains, min(PAIRS_PER_LABEL, num_prototypes), marks[: len(chunk)])
            columns = places % num_prototypes
            found.append((chunk[places // num_prototypes], columns, gains.view(-1)[places] + offset[columns]))
            best = gains.amax(dim=1, keepdim=True)
            self.left_out[chunk.numpy()] = threshold.flatten().double().numpy()
            if favourites is not None:
                spans.append(best - threshold)
                favourites.add(gains, best, chunk)
        if favourites is not None:
            self.scale = float(torch.cat(spans).median())
            rows, columns, gains = favourites.pairs()
            found.append((rows, columns, gains + offset[columns]))
        return self._add(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))

    def _add(self, rows: IntArray, columns: IntArray, values: npt.NDArray[np.float32]) -> IntArray:
        num_old = len(self.rows)
        rows, columns = np.concatenate([self.rows, rows]), np.concatenate([self.columns, columns])
        # Of equal pairs the first is kept, which is the one listed before.
        _, places = np.unique(rows * len(self.prices) + columns, return_index=True)
        self.rows, self.columns = rows[places], columns[places]
        self.values = np.concatenate([self.values, values])[places]
        self.active = np.concatenate([self.active, np.zeros(len(values), dtype=bool)])[places]
        return np.flatnonzero(places >= num_old)


def _largest(gains: Tensor, count: int, marks: Tensor) -> tuple[Tensor, Tensor]:
    """A threshold for each row (n, 1), and the flat places of the entries at or above it: at least `count` a row.

    Ranking whole rows would cost more than the cosines did. Among the maxima of disjoint blocks, `count` reach the
    `count`-th largest of them, and few other entries of the row do. `marks` (n, P) bool is overwritten.
    """
    width = max(1, gains.shape[1] // NUM_BLOCKS)
    num_blocks = gains.shape[1] // width
    blocks = gains[:, : width * num_blocks].view(len(gains), width, num_blocks).amax(dim=1)
    threshold = blocks.topk(count, dim=1).values[:, -1:]
    places = torch.from_numpy(np.flatnonzero(torch.ge(gains, threshold, out=marks).numpy()))
    if len(places) <= 4 * count * len(gains):
        return threshold, places
    # Many equal entries, or a crowd in few blocks.
    top, columns = gains.topk(count, dim=1)
    first = torch.arange(len(gains), device=gains.device)[:, None] * gains.shape[1]
    return top[:, -1:], (first + columns).flatten()


class _Favourites:
    """For each prototype the labels that lose least by taking it, one from each of several sets of chunks."""

    def __init__(self, num_prototypes: int) -> None:
        shape = (PAIRS_PER_PROTOTYPE, num_prototypes)
        self.losses = torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu")
        self.gains = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self.labels = torch.zeros(shape, dtype=torch.int64, device="cpu")
        self.num_chunks = 0

    def add(self, gains: Tensor, best: Tensor, labels: Tensor) -> None:
        """Take in a chunk of gains (n, P), whose largest are best (n, 1); `gains` is used up."""
        slot = self.num_chunks % PAIRS_PER_PROTOTYPE
        self.num_chunks += 1
        losses, rows = gains.sub_(best).max(dim=0)
        better = losses > self.losses[slot]
        self.losses[slot] = torch.where(better, losses, self.losses[slot])
        self.gains[slot] = torch.where(better, losses + best[rows, 0], self.gains[slot])
        self.labels[slot] = torch.where(better, labels[rows], self.labels[slot])

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, prototypes, and gains of the pairs."""
        used = min(self.num_chunks, PAIRS_PER_PROTOTYPE)
        columns = torch.arange(self.labels.shape[1], device="cpu").repeat(used)
        return self.labels[:used].flatten(), columns, self.gains[:used].flatten()
