"""For the `Trainer` of transformers: an assignment step at the end of each epoch.

```python
assigner = hyperproto.DynamicAssigner(model, attach=True)  # Trainer saves the model, and the assigner's state with it
criterion = hyperproto.BalancedLoss(assigner, reduction="sum")

def loss(output, labels, num_items_in_batch=None):
    return criterion(output.logits, labels) / (num_items_in_batch or len(labels))

transformers.Trainer(model, arguments, compute_loss_func=loss, callbacks=[AssignmentCallback(assigner)], ...)
```
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hyperproto.assigner import DynamicAssigner


class AssignmentCallback(TrainerCallback):
    """Steps an assigner at the end of each epoch.

    Args:
        assigner: made with `attach=True`, so that a run resumes with its class means.
    """

    def __init__(self, assigner: DynamicAssigner) -> None:
        self.assigner = assigner

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.assigner.step()
