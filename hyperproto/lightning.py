"""For the `Trainer` of Lightning: an assignment step at the end of each epoch.

The assigner is found in the LightningModule, where the criterion that it was given to is a submodule; Lightning then
saves and resumes its state with all others.

```python
lightning.Trainer(callbacks=[AssignmentCallback()])
```
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import AssignmentError, HeadNotFoundError
from hyperproto.heads import get_heads


class AssignmentCallback(Callback):
    """Steps every assigner of the module at the end of each training epoch.

    Beside `EMAWeightAveraging` or `WeightAveraging` it sees to it that the average has the newest assignment that went
    into it wherever it is evaluated or saved, in whatever order the callbacks are.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the Trainer.

        Raises:
            HeadNotFoundError: the module holds no assigner.
        """
        assigners = [each for each in pl_module.modules() if isinstance(each, DynamicAssigner)]
        if not assigners:
            raise HeadNotFoundError(
                f"expected an assigner in {type(pl_module).__name__}, found none. Make the criterion of it in the "
                "module: self.criterion = hyperproto.BalancedLoss(hyperproto.DynamicAssigner(self.model))."
            )
        _put_averages_right(trainer, pl_module)
        for assigner in assigners:
            assigner.step()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the Trainer."""
        _put_averages_right(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called by the Trainer; the entries of the checkpoint share their memory with what is put right."""
        _put_averages_right(trainer, pl_module)


def _put_averages_right(trainer: Any, model: nn.Module) -> None:
    """Let the heads of an average over different assignments have the newest: that of the model.

    Which of both is in the model, and which beside it, depends on who was called first.
    """
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            for own, other in zip(get_heads(model).values(), get_heads(average).values(), strict=True):
                for head, newest in ((own, other), (other, own)):
                    try:
                        head._look(in_training=True)
                    except AssignmentError:
                        head.assign_(newest.assignment)
