r"""Geometry of the unit hypersphere: unit rows, energies, largest cosines and how small they can be.

Normalising and comparing directions happen in float32, whatever the dtype that comes in. There is one policy for
vectors too small to have a direction, and it is here: a row whose largest entry is below `SMALLEST_LENGTH` counts as
zero. It comes out as zeros, or as small as it was, never NaN, and its gradient is finite. Every other row that float32
holds is divided by its largest entry before its length is taken, so that rows of 1e-30 and of 1e+30 come out as exact
as rows of 1. A row with NaN or infinity becomes NaN: that is an error upstream, and hiding it here would move it to
where nobody looks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperproto.errors import ArgumentError, ShapeError
from hyperproto.precision import full_precision

#: Smallest normal float32. Below it 1 / length, which is the size of the gradient, leaves float32's range.
SMALLEST_LENGTH = torch.finfo(torch.float32).tiny

#: Rounding of 2 - 2 cos in float32: pairs of points closer than its root cannot be told from coincident ones.
SMALLEST_SQUARED_DISTANCE = torch.finfo(torch.float32).eps

#: Singular values below this share of the largest are rounding of float32.
SMALLEST_SPANNING = 1e-5

#: A sample of rows spans the space well enough if what each anchor adds to those before it is at least this long.
SMALLEST_PIVOT = 0.05

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
    return torch.where(lengths < smallest, torch.ones_like(lengths), lengths)


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
    if weight.dim() != 2:
        raise ShapeError(f"expected a weight of shape (P, D), got {tuple(weight.shape)}.")
    if not (math.isfinite(power) and power >= 0):
        raise ArgumentError(f"expected a finite power >= 0, got {power}.")
    points = normalise(weight)
    if half_space:
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

    Summed in float64 and in blocks: time grows with P^2 D, memory does not.

    Args:
        prototypes: (P, D) unit rows, P >= 2.

    Returns:
        (P,) float32.

    Examples:
        >>> largest_cosines(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]))
        tensor([0.6000, 0.6000, 0.0000])
    """
    largest = torch.full((len(prototypes),), -torch.inf, dtype=_summing_dtype(prototypes), device=prototypes.device)
    blocks, results = torch.split(prototypes, BLOCK_ROWS), torch.split(largest, BLOCK_ROWS)
    for i, rows in enumerate(blocks):
        for j in range(i, len(blocks)):
            cosines = rows.to(largest.dtype) @ blocks[j].to(largest.dtype).T
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
        (min(num_rows, P),) float32.

    Examples:
        >>> sampled_largest_cosines(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), 1)
        tensor([0.6000])
    """
    num_rows = min(num_rows, len(prototypes))
    chosen = torch.arange(num_rows, device=prototypes.device) * len(prototypes) // num_rows
    rows = prototypes[chosen].to(_summing_dtype(prototypes))
    largest = rows.new_full((num_rows,), -torch.inf)
    for start in range(0, len(prototypes), BLOCK_ROWS):
        cosines = rows @ prototypes[start : start + BLOCK_ROWS].to(rows.dtype).T  # (rows, block)
        places = chosen - start
        own = torch.nonzero((places >= 0) & (places < cosines.shape[1])).flatten()
        cosines[own, places[own]] = -torch.inf
        largest = torch.maximum(largest, cosines.amax(dim=1))
    return largest.float()


def spanning_rows(rows: Tensor) -> Tensor:
    r"""Indices of min(N, D) rows that span what all rows span, as far from dependent as a greedy choice gets.

    Each row chosen is the one with the longest part orthogonal to those before it: QR with column pivoting of the
    transpose. Of many rows a random sample of 2 D is looked at first, and all of them only if that does not do.

    Args:
        rows: (N, D) unit rows on the CPU.

    Returns:
        (min(N, D),) int64.

    Examples:
        >>> spanning_rows(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])).tolist()
        [0, 2]

    References:
        Businger, Golub, Linear least squares solutions by Householder transformations, 1965.
    """
    from scipy.linalg import qr

    num_rows, dim = rows.shape
    generator = torch.Generator(device="cpu").manual_seed(0)
    sample = torch.randperm(num_rows, generator=generator, device="cpu")[: 2 * dim].sort().values
    count = min(num_rows, dim)
    while True:
        triangle, order = qr(rows[sample].double().T.numpy(), mode="r", pivoting=True, overwrite_a=True)
        if len(sample) == num_rows or abs(triangle[count - 1, count - 1]) >= SMALLEST_PIVOT:
            return sample[torch.from_numpy(order[:count]).long()]
        sample = torch.arange(num_rows, device="cpu")


def _summing_dtype(tensor: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def cosine_lower_bound(num_points: int, dim: int) -> tuple[float, str]:
    """No arrangement of this many points has a smaller largest cosine; and the bound's name.

    Args:
        num_points: P >= 2.
        dim: D >= 2.

    Returns:
        The bound, and "rankin" (P <= 2D, attained) or "levenshtein" (P > 2D, attained by a few arrangements).

    Raises:
        ArgumentError: P < 2 or D < 2.

    Examples:
        >>> bound, name = cosine_lower_bound(12, 3)
        >>> round(bound * 5**0.5, 9), name  # the icosahedron's cosine is 1 / sqrt(5)
        (1.0, 'levenshtein')
    """
    if num_points <= 2 * dim:
        return rankin_bound(num_points, dim), "rankin"
    return levenshtein_bound(num_points, dim), "levenshtein"


def rankin_bound(num_points: int, dim: int) -> float:
    r"""Smallest possible largest cosine of up to 2D points: the simplex, then orthogonal blocks.

    $$ -1 / (P - 1) \text{ for } P \leq D + 1, \qquad 0 \text{ for } D + 1 < P \leq 2D $$

    Args:
        num_points: P in [2, 2D].
        dim: D >= 2.

    Raises:
        ArgumentError: outside these ranges.

    Examples:
        >>> rankin_bound(5, 4), rankin_bound(8, 4)
        (-0.25, 0.0)

    References:
        Rankin, The closest packing of spherical caps in n dimensions, 1955.
    """
    if dim < 2 or not 2 <= num_points <= 2 * dim:
        raise ArgumentError(
            f"Rankin's bound needs dim >= 2 and 2 to 2 * dim points, got {num_points} in {dim}. "
            "For more points use levenshtein_bound."
        )
    return -1.0 / (num_points - 1) if num_points <= dim + 1 else 0.0


def levenshtein_bound(num_points: int, dim: int) -> float:
    r"""Lower bound on the largest cosine of more than 2D points: Levenshtein's bound, solved for the cosine.

    P points whose largest cosine is t are at most L_m(D, t), for t in the m-th of a chain of intervals on which L
    grows without a jump. With Q_k the Gegenbauer polynomials of dimension D, Q_k(1) = 1:

    $$
    \begin{aligned}
    L_{2k-1}(t) &= \binom{k+D-3}{k-1} \left[ \frac{2k+D-3}{D-1}
        - \frac{Q_{k-1}(t) - Q_k(t)}{(1-t)\, Q_k(t)} \right], \\
    L_{2k}(t) &= \binom{k+D-2}{k} \left[ \frac{2k+D-1}{D-1}
        - \frac{(1+t) (Q_k(t) - Q_{k+1}(t))}{(1-t) (Q_k(t) + Q_{k+1}(t))} \right].
    \end{aligned}
    $$

    L_{2k-1} holds from t_{k-1}^{1,1} to t_k^{1,0} and L_{2k} from there to t_k^{1,1}, where t_k^{a,b} is the largest
    zero of the Jacobi polynomial of degree k and parameters a + (D-3)/2, b + (D-3)/2. At the left end of the m-th
    interval L is the smallest size of a spherical m-design, an integer, and that integer tells which m to solve.

    Args:
        num_points: P > 2D.
        dim: D >= 2.

    Raises:
        ArgumentError: outside these ranges.

    Examples:
        >>> round(levenshtein_bound(240, 8), 9), round(levenshtein_bound(100, 10), 3)  # E8's kissing points; generic
        (0.5, 0.278)

    References:
        Levenshtein, Universal bounds for codes and designs, Handbook of Coding Theory, 1998, theorem 4.8 and 5.42;
        Delsarte, Goethals, Seidel, Spherical codes and designs, 1977 (sizes of designs).
    """
    if dim < 2 or num_points <= 2 * dim:
        raise ArgumentError(
            f"Levenshtein's bound needs dim >= 2 and more than 2 * dim points, got {num_points} in {dim}. "
            "For fewer points use rankin_bound."
        )
    if dim == 2:
        return math.cos(2.0 * math.pi / num_points)  # what the formula gives; regular polygons attain it
    order = 3
    while _smallest_design(order + 1, dim) <= num_points:
        order += 1
    lower, upper = _interval_start(order, dim), _interval_start(order + 1, dim)
    # Plain bisection: unlike faster methods it minds no rounding where the root is an end of the interval.
    while lower < (middle := 0.5 * (lower + upper)) < upper:
        if _levenshtein_size(order, dim, middle) < num_points:
            lower = middle
        else:
            upper = middle
    return lower


def _smallest_design(order: int, dim: int) -> int:
    """Lower bound on the size of a spherical design of this strength: L at the left end of interval `order`."""
    k = order // 2
    if order % 2 == 0:
        return math.comb(dim + k - 1, k) + math.comb(dim + k - 2, k - 1)
    return 2 * math.comb(dim + k - 1, k)


def _interval_start(order: int, dim: int) -> float:
    """Left end of the interval on which L_order holds: t_{k-1}^{1,1} for order 2k - 1, t_k^{1,0} for order 2k."""
    if order % 2 == 1:
        return _largest_jacobi_zero((order - 1) // 2, 1.0 + 0.5 * (dim - 3), 1.0 + 0.5 * (dim - 3))
    return _largest_jacobi_zero(order // 2, 1.0 + 0.5 * (dim - 3), 0.5 * (dim - 3))


def _largest_jacobi_zero(degree: int, a: float, b: float) -> float:
    """Largest zero of the Jacobi polynomial P_degree^(a, b), a + b > 0: an eigenvalue of its recurrence's matrix.

    References:
        Golub, Welsch, Calculation of Gauss quadrature rules, 1969.
    """
    import numpy as np
    from scipy.linalg import eigh_tridiagonal

    k = np.arange(degree, dtype=np.float64)
    diagonal = (b * b - a * a) / ((2 * k + a + b) * (2 * k + a + b + 2))
    k = k[1:]
    total = 2 * k + a + b
    off_diagonal = np.sqrt(4 * k * (k + a) * (k + b) * (k + a + b) / (total**2 * (total + 1) * (total - 1)))
    if degree == 1:
        return float(diagonal[0])
    largest = eigh_tridiagonal(diagonal, off_diagonal, True, select="i", select_range=(degree - 1, degree - 1))
    return float(largest[0])


def _levenshtein_size(order: int, dim: int, cosine: float) -> float:
    """L_order(dim, cosine), for a cosine within its interval."""
    k = (order + 1) // 2
    if order % 2 == 1:
        previous, current = _gegenbauer_pair(k, dim, cosine)
        bracket = (2 * k + dim - 3) / (dim - 1) - (previous - current) / ((1 - cosine) * current)
        return math.comb(k + dim - 3, k - 1) * bracket
    current, following = _gegenbauer_pair(k + 1, dim, cosine)
    ratio = (current - following) / (current + following)
    bracket = (2 * k + dim - 1) / (dim - 1) - (1 + cosine) / (1 - cosine) * ratio
    return math.comb(k + dim - 2, k) * bracket


def _gegenbauer_pair(degree: int, dim: int, cosine: float) -> tuple[float, float]:
    """Q_{degree-1} and Q_degree at a cosine, scaled to Q(1) = 1, by their three-term recurrence; degree >= 1."""
    previous, current = 1.0, cosine
    for k in range(1, degree):
        following = ((2 * k + dim - 2) * cosine * current - k * previous) / (k + dim - 2)
        previous, current = current, following
    return previous, current
