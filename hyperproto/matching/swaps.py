"""Matching by angles between classes: pairwise swaps, which need no rotation to start from."""

from __future__ import annotations

import torch
from torch import Tensor

#: A swap that gains less than this share of the agreement is float64 rounding.
SMALLEST_GAIN = 1e-9


def swap_to_agree(vectors: Tensor, prototypes: Tensor, assignment: Tensor) -> Tensor:
    r"""Swap the prototypes of two vectors as long as that makes prototypes lie to each other as the vectors do.

    $$ \max_\sigma \sum_{c, d} \langle v_c, v_d \rangle \langle w_{\sigma(c)}, w_{\sigma(d)} \rangle $$

    A quadratic assignment problem, which no rotation of either side changes. The best swap is taken each time: a
    local optimum, from a random start too far better than where alternating rotation and matching ends. One swap
    costs O(C^2), and there are about C of them.

    Args:
        vectors: (C, E) float64 on the CPU.
        prototypes: (P, D) float64 on the CPU.
        assignment: (C,) int64, the start; prototypes outside it stay unused.

    Returns:
        (C,) int64, a permutation of the start.

    Examples:
        >>> line = torch.tensor([[6.0], [0.0], [-1.0], [-2.0]]).double()
        >>> swap_to_agree(line[[1, 3, 0, 2]], line, torch.arange(4)).tolist()
        [1, 3, 0, 2]

    References:
        Koopmans, Beckmann, Assignment problems and the location of economic activities, 1957.
    """
    assignment = assignment.clone()
    ours = vectors @ vectors.T  # (C, C)
    theirs = prototypes[assignment] @ prototypes[assignment].T
    mixed = ours @ theirs
    # Kept beside its transpose: adding a matrix to its own transpose takes longer than all the rest of a swap.
    mirrored = mixed.T.contiguous()
    our_distances, their_distances = _squared_distances(ours), _squared_distances(theirs)
    gains = torch.empty_like(mixed)
    # Not a share of the agreement itself, which is rounding where vectors and prototypes have nothing in common.
    smallest = SMALLEST_GAIN * float(ours.norm() * theirs.norm())
    while True:
        # What half the sum gains when c and d swap; with E = swap - identity, tr(F E H) + tr(F E H E) / 2.
        first = mixed.diagonal().clone()
        torch.add(mixed, mirrored, out=gains).sub_(first).sub_(first[:, None])
        gains.addcmul_(our_distances, their_distances, value=0.5)
        i = int(gains.amax(dim=1).argmax())
        j = int(gains[i].argmax())
        if 2.0 * float(gains[i, j]) <= smallest:
            return assignment
        our_change, their_change = ours[j] - ours[i], theirs[i] - theirs[j]
        mixed.addr_(our_change, their_change)
        mirrored.addr_(their_change, our_change)
        pair, crossed = [i, j], [j, i]
        for matrix in (mixed, theirs, their_distances):
            matrix[:, pair] = matrix[:, crossed]
        for matrix in (mirrored, theirs, their_distances, assignment):
            matrix[pair] = matrix[crossed]


def _squared_distances(gram: Tensor) -> Tensor:
    lengths = gram.diagonal()
    return lengths[:, None] + lengths - 2.0 * gram
