"""Put another head in the place of one that a model has."""

from __future__ import annotations

from torch import nn

from hyperproto.conversion.locate import put_in_place
from hyperproto.conversion.record import RECORD, count_parameters
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads


def replace_head(model: nn.Module, name: str, head: HypersphericalHead) -> None:
    """Let `head` take the place of the model's head of that name; what is bound to the old one raises from then on.

    The new one gets the device, dtype and mode of the old one. `restore_model` and `describe` work as before.
    """
    old = get_heads(model)[name]
    holders = [module for module in model.modules() if RECORD in module.__dict__ and old in module.modules()]
    witness = next(old.parameters())
    head.to(device=witness.device, dtype=witness.dtype).train(old.training)
    put_in_place(model, old, head)
    for module in holders:
        module.__dict__[RECORD].num_parameters_after = count_parameters(module)
