r"""The unit hypersphere: unit rows, cosines between them, their energy and largest cosines.

Normalising and comparing directions happen in float32, whatever the dtype that comes in. There is one policy for
vectors too small to have a direction, and it is here: a row whose largest entry is below `SMALLEST_LENGTH` counts as
zero. It comes out as zeros, or as small as it was, never NaN, and its gradient is finite. Every other row that float32
holds is divided by its largest entry before its length is taken, so that rows of 1e-30 and of 1e+30 come out as exact
as rows of 1. A row with NaN or infinity becomes NaN: that is an error upstream, and hiding it here would move it to
where nobody looks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.arguments import flag, matrix, not_negative
from hyperproto.errors import ArgumentError
from hyperproto.precision import full_precision

#: Smallest normal float32. Below it 1 / length, which is the size of the gradient, leaves float32's range.
SMALLEST_LENGTH = torch.finfo(torch.float32).tiny

#: Rounding of 2 - 2 cos in float32: pairs of points closer than its root cannot be told from coincident ones.
SMALLEST_SQUARED_DISTANCE = torch.finfo(torch.float32).eps

#: By how much the length of a unit row may be off: bfloat16 keeps eight bits of each entry.
UNIT_TOLERANCE = 1e-2

#: A block of cosines is 2048 x 2048 float64, 32 MiB, however many prototypes there are.
BLOCK_ROWS = 2048


def normalise(x: Tensor) -> Tensor:
    r"""Unit rows in float32 over the last dimension; zero rows stay zero.

    $$ x / \lVert x \rVert $$

    Args:
        x: (..., D), any real dtype, D >= 1.

    Returns:
        (..., D) float32.

    Examples:
        >>> normalise(torch.tensor([[3e-20, 4e-20], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = x.float()
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scaled = x / _one_for_zero(largest)
    # The largest entry is 1 now, or the row is zero: a floor between 0 and 1 changes nothing else.
    return scaled / scaled.square().sum(dim=-1, keepdim=True).clamp_min(0.25).sqrt()


# The constant comes in as a default: TorchScript reads no globals.
def _one_for_zero(lengths: Tensor, smallest: float = SMALLEST_LENGTH) -> Tensor:
    """Lengths, and 1 in the place of those that count as zero."""
    return torch.where(lengths < smallest, 1.0, lengths)


def check_unit_rows(rows: Tensor) -> None:
    """Raise unless each row is of length 1 or 0, as far as half precision can tell; waits for a GPU.

    Raises:
        ArgumentError: one is not.
    """
    if rows.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return
    lengths = torch.linalg.vector_norm(rows.detach().float(), dim=-1)
    wrong = ((lengths - 1.0).abs() > UNIT_TOLERANCE) & (lengths != 0.0) | ~lengths.isfinite()
    if bool(wrong.any()):
        raise ArgumentError(
            f"expected embeddings of length 1, got a row of length {float(lengths[wrong][0]):.4g}. Features become "
            "embeddings by head.embed(features)."
        )


def assigned_cosines(embeddings: Tensor, prototypes: Tensor, assignment: Tensor) -> Tensor:
    """<z, w_assignment[k]> in float32: (..., D), (P, D), (C,) -> (..., C)."""
    if torch.jit.is_scripting():
        return F.linear(embeddings.float(), prototypes[assignment])
    else:
        with full_precision(embeddings.device):
            return F.linear(embeddings.float(), prototypes[assignment])


def hyperspherical_energy(weight: Tensor, *, power: float, half_space: bool = False) -> Tensor:
    r"""Riesz energy of the rows' directions, differentiable; the smaller, the more evenly they are spread.

    $$
    E_s = \sum_{i \neq j} \lVert w_i - w_j \rVert^{-s}, \quad s > 0, \qquad
    E_0 = \sum_{i \neq j} -\log \lVert w_i - w_j \rVert
    $$

    over ordered pairs, so that every pair counts twice. Rows are normalised first. Coincident rows count as
    `SMALLEST_SQUARED_DISTANCE` apart: a large energy, not an infinite one.

    Args:
        weight: (P, D) floating point; memory grows with the square of P.
        power: s >= 0, the exponent; the paper uses 0, 1 and 2.
        half_space: take the energy of the 2P points {w, -w}, so that opposite directions repel as equal ones do.

    Returns:
        () float32.

    Raises:
        ArgumentError: power is negative or not finite.
        ShapeError: weight is not a matrix.

    Examples:
        >>> round(float(hyperspherical_energy(torch.eye(3), power=2)), 4)  # 6 ordered pairs at distance sqrt(2)
        3.0

    References:
        Liu et al., NeurIPS 2018, eq. 1 (energy) and section 3.3 (half-space form).
    """
    weight, power = matrix(weight, "a weight of shape (P, D)", smallest=(0, 1)), not_negative(power, "power")
    points = normalise(weight)
    if flag(half_space, "half_space"):
        points = torch.cat([points, -points])
    with full_precision(points.device):
        squared_distances = 2.0 - 2.0 * (points @ points.T)  # (P, P), (2P, 2P) in half space
        itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
        # Masked before and after: the power's gradient must not see a distance of zero, and no pair is (i, i).
        squared_distances = squared_distances.clamp_min(SMALLEST_SQUARED_DISTANCE).masked_fill(itself, 1.0)
        potential = -0.5 * squared_distances.log() if power == 0 else squared_distances.pow(-0.5 * power)
        return potential.masked_fill(itself, 0.0).sum()


@torch.no_grad()
def largest_cosines(prototypes: Tensor) -> Tensor:
    r"""Each row's largest cosine to another row.

    $$ \max_{j \neq i} \langle w_i, w_j \rangle $$

    Summed in float64 on the CPU, since not every device has float64, and in blocks: time grows with P^2 D, memory does
    not.

    Args:
        prototypes: (P, D) unit rows, P >= 2.

    Returns:
        (P,) float32 on the CPU.

    Examples:
        >>> largest_cosines(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]))
        tensor([0.6000, 0.6000, 0.0000])
    """
    prototypes = prototypes.cpu()
    largest = torch.full((len(prototypes),), -torch.inf, dtype=torch.float64, device="cpu")
    blocks, results = torch.split(prototypes, BLOCK_ROWS), torch.split(largest, BLOCK_ROWS)
    for i, rows in enumerate(blocks):
        for j in range(i, len(blocks)):
            cosines = rows.double() @ blocks[j].double().T
            if i == j:
                cosines.fill_diagonal_(-torch.inf)
            results[i].copy_(torch.maximum(results[i], cosines.amax(dim=1)))
            results[j].copy_(torch.maximum(results[j], cosines.amax(dim=0)))
    return largest.float()


@torch.no_grad()
def sampled_largest_cosines(prototypes: Tensor, num_rows: int) -> Tensor:
    """The largest cosine to another row, of rows at even distances; time grows with num_rows P D.

    Args:
        prototypes: (P, D) unit rows, P >= 2.
        num_rows: how many rows; all of them if there are fewer.

    Returns:
        (min(num_rows, P),) float32 on the CPU.

    Examples:
        >>> sampled_largest_cosines(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), 1)
        tensor([0.6000])
    """
    prototypes = prototypes.cpu()
    num_rows = min(num_rows, len(prototypes))
    chosen = torch.arange(num_rows, device="cpu") * len(prototypes) // num_rows
    rows = prototypes[chosen].double()
    largest = rows.new_full((num_rows,), -torch.inf)
    for start in range(0, len(prototypes), BLOCK_ROWS):
        cosines = rows @ prototypes[start : start + BLOCK_ROWS].double().T  # (rows, block)
        places = chosen - start
        own = torch.nonzero((places >= 0) & (places < cosines.shape[1])).flatten()
        cosines[own, places[own]] = -torch.inf
        largest = torch.maximum(largest, cosines.amax(dim=1))
    return largest.float()
