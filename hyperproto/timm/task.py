"""A training task of timm that matches labels to prototypes; needs a timm that has tasks."""

from __future__ import annotations

from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import ArgumentError


class PrototypeTask(ClassificationTask):
    """timm's `ClassificationTask` that feeds an assigner with every training batch, whatever the loss is.

    The assigner's state travels in the model's own checkpoint: `CheckpointSaver` saves it, `resume_task_checkpoint`
    brings it back. Where the training loop can be written to, `task.assigner.step()` at the end of each epoch matches;
    where it cannot, `step_every=len(loader)` does.

    Args:
        model: a converted model.
        criterion: a loss of timm, of torch or of this library, made of the model: `BalancedLoss(model)`.
        step_every: batches after which the assigner steps by itself; see `DynamicAssigner`.
        options: of `ClassificationTask`.

    Attributes:
        assigner: of the model.

    Raises:
        HeadNotFoundError: the model has no head.
        ArgumentError: a criterion that feeds an assigner of its own.

    Examples:
        >>> import timm, hyperproto.timm
        >>> model = timm.create_model("hp_test_resnet", num_classes=6, hp_dim=4)
        >>> task = PrototypeTask(model, nn.CrossEntropyLoss(), verbose=False)
        >>> task(torch.randn(12, 3, 32, 32), torch.arange(12) % 6)["output"].shape, task.assigner.step().unseen
        (torch.Size([12, 6]), ())
    """

    def __init__(
        self, model: nn.Module, criterion: Any = None, *, step_every: int | None = None, **options: Any
    ) -> None:
        super().__init__(model, criterion, **options)
        if getattr(criterion, "assigner", None) is not None:
            raise ArgumentError(
                "expected a criterion without an assigner, which the task has and feeds. Make it of the model, as in "
                "hyperproto.BalancedLoss(model)."
            )
        self.assigner = DynamicAssigner(model, attach=True, step_every=step_every)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """As of `ClassificationTask`; feeds the assigner where gradients are on and the head is in train mode."""
        result: dict[str, Tensor] = super().forward(input, target)
        if torch.is_grad_enabled() and self.assigner.head.training:
            self.assigner.update(result["output"], target)
        return result
