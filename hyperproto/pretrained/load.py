"""A plain model and a converted one's checkpoint, made into the converted model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from hyperproto.arguments import module
from hyperproto.checkpoint import prefix_of
from hyperproto.codebook import ASSIGNER, TrainingOutput
from hyperproto.conversion.convert import convert_model
from hyperproto.conversion.restore import restore_model
from hyperproto.conversion.stored import State, head_names, read_state
from hyperproto.errors import CheckpointError
from hyperproto.heads import get_heads

#: Names of entries that a message shows.
SHOWN = 5


def load_model(model: nn.Module, state_or_path: State | str | os.PathLike[str]) -> nn.Module:
    """Convert a plain model as a converted one was, and load that one's checkpoint into it; in place, returned.

    The heads are found by the checkpoint's keys, and all that makes them is read from it: dimension, prototypes, kind
    of projection, scale and assignment. No bank is built. Whatever fitted, refitted or compressed the saved heads, and
    whichever version since 0.1.0 saved them, makes no difference. Everything is checked before anything is changed: on
    an error the model is as it was. Nothing is unpickled.

    Args:
        model: as the saved one was before it was converted (timm, torchvision, transformers or any other); its number
            of classes does not matter. On the CPU, a GPU or in half precision: it stays where and what it is.
        state_or_path: a `state_dict`, a file (.pt, .pth, .bin, .safetensors) or a folder, as `save_pretrained` of this
            library or of transformers, or timm's `save_for_hf`, writes one.

    Returns:
        The same model, in the mode that it was in. In train mode its heads return logits, since a `state_dict` does not
        say what the saved ones did: `convert_model(model, like=state, training_output="embedding")` says so. Nor has it
        names of classes. `load_pretrained` brings both back from a folder of `save_pretrained`.

    Raises:
        CheckpointError: what cannot be read, or belongs to another model; says what differs.
        AssignmentError, BankError: entries that are damaged.
        AlreadyConvertedError: the model has a head already: use `model.load_state_dict`, or restore it.

    Examples:
        >>> import torch
        >>> saved = convert_model(nn.Sequential(nn.Linear(16, 4)), dim=2, classifier="0", seed=3)
        >>> model = load_model(nn.Sequential(nn.Linear(16, 4)), saved.state_dict())
        >>> torch.equal(model.eval()(torch.ones(1, 16)), saved.eval()(torch.ones(1, 16)))
        True
    """
    state = read_state(state_or_path)
    return convert_and_load(model, state)


def convert_and_load(
    model: nn.Module, state: State, *, training_output: TrainingOutput = "logits", class_names: object = None
) -> nn.Module:
    """As `load_model`, with what is in no `state_dict`."""
    state = _in_own_names(module(model), state)
    convert_model(model, like=state, training_output=training_output, class_names=class_names)
    try:
        _check_entries(model, state)
        model.load_state_dict(dict(state))
    except BaseException:
        restore_model(model)
        raise
    return model


def _in_own_names(model: Any, state: State) -> State:
    """The entries by the names that a model has for them: transformers writes some otherwise, and reads them back."""
    if not (hasattr(model, "from_pretrained") and hasattr(model, "config")):
        return state
    heads = tuple(map(prefix_of, head_names(state)))
    if all(name in state for name in model.state_dict() if not name.startswith(heads)):
        return state
    try:
        with torch.random.fork_rng(devices=[]):  # for the start of the classifier, which is not needed
            again, told = type(model).from_pretrained(
                None, config=model.config, state_dict=dict(state), output_loading_info=True
            )
    except RuntimeError:  # of other shapes: the model's own check names them
        return state
    lacking = {name for name in told["missing_keys"] if not name.startswith(heads)}
    backbone = {
        name: value for name, value in again.state_dict().items() if not name.startswith(heads) and name not in lacking
    }
    kept = {name: value for name, value in state.items() if name.startswith(heads) or name in told["unexpected_keys"]}
    return backbone | kept


def _check_entries(model: nn.Module, state: State) -> None:
    """Raise unless a checkpoint has an entry of the right shape for each of the model's, and no others.

    Raises:
        CheckpointError: it has not.
    """
    own = model.state_dict()
    # Of these the heads see to themselves: earlier formats lack some, or have one for each head that shares a bank.
    heads = tuple(map(prefix_of, get_heads(model)))
    of_heads = {head + key for head in heads for key in ("assignment_record", "format_version")}
    banks = {head + "bank.prototypes" for head in heads}
    missing = own.keys() - state.keys() - of_heads - banks
    assigners = tuple(head + ASSIGNER for head in heads)
    unexpected = {name for name in state.keys() - own.keys() - banks if not name.startswith(assigners)}
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    for what, names in (("lacks", missing), ("has", unexpected), ("has in other shapes", shapes)):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise CheckpointError(
                f"the checkpoint is not one of this model ({type(model).__name__}): it {what} {shown}{more}. Make the "
                "model as the saved one was made before it was converted."
            )
