"""For the `Trainer` of Lightning: an assignment step at the end of each epoch.

The assigner is found in the LightningModule, where the criterion that it was given to is a submodule; Lightning then
saves and resumes its state with all others.

```python
lightning.Trainer(callbacks=[AssignmentCallback()])
```
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import HeadNotFoundError


class AssignmentCallback(Callback):
    """Steps every assigner of the module at the end of each training epoch."""

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
        for assigner in assigners:
            assigner.step()
