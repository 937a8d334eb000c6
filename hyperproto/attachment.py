"""An assigner's state within its model's checkpoint, for engines that save nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hyperproto.checkpoint import prefix_of
from hyperproto.codebook import ASSIGNER, Codebook
from hyperproto.heads import get_heads
from hyperproto.running_means import RunningMeans


class Attachment:
    """Writes means into the `state_dict` of a model, behind all other entries, under the name of their head.

    A hook of `nn.Module.state_dict`. Loading is up to the head, `Codebook.attach`. The means are no part of the model:
    nothing broadcasts, averages, moves or exports them, and a copy of the model has none.
    """

    def __init__(self, head: Codebook | None, means: RunningMeans | None) -> None:
        self._head = head
        self._means = means

    def __call__(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
        """Add the entries."""
        for name, head in get_heads(model).items():
            if self._means is not None and head is self._head:
                self._means.state_dict(destination=state_dict, prefix=prefix + prefix_of(name) + ASSIGNER)

    def __deepcopy__(self, memo: object) -> Attachment:
        return Attachment(None, None)

    def __reduce__(self) -> tuple[Callable[..., Attachment], tuple[None, None]]:
        return Attachment, (None, None)
