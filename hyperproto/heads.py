"""The heads that a model has, and whether they agree."""

from __future__ import annotations

import torch
from torch import nn

from hyperproto.adapted import set_aside
from hyperproto.arguments import module
from hyperproto.errors import BankError, HeadNotFoundError
from hyperproto.head import HypersphericalHead


def get_heads(model: nn.Module) -> dict[str, HypersphericalHead]:
    """Hyperspherical heads of a model by dotted name ("" if the model is a head itself); empty if it has none.

    Sees through wrappers such as DistributedDataParallel and torch.compile.

    Examples:
        >>> list(get_heads(nn.Sequential(nn.Flatten(), HypersphericalHead(8, 4))))
        ['1']
    """
    return {name: each for name, each in module(model).named_modules() if isinstance(each, HypersphericalHead)}


def heads_in_use(model: nn.Module) -> dict[str, HypersphericalHead]:
    """Those of a model's heads that are its own: not what an adapter keeps beside the copy that is called.

    The others have an assignment of their own, which comes back when the adapter goes.

    Examples:
        >>> list(heads_in_use(nn.Sequential(nn.Flatten(), HypersphericalHead(8, 4))))
        ['1']
    """
    heads = get_heads(model)
    unused = {id(part) for layer in model.modules() for each in set_aside(layer) for part in each.modules()}
    return {name: head for name, head in heads.items() if id(head) not in unused}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what replicates or compiles it.

    In a fit DistributedDataParallel would wait in each forward pass for ranks that have fewer batches.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def require_heads(model: nn.Module) -> tuple[HypersphericalHead, ...]:
    """The model's heads in use, at least one; all of one task.

    Raises:
        HeadNotFoundError: there is none.
        BankError: they differ in prototypes, assignment or scale: no one of them can speak for the others.
    """
    found = heads_in_use(model)
    heads = tuple(found.values())
    if not heads:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no HypersphericalHead. Call hyperproto.convert_model(model, ...) first."
        )
    if any(head.assignment.is_meta for head in heads):  # without values there is nothing to compare
        return heads
    check_shared_bank(heads)
    if any(not torch.equal(head.logit_scale, heads[0].logit_scale) for head in heads[1:]):
        raise BankError(
            f"the heads of {type(model).__name__} have other scales ({', '.join(found)}), so that the first "
            "one cannot read what the others return. Pass one of the heads in place of the model."
        )
    return heads


def check_shared_bank(heads: tuple[HypersphericalHead, ...]) -> None:
    """Raise unless all have the same prototypes and the same assignment.

    Raises:
        BankError: they do not.
    """
    first = heads[0]
    for other in heads[1:]:
        same_bank = other.bank is first.bank or torch.equal(other.bank.prototypes, first.bank.prototypes)
        if not same_bank or not torch.equal(other.assignment, first.assignment):
            raise BankError(
                "all heads of one model must share one bank and one assignment; these differ. Pass one of the heads in "
                "place of the model where each has a task of its own; otherwise build them with the same PrototypeBank."
            )
