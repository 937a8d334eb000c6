"""What makes an assignment valid, and what makes it the best one."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.arguments import not_negative, whole_number
from hyperproto.testing.requirements import heads_of, require, require_values

#: Largest problem that `check_optimal` solves by trying every assignment.
BRUTE_FORCE_PROTOTYPES = 7


def check_assignment(source: nn.Module | Tensor, *, num_prototypes: int | None = None) -> None:
    """Raise AssertionError unless the assignment is an injective map from labels to prototypes.

    Args:
        source: a head, a model whose heads are checked all, or an assignment (C,).
        num_prototypes: P, for a tensor; without it any number of prototypes will do. A head knows its own.

    Raises:
        HeadNotFoundError: a model without a head.

    Examples:
        >>> check_assignment(torch.tensor([2, 0, 1]), num_prototypes=4)
        >>> check_assignment(torch.tensor([2, 0, 2]))
        Traceback (most recent call last):
        AssertionError: each prototype can stand for one label only; used more than once: [2]
    """
    if isinstance(source, nn.Module):
        for head in heads_of(source).values():
            buffer = dict(head.named_buffers())["assignment"]  # as it is: to read the attribute is to look at it
            _check_injective(buffer, head.num_classes, head.bank.num_prototypes)
    else:
        if num_prototypes is not None:
            num_prototypes = whole_number(num_prototypes, "num_prototypes", smallest=1)
        _check_injective(source, None, num_prototypes)


def check_optimal(assignment: Tensor, class_means: Tensor, prototypes: Tensor, *, tolerance: float = 1e-5) -> None:
    """Raise AssertionError unless it is an assignment, and none has a larger total cosine.

    Up to 7 prototypes every assignment is tried; beyond, scipy's dense solver is the reference.

    Args:
        assignment: (C,) int64 to be checked, as a solver returned it.
        class_means: (C, D); a zero row is a label never seen, for which all prototypes are as good.
        prototypes: (P, D), P >= C.
        tolerance: largest shortfall that counts as rounding.

    Examples:
        >>> check_optimal(torch.tensor([1, 0]), torch.tensor([[0.0, 1.0], [1.0, 0.1]]), torch.eye(2))
        >>> check_optimal(torch.tensor([0, 1]), torch.tensor([[0.0, 1.0], [1.0, 0.1]]), torch.eye(2))
        Traceback (most recent call last):
        AssertionError: not optimal: total cosine 0.099504 where 1.995037 is possible
    """
    tolerance = not_negative(tolerance, "tolerance")
    _check_problem(class_means, prototypes)
    _check_injective(assignment, len(class_means), len(prototypes))
    similarity = _unit(class_means) @ _unit(prototypes).T  # (C, P)
    reached = float(similarity.gather(1, assignment.cpu()[:, None]).sum())
    best = _largest_total(similarity)
    require(reached >= best - tolerance, f"not optimal: total cosine {reached:.6f} where {best:.6f} is possible")


def _check_injective(assignment: Tensor, num_classes: int | None, num_prototypes: int | None) -> None:
    require(
        isinstance(assignment, Tensor),
        f"expected a head, a model or an assignment as a tensor of shape (C,), got {type(assignment).__name__}",
    )
    wanted = f"expected an assignment of shape ({'C' if num_classes is None else num_classes},) and dtype torch.int64"
    fits = assignment.dim() == 1 and num_classes in (None, len(assignment)) and assignment.dtype == torch.int64
    require(fits, f"{wanted}, got {tuple(assignment.shape)} and {assignment.dtype}")
    require_values(assignment, "the assignment")
    values = assignment.tolist()
    if not values:
        return
    span = f"got values from {min(values)} to {max(values)}"
    require(min(values) >= 0, f"prototypes are counted from 0, {span}")
    if num_prototypes is not None:
        in_range = max(values) < num_prototypes
        require(in_range, f"there are {num_prototypes} prototypes, the last one {num_prototypes - 1}; {span}")
    shared = sorted(value for value, uses in Counter(values).items() if uses > 1)[:5]
    require(not shared, f"each prototype can stand for one label only; used more than once: {shared}")


def _check_problem(class_means: Tensor, prototypes: Tensor) -> None:
    for name, rows in (("class means", class_means), ("prototypes", prototypes)):
        require(isinstance(rows, Tensor), f"expected {name} as a tensor, got {type(rows).__name__}")
        require(rows.dim() == 2, f"expected {name} as a matrix, got shape {tuple(rows.shape)}")
        require(rows.is_floating_point(), f"expected {name} in a floating dtype, got {rows.dtype}")
        require_values(rows, name)
        require(bool(torch.isfinite(rows).all()), f"{name} must be finite")
    require(
        class_means.shape[1] == prototypes.shape[1] and 1 <= len(class_means) <= len(prototypes),
        "expected class means (C, D) and prototypes (P, D) with 1 <= C <= P, got "
        f"{tuple(class_means.shape)} and {tuple(prototypes.shape)}",
    )


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().cpu().double(), dim=1, eps=torch.finfo(torch.float32).tiny)


def _largest_total(similarity: Tensor) -> float:
    num_classes, num_prototypes = similarity.shape
    if num_prototypes <= BRUTE_FORCE_PROTOTYPES:
        table = similarity.tolist()
        return max(
            math.fsum(table[row][column] for row, column in enumerate(columns))
            for columns in itertools.permutations(range(num_prototypes), num_classes)
        )
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return float(similarity[rows, columns].sum())
