"""Strategies and checks with which users test their own banks, solvers, losses and training code.

A check raises AssertionError that says what is wrong, and leaves what it is given as it was: tensors, models, losses,
the global random state. Strategies draw small objects, quick enough for a hundred examples; they alone need hypothesis
(`pip install "hyperproto[test]"`).

Examples:
    >>> from hypothesis import given
    >>> from hyperproto.testing import check_assignment, heads
    >>> @given(head=heads())
    ... def test_assignment_is_injective(head):
    ...     check_assignment(head)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hyperproto.testing.assignment_checks import check_assignment, check_optimal
from hyperproto.testing.bank_checks import check_bank
from hyperproto.testing.loss_checks import check_loss

if TYPE_CHECKING:
    from hyperproto.testing.strategies import SEEDS, banks, embeddings, heads, label_streams

__all__ = [
    "SEEDS",
    "banks",
    "check_assignment",
    "check_bank",
    "check_loss",
    "check_optimal",
    "embeddings",
    "heads",
    "label_streams",
]

_STRATEGIES = frozenset({"SEEDS", "banks", "embeddings", "heads", "label_streams"})


def __getattr__(name: str) -> Any:
    """Strategies, which are imported when the first of them is asked for."""
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from hyperproto.testing import strategies
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            f'the strategy {name} needs hypothesis, which is not installed: pip install "hyperproto[test]". '
            "The checks work without.",
            name="hypothesis",
        ) from error
    return getattr(strategies, name)
