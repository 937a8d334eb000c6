r"""Minimising a function of unit rows: L-BFGS in float64, and annealing of smooth maxima.

Rows stay on the sphere by parametrisation: the variable is any matrix X, the function sees $x / \lVert x \rVert$
of its rows. The gradient by x is then the part tangent to the sphere, divided by the length of x.

The optimiser is ours rather than scipy's for two reasons. Sums are taken in an order that does not depend on the
number of threads, which launchers such as torchrun change, so that the bank does not either. And scipy brings a
second pool of threads, which fights with torch's for the cores: many times slower on a small machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: (P, D) float64 unit rows -> value, and gradient (P, D) which need not be tangent.
Objective = Callable[[Tensor], tuple[float, Tensor]]
#: The same at a sharpness beta > 0.
SmoothMaximum = Callable[[Tensor, float], tuple[float, Tensor]]
#: One step: the change of the variable, the change of the gradient, and the reciprocal of their product.
Correction = tuple[Tensor, Tensor, float]

#: Steps that L-BFGS remembers.
HISTORY = 10
#: A first step, when no curvature is known, moves no row by more than this.
FIRST_STEP = 0.1
#: Share of the decrease promised by the slope that a step must keep (Armijo's condition).
SUFFICIENT_DECREASE = 1e-4
SMALLEST_STEP = 1e-12

#: Terms that `weighted_sums` leaves to one matrix product. Over many more, the library beneath gives each thread a
#: share of the terms, and rounding then shows how many threads there were.
SUM_BLOCK = 256

#: Sharpness of a smooth maximum: from a rounded landscape to one where only the nearest pairs count.
BETAS = tuple(4.0**exponent for exponent in range(9))
#: From this sharpness on, annealing ends with the first stage that gains less than `SMALLEST_GAIN` of 1 - cosine,
#: which is half the squared distance of the nearest pair: a share, as very many points leave no more to gain.
SHARP_BETA = 1024.0
SMALLEST_GAIN = 1e-4
#: A stage only has to prepare the next: a hundred times the accuracy doubles the time and gains 0.001 in cosine.
STAGE_ITERATIONS, STAGE_TOLERANCE = 200, 1e-6
#: Without stages, to convergence.
ITERATIONS, TOLERANCE = 1000, 1e-9


def anneal(objective: SmoothMaximum, start: Tensor, *, score: Callable[[Tensor], float]) -> Tensor:
    """Rows that minimise a maximum: its smooth forms are minimised in turn, each from the minimum of the last.

    Args:
        objective: the smooth maximum.
        start: (P, D) unit rows.
        score: the maximum itself.

    Returns:
        (P, D) float64 unit rows: those of the smallest score among the start and the stages.
    """
    points = best = start.double()
    smallest = score(best)
    with progress_bar(len(BETAS) * STAGE_ITERATIONS) as advance:
        for beta in BETAS:
            points = minimise(
                _at_sharpness(objective, beta),
                points,
                iterations=STAGE_ITERATIONS,
                tolerance=STAGE_TOLERANCE,
                advance=advance,
            )
            gain = smallest - score(points)
            if gain > 0:
                best, smallest = points, smallest - gain
            if beta >= SHARP_BETA and gain < SMALLEST_GAIN * (1.0 - smallest):
                break
    return best


def converge(objective: Objective, start: Tensor) -> Tensor:
    """Rows that minimise an objective, to convergence.

    Args:
        objective: what to minimise.
        start: (P, D) unit rows.

    Returns:
        (P, D) float64 unit rows.
    """
    with progress_bar(ITERATIONS) as advance:
        return minimise(objective, start.double(), iterations=ITERATIONS, tolerance=TOLERANCE, advance=advance)


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    advance: Callable[[int], object],
) -> Tensor:
    """Rows at a local minimum, by L-BFGS with a backtracking line search.

    Args:
        objective: what to minimise.
        start: (P, D) float64 rows, not zero.
        iterations: at most this many steps.
        tolerance: stop when a step decreases the value by less than this share of max(1, |value|).
        advance: told how many iterations are done; the numbers add up to `iterations`.

    Returns:
        (P, D) float64 unit rows.

    References:
        Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5.
    """
    variable = start
    value, gradient = _value_on_sphere(objective, variable)
    corrections: deque[Correction] = deque(maxlen=HISTORY)
    left = iterations
    while left > 0:
        direction = _descent_direction(gradient, corrections)
        step, new_value, new_gradient = _search_line(objective, variable, direction, value, gradient)
        change, gradient_change = step * direction, new_gradient - gradient
        decrease = value - new_value
        variable, value, gradient = variable + change, new_value, new_gradient
        curvature = _product(change, gradient_change)
        # Only positive curvature keeps the quadratic model convex.
        if curvature > 1e-10 * _product(gradient_change, gradient_change):
            corrections.append((change, gradient_change, 1.0 / curvature))
        left -= 1
        advance(1)
        if decrease <= tolerance * max(1.0, abs(value)):
            break
    advance(left)
    return variable / variable.norm(dim=1, keepdim=True)


def weighted_sums(weights: Tensor, points: Tensor) -> Tensor:
    """`weights @ points`, with the same bits on any number of threads.

    Args:
        weights: (N, P).
        points: (P, D).

    Returns:
        (N, D).

    Examples:
        >>> weighted_sums(torch.tensor([[0.5, 0.25]]), torch.eye(2))
        tensor([[0.5000, 0.2500]])
    """
    sums = points.new_zeros(len(weights), points.shape[1])
    blocks = zip(torch.split(weights, SUM_BLOCK, dim=1), torch.split(points, SUM_BLOCK), strict=True)
    for weights_block, points_block in blocks:
        sums.addmm_(weights_block, points_block)
    return sums


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar on a terminal after two seconds, if tqdm is installed; yields the function that advances it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda iterations: None
        return
    with tqdm(desc="Placing prototypes", total=total, delay=2, disable=None, leave=False) as bar:
        yield bar.update


def _at_sharpness(objective: SmoothMaximum, beta: float) -> Objective:
    return lambda points: objective(points, beta)


def _value_on_sphere(objective: Objective, variable: Tensor) -> tuple[float, Tensor]:
    """The objective at the normalised rows, and its gradient by the rows as they are."""
    lengths = variable.norm(dim=1, keepdim=True)  # (P, 1)
    points = variable / lengths
    value, gradient = objective(points)
    radial = (gradient * points).sum(dim=1, keepdim=True)  # (P, 1)
    return value, (gradient - radial * points) / lengths


def _descent_direction(gradient: Tensor, corrections: deque[Correction]) -> Tensor:
    """Minus the inverse Hessian, as far as the corrections tell it, times the gradient (two-loop recursion)."""
    if not corrections:
        steepest = gradient.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
        return gradient * (-FIRST_STEP / steepest)
    direction = -gradient
    shares = []
    for change, gradient_change, reciprocal in reversed(corrections):
        share = reciprocal * _product(change, direction)
        direction.sub_(gradient_change, alpha=share)
        shares.append(share)
    _, gradient_change, reciprocal = corrections[-1]
    direction.div_(reciprocal * _product(gradient_change, gradient_change))
    for (change, gradient_change, reciprocal), share in zip(corrections, reversed(shares), strict=True):
        direction.add_(change, alpha=share - reciprocal * _product(gradient_change, direction))
    return direction


def _search_line(
    objective: Objective, variable: Tensor, direction: Tensor, value: float, gradient: Tensor
) -> tuple[float, float, Tensor]:
    """First of the steps 1, 1/2, 1/4, ... to decrease the value enough (0 if none does); value and gradient there."""
    slope = _product(gradient, direction)
    step = 1.0
    while step > SMALLEST_STEP:
        new_value, new_gradient = _value_on_sphere(objective, variable + step * direction)
        if new_value <= value + SUFFICIENT_DECREASE * step * slope:
            return step, new_value, new_gradient
        step *= 0.5
    return 0.0, value, gradient


def _product(first: Tensor, second: Tensor) -> float:
    """Inner product of two matrices; summed over rows first, which does not depend on the number of threads."""
    return float((first * second).sum(dim=1).sum())
