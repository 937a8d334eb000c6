"""How small the largest cosine between points on the sphere can be."""

from __future__ import annotations

import math

from hyperproto.errors import ArgumentError


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
