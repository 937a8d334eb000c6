"""A process group as a module keeps it: copied with the module, and never pickled."""

from __future__ import annotations

from collections.abc import Callable

from hyperproto.errors import ArgumentError
from hyperproto.ranks import ProcessGroup, has_ranks


class GroupHandle:
    """Holds a process group for a module: a copy of the module has the same group, a pickle has none.

    Attributes:
        group: the ranks, or None for all of them.
        was_lost: whether it comes from a pickle of some ranks.
    """

    def __init__(self, group: ProcessGroup | None, *, was_lost: bool = False) -> None:
        self.group = group
        self.was_lost = was_lost

    def check(self) -> None:
        """Raise where it is not known which ranks are meant.

        Raises:
            ArgumentError: the group was lost in a pickle, and there are ranks.
        """
        if self.was_lost and has_ranks():
            raise ArgumentError(
                "this assigner was pickled with a process group, which no pickle can hold. Say which ranks share out "
                "the data before the next step: assigner.process_group = group, or None for all of them."
            )

    def __deepcopy__(self, memo: object) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Callable[[bool], GroupHandle], tuple[bool]]:
        return _unpickled_handle, (self.was_lost or self.group is not None,)


def _unpickled_handle(was_lost: bool) -> GroupHandle:
    return GroupHandle(None, was_lost=was_lost)
