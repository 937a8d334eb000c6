"""A converted model in words."""

from __future__ import annotations

import math

from torch import nn

from hyperproto.affine import known_layers
from hyperproto.arguments import module
from hyperproto.bank import PrototypeBank
from hyperproto.conversion.locate import Leaf, num_inputs, num_outputs
from hyperproto.conversion.record import RECORD, Conversion, count_parameters
from hyperproto.head import HypersphericalHead
from hyperproto.heads import heads_in_use, require_heads
from hyperproto.losses import PrototypeCrossEntropyLoss
from hyperproto.projection import has_layers
from hyperproto.sphere import sampled_largest_cosines

#: Prototypes whose nearest neighbours are looked for: the time must not grow with the square of a bank of a million.
SAMPLED_ROWS = 4096

#: Names of classes that are shown, beside the last.
SHOWN_NAMES = 3


def describe(model: nn.Module, criterion: nn.Module | None = None) -> str:
    """What the model's hyperspherical heads are and what they took the place of; changes nothing.

    A line for each head (its name, what stood there, widths), one for the bank they share, one for the names of the
    classes where it has them, one for their scale and whether anything has fitted it, one for the parameters of the
    model before and after, and one for whatever else the conversion changed.

    Args:
        model: a converted model, bare or wrapped, or any module with a head in it.
        criterion: that the model is trained with; a scale of its own that is not the head's is told.

    Raises:
        HeadNotFoundError: it has none.

    Examples:
        >>> from hyperproto import convert_model
        >>> print(describe(convert_model(nn.Sequential(nn.Linear(16, 4)), dim=2, classifier="0")))
        Sequential: 4 classes on prototypes in dimension 2
          0: was Linear 16 -> 4, projects 16 -> 2 (linear, batch norm)
          bank: orthoplex, 4 prototypes, largest cosine 0.0000
          scale: 3.487, as it started: never fitted, see fit_logit_scale
          parameters: 68 before, 36 after
    """
    heads = heads_in_use(model)
    if criterion is not None:
        module(criterion, "criterion")
    if not heads:
        require_heads(model)
    first = next(iter(heads.values()))
    converted = {module: module.__dict__[RECORD] for module in model.modules() if RECORD in module.__dict__}
    leaves = {
        module.get_submodule(name): leaf for module, record in converted.items() for name, leaf in record.leaves.items()
    }
    tasks = {
        (head.num_classes, head.dim): f"{head.num_classes} classes on prototypes in dimension {head.dim}"
        for head in heads.values()
    }
    lines = [f"{type(model).__name__}: {', '.join(tasks.values())}"]
    for name, head in heads.items():
        lines.append(f"{name or 'itself'}: {_origin(leaves.get(head))}{_projection(head)}")
    banks = {head.bank: f"bank: {_bank(head.bank)}" for head in heads.values()}
    lines += dict.fromkeys(banks.values())
    lines += [
        f"classes: {shown_names(names)}"
        for names in dict.fromkeys(head.class_names for head in heads.values())
        if names
    ]
    scales = {_scale(head): None for head in heads.values()}
    lines += [f"scale: {scale}" for scale in scales]
    lines += _of_criterion(criterion, first)
    lines.append(f"parameters: {_num_parameters(model, list(converted.values()))}")
    lines += [f"also: {note}" for record in converted.values() for note in record.notes]
    return "\n  ".join(lines)


def shown_names(names: tuple[str, ...]) -> str:
    """Names of classes with their labels, the first few and the last.

    Examples:
        >>> shown_names(("ape", "bear", "cat", "dog", "eel"))
        '0 ape, 1 bear, 2 cat, ... 4 eel'
    """
    numbered = [f"{label} {name}" for label, name in enumerate(names)]
    return ", ".join(numbered if len(names) <= SHOWN_NAMES + 1 else [*numbered[:SHOWN_NAMES], f"... {numbered[-1]}"])


def _origin(leaf: Leaf | None) -> str:
    return "" if leaf is None else f"was {type(leaf).__name__} {num_inputs(leaf)} -> {num_outputs(leaf)}, "


def _projection(head: HypersphericalHead) -> str:
    if not has_layers(head.projection):
        return f"no projection ({head.in_features})"
    known = known_layers(head.projection)
    if known is None:
        layers = ", ".join(type(module).__name__ for module in head.projection.modules() if not list(module.children()))
    else:
        layers = "linear" if known.batch_norm is None else "linear, batch norm"
    return f"projects {head.in_features} -> {head.dim} ({layers})"


def _scale(head: HypersphericalHead) -> str:
    if head.logit_scale.is_meta:
        return "without a value yet"
    scale = float(head.logit_scale)
    started = math.isclose(scale, head.initial_logit_scale, rel_tol=1e-6)
    never = ", as it started: never fitted, see fit_logit_scale"
    return f"{scale:.4g}{never if started else ', fitted or loaded'}"


def _of_criterion(criterion: nn.Module | None, head: HypersphericalHead) -> list[str]:
    if not isinstance(criterion, PrototypeCrossEntropyLoss) or head.logit_scale.is_meta:
        return []
    scale, own = float(criterion.scale), float(criterion.head.logit_scale)
    if math.isclose(scale, own, rel_tol=1e-3):
        return []
    return [
        f"criterion: trains with scale {scale:.4g}, the head's probabilities have {own:.4g}; call fit_logit_scale on "
        "held-out data after training"
    ]


def _bank(bank: PrototypeBank) -> str:
    text = f"{bank.method}, {bank.num_prototypes} prototypes"
    if bank.prototypes.is_meta:
        return text
    cosine = round(float(sampled_largest_cosines(bank.prototypes, SAMPLED_ROWS).max()), 4)
    sampled = f" of {SAMPLED_ROWS} sampled" if bank.num_prototypes > SAMPLED_ROWS else ""
    return f"{text}, largest cosine {cosine + 0.0:.4f}{sampled}"  # + 0.0 turns -0.0 into 0.0


def _num_parameters(model: nn.Module, records: list[Conversion]) -> str:
    after = count_parameters(model)
    removed = sum(record.num_parameters - record.num_parameters_after for record in records)
    return f"{after + removed:,} before, {after:,} after" if records else f"{after:,}"
