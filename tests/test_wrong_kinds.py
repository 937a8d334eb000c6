"""Wrong kinds of value, given to each argument of all that is public, are taken or refused in the library's words."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from compatible import in_front
from hypothesis import HealthCheck, given, settings
from torch import nn

import hyperproto
from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HyperprotoError,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    convert_model,
    functional,
    testing,
)

WRONG: dict[str, Any] = {
    "None": None,
    "bool": True,
    "string": "4",
    "bytes": b"4",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1.5,
    "zero": 0,
    "huge": 10**30,
    "huge float": 1e300,
    "complex": 1j,
    "object": object(),
    "type": int,
    "empty list": [],
    "ragged": [[0], [0, 1]],
    "strings": ["a", "b"],
    "huge ints": [10**30] * 4,
    "set of kinds": {1, "a"},
    "dict": {"a": 1},
    "dict of None": dict.fromkeys(range(4)),
    "function": lambda *arguments: None,
    "module": nn.Linear(2, 2),
    "vector": torch.zeros(7),
    "NaN tensor": torch.full((4,), float("nan")),
    "NaN matrix": torch.full((4, 3), float("nan")),
    "infinite matrix": torch.full((4, 4), float("inf")),
    "negative ints": torch.full((4,), -7),
    "large ints": torch.full((4,), 2**62),
    "bools": torch.ones(4, 3, dtype=torch.bool),
    "complex tensor": torch.zeros(4, 3, dtype=torch.complex64),
    "empty tensor": torch.zeros(0),
    "empty matrix": torch.zeros(0, 3),
    "three dimensions": torch.zeros(4, 3, 2),
    "meta": torch.zeros((), device="meta"),
    "meta vector": torch.zeros(4, dtype=torch.int64, device="meta"),
    "meta matrix": torch.zeros(4, 3, device="meta"),
    "sparse": torch.eye(4).to_sparse(),
    "objects": np.array([None, "a"], dtype=object),
    "dates": np.zeros(4, dtype="datetime64[s]"),
}

LABELS = torch.arange(4)
EYE = torch.eye(4)


def make_head(**options: Any) -> HypersphericalHead:
    return HypersphericalHead(8, 4, **{"dim": 3, **options})


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4))


def converted() -> nn.Module:
    return convert_model(plain(), classifier="0", dim=3)


def outputs() -> torch.Tensor:
    return nn.functional.normalize(torch.ones(4, 3))


def drawn(strategy: Callable[..., Any]) -> Callable[..., None]:
    """One draw: strategies look at their arguments then."""

    def draw(**options: Any) -> None:
        @settings(max_examples=1, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy(**options))
        def once(value: object) -> None:
            pass

        once()

    return draw


COMMON = {"ignore_index": -100, "reduction": "mean"}
LOSS_OPTIONS = {
    BalancedLoss: {},
    LongTailLoss: {"class_counts": [4, 3, 2, 1]},
    PrototypeCrossEntropyLoss: {"scale": 16.0, "label_smoothing": 0.1, "weight": [1.0, 2.0, 1.0, 0.5]},
}

#: A call that is right, with every argument given: of each public function, class and method with arguments.
FIT_OPTIONS: dict[str, dict[str, object]] = {
    "fit_head": {"bank": "class-vectors"},
    "refit_head": {"scale": 8.0, "iterations": 2, "class_counts": [12, 12, 12, 12]},
    "compress_head": {"dim": 2, "scale": 8.0, "iterations": 2, "class_counts": [12, 12, 12, 12]},
    "fit_logit_scale": {"match": "confidence"},
}


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Enough of each label for a tenth to be held out."""
    labels = torch.arange(48) % 4
    return torch.eye(4, 8)[labels] + 0.1 * torch.randn(48, 8, generator=torch.Generator().manual_seed(0)), labels


CALLS: dict[str, Callable[[], tuple[Callable[..., object], dict[str, Any]]]] = {
    "HypersphericalHead": lambda: (
        HypersphericalHead,
        {"in_features": 8, "num_classes": 4, "dim": 3, "bank": "auto", "projection": "linear", "logit_scale": 9.0,
         "training_output": "logits", "seed": 0},
    ),
    "HypersphericalHead.forward": lambda: (make_head(), {"features": torch.ones(4, 8)}),
    "HypersphericalHead.embed": lambda: (make_head().embed, {"features": torch.ones(4, 8)}),
    "HypersphericalHead.topk": lambda: (make_head().topk, {"embeddings": outputs(), "k": 2}),
    "HypersphericalHead.assign_": lambda: (make_head().assign_, {"assignment": [1, 0, 2, 3]}),
    "HypersphericalHead.read": lambda: (make_head().read, {"output": outputs()}),
    "HypersphericalHead.is_embedding": lambda: (make_head().is_embedding, {"output": outputs()}),
    "HypersphericalHead.embeddings_from_output": lambda: (make_head().embeddings_from_output, {"output": outputs()}),
    "HypersphericalHead.cosines_from_output": lambda: (make_head().cosines_from_output, {"output": outputs()}),
    "HypersphericalHead.target_cosines_from_output": lambda: (
        make_head().target_cosines_from_output, {"output": outputs(), "labels": LABELS}),
    "HypersphericalHead.recover_embeddings": lambda: (make_head().recover_embeddings, {"logits": torch.zeros(4, 4)}),
    "PrototypeBank": lambda: (
        PrototypeBank,
        {"num_prototypes": 4, "dim": 3, "method": "energy", "seed": 0, "power": 1, "half_space": False}),
    "PrototypeBank.from_tensor": lambda: (PrototypeBank.from_tensor, {"prototypes": EYE}),
    "PrototypeBank.from_class_vectors": lambda: (PrototypeBank.from_class_vectors, {"vectors": EYE, "dim": 2}),
    "DynamicAssigner": lambda: (
        DynamicAssigner, {"source": make_head(), "momentum": 0.9, "solver": "auto", "process_group": None,
         "attach": True, "step_every": 2}),
    "DynamicAssigner.update": lambda: (
        DynamicAssigner(make_head()).update, {"output": outputs(), "target": LABELS, "ignore_index": -100}),
    "DynamicAssigner.forget": lambda: (DynamicAssigner(make_head()).forget, {"labels": [1, 2]}),
    **{
        loss.__name__: lambda loss=loss, options=options: (loss, {"source": make_head(), **COMMON, **options})
        for loss, options in LOSS_OPTIONS.items()
    },
    **{
        f"{loss.__name__}.forward": lambda loss=loss, options=options: (
            loss(DynamicAssigner(make_head()), **options),
            {"output": outputs(), "target": LABELS, "indices_tuple": None})
        for loss, options in LOSS_OPTIONS.items()
    },
    **{
        f"{loss.__name__}.{name}": lambda loss=loss, name=name, options=options: (
            getattr(loss(make_head(), **options), name), {"logits": EYE})
        for name in ("activation", "decodes")
        for loss, options in LOSS_OPTIONS.items()
    },
    "convert_model": lambda: (
        convert_model,
        {"model": plain(), "dim": 3, "num_classes": 4, "bank": "auto", "classifier": "0", "projection": "linear",
         "training_output": "logits", "warm_start": True, "seed": 0, "like": None, "class_names": list("abcd")}),
    **{
        name: lambda name=name, options=options: (
            getattr(hyperproto, name),
            {"model": converted(), "loader": samples(), **options, "process_group": None})
        for name, options in FIT_OPTIONS.items()
    },
    "describe": lambda: (
        hyperproto.describe, {"model": converted(), "criterion": PrototypeCrossEntropyLoss(make_head())}),
    "get_heads": lambda: (hyperproto.get_heads, {"model": converted()}),
    "restore_model": lambda: (hyperproto.restore_model, {"model": converted()}),
    "to_linear": lambda: (hyperproto.to_linear, {"model": converted()}),
    "balanced_loss": lambda: (functional.balanced_loss, {"cosines": EYE, "target": LABELS, **COMMON}),
    "long_tail_loss": lambda: (
        functional.long_tail_loss, {"cosines": EYE, "target": LABELS, **COMMON, **LOSS_OPTIONS[LongTailLoss]}),
    "prototype_cross_entropy": lambda: (
        functional.prototype_cross_entropy,
        {"cosines": EYE, "target": LABELS, **COMMON, **LOSS_OPTIONS[PrototypeCrossEntropyLoss]}),
    "batch_squared_lengths": lambda: (functional.batch_squared_lengths, {"target": LABELS, "ignore_index": -100}),
    "squared_class_lengths": lambda: (
        functional.squared_class_lengths, {"class_counts": [4, 3, 2, 1], "num_classes": 4}),
    "hyperspherical_energy": lambda: (
        functional.hyperspherical_energy, {"weight": EYE, "power": 1, "half_space": False}),
    "solve_assignment": lambda: (
        functional.solve_assignment,
        {"class_means": EYE, "prototypes": EYE, "current": [1, 0, 2, 3], "weights": [1.0, 2.0, 3.0, 4.0],
         "method": "sparse", "prices": torch.zeros(4)}),
    "check_assignment": lambda: (testing.check_assignment, {"source": LABELS, "num_prototypes": 4}),
    "check_bank": lambda: (testing.check_bank, {"bank": EYE}),
    "check_loss": lambda: (testing.check_loss, {"loss": BalancedLoss(make_head()), "head": make_head()}),
    "check_optimal": lambda: (
        testing.check_optimal,
        {"assignment": LABELS, "class_means": EYE, "prototypes": EYE, "tolerance": 1e-5}),
    "banks": lambda: (drawn(testing.banks), {"min_prototypes": 3, "max_prototypes": 4, "max_dim": 3}),
    "embeddings": lambda: (drawn(testing.embeddings), {"dim": 3, "min_size": 0, "max_size": 4}),
    "label_streams": lambda: (
        drawn(testing.label_streams), {"num_classes": 4, "max_batches": 2, "max_batch_size": 3}),
    "heads": lambda: (drawn(testing.heads), {"max_classes": 4, "max_spare": 1, "max_dim": 3}),
}  # fmt: skip

#: What the library calls itself, with what it has checked.
INTERNAL = {
    # Files, folders and factories: their own tests try what is none (test_pretrained.py).
    *("PrototypeBank.from_checkpoint", "check_class_names", "load_model", "load_pretrained", "save_pretrained"),
    "DynamicAssigner.check_checkpoint",
    "DynamicAssigner.feed",
    "DynamicAssigner.leave_out",
    "HypersphericalHead.attach",
    "HypersphericalHead.check_checkpoint",
    "HypersphericalHead.like",
    "HypersphericalHead.train",
    "PrototypeBank.check_checkpoint",
}


def public_calls() -> Iterator[tuple[str, set[str]]]:
    """Name and arguments of each public function, class and method that has any."""
    for owner in (hyperproto, functional, testing):
        for name in owner.__all__:
            each = getattr(owner, name)
            is_error = inspect.isclass(each) and issubclass(each, (Exception, Warning))
            if not callable(each) or is_error or is_dataclass(each):
                continue
            yield name, arguments_of(each)
            if not inspect.isclass(each):
                continue
            for method, function in inspect.getmembers(each, inspect.isroutine):
                if not method.startswith("_") and function.__module__.startswith("hyperproto"):
                    yield f"{name}.{method}", arguments_of(function)


def arguments_of(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "draw"}


def test_every_argument_of_every_public_call_is_tried():
    public = {name: arguments for name, arguments in public_calls() if arguments}
    assert set(public) - INTERNAL == set(CALLS)
    assert set(public) >= INTERNAL
    for name, make in CALLS.items():
        assert set(make()[1]) == public[name], name


@pytest.mark.filterwarnings("ignore::hyperproto.HyperprotoWarning")  # of a scale fitted to a model that knows nothing
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name):
    call, arguments = CALLS[name]()
    call(**arguments)


def is_said(error: Exception, name: str) -> bool:
    """Whether an error is of the library, and says what was expected; checks of `hyperproto.testing` are assertions."""
    if name.startswith("check_") and isinstance(error, AssertionError):
        return True
    words = ("expect", "must", "need", "taken", "no ", "not ")
    return isinstance(error, HyperprotoError) and any(word in str(error) for word in words)


def variants(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is nearly a tensor that is right: another dtype, device, layout, size."""
    return {
        "as bool": value.bool(),
        "as uint8": value.to(torch.uint8),
        "as int32": value.int(),
        "as half": value.half(),
        "as double": value.double(),
        "as complex": value.to(torch.complex64),
        "as NaN": torch.full_like(value.float(), float("nan")),
        "as zero": torch.zeros_like(value),
        "of meta": value.to("meta"),
        "made sparse": value.to_sparse(),
        "none of it": value[:0],
        "all but one": value[:-1],
        "twice": torch.cat([value, value]),
        "wider": torch.cat([value, value], dim=-1),
        "in one more": value[None],
        "one of it": value[0],
        "a view": value.mT if value.dim() == 2 else value.flip(0),
        "with a gradient": value.float().requires_grad_(),
    }


ARGUMENTS = {name: list(make()[1]) for name, make in CALLS.items()}


@pytest.mark.parametrize(
    ("name", "argument"),
    in_front(
        [(name, each) for name, arguments in ARGUMENTS.items() for each in arguments],
        *((name, arguments[0]) for name, arguments in ARGUMENTS.items() if arguments),
    ),
)
def test_wrong_kinds_of_value_are_taken_or_refused_in_words(name, argument):
    taken, raw = set(), {}
    right = CALLS[name]()[1][argument]
    for kind, value in (WRONG | (variants(right) if isinstance(right, torch.Tensor) else {})).items():
        call, arguments = CALLS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hyperproto.HyperprotoWarning)
            try:
                call(**{**arguments, argument: value})
                taken.add(kind)
            except Exception as error:
                if not is_said(error, name):
                    raw[kind] = f"{type(error).__name__}: {error}"[:150]
    assert set(raw) <= SAID_ELSEWHERE.get(f"{name}: {argument}", set()), raw
    assert taken & set(WRONG) == TAKEN.get(f"{name}: {argument}", set())


#: Errors that are not the library's. Devices that differ are told by torch, as for every layer; a loss that cannot be
#: called with two arguments is told by Python.
SAID_ELSEWHERE = {
    "HypersphericalHead.forward: features": {"of meta"},
    "HypersphericalHead.embed: features": {"of meta"},
    "HypersphericalHead.recover_embeddings: logits": {"of meta"},
    "check_loss: loss": {"type", "module"},
}

#: What can be meant after all, and the arguments of which it can.
MEANT: list[tuple[set[str], list[str]]] = [
    (
        {"infinite matrix"},
        [f"{loss.__name__}.{name}: logits" for name in ("activation", "decodes") for loss in LOSS_OPTIONS],
    ),
    (
        {"None"},
        [
            "HypersphericalHead: dim",
            "DynamicAssigner: process_group",
            "fit_head: bank",
            *(f"{fit}: process_group" for fit in FIT_OPTIONS),
            "DynamicAssigner: step_every",
            "convert_model: dim",
            "convert_model: class_names",
            "convert_model: like",
            "convert_model: num_classes",
            "solve_assignment: current",
            "check_assignment: num_prototypes",
        ],
    ),
    (
        {"None", "huge"},
        [
            "HypersphericalHead: logit_scale",
            "PrototypeCrossEntropyLoss: scale",
            "prototype_cross_entropy: scale",
            "refit_head: scale",
            "compress_head: scale",
        ],
    ),
    (
        {"zero"},
        [
            "HypersphericalHead: seed",
            "PrototypeBank: seed",
            "PrototypeBank: power",
            "DynamicAssigner.update: ignore_index",
            "BalancedLoss: ignore_index",
            "LongTailLoss: ignore_index",
            "PrototypeCrossEntropyLoss: ignore_index",
            "PrototypeCrossEntropyLoss: label_smoothing",
            "convert_model: seed",
            "balanced_loss: ignore_index",
            "long_tail_loss: ignore_index",
            "prototype_cross_entropy: ignore_index",
            "prototype_cross_entropy: label_smoothing",
            "batch_squared_lengths: ignore_index",
            "embeddings: min_size",
            "embeddings: max_size",
            "label_streams: max_batches",
            "label_streams: max_batch_size",
            "heads: max_spare",
        ],
    ),
    ({"empty matrix", "meta matrix"}, ["HypersphericalHead.topk: embeddings"]),
    (
        {"NaN matrix", "infinite matrix", "empty matrix", "meta matrix"},
        [
            "HypersphericalHead.read: output",
            "HypersphericalHead.is_embedding: output",
            "HypersphericalHead.embeddings_from_output: output",
            "HypersphericalHead.cosines_from_output: output",
            "hyperspherical_energy: weight",
        ],
    ),
    (
        {"NaN matrix", "infinite matrix"},
        [
            "HypersphericalHead.target_cosines_from_output: output",
            "DynamicAssigner.update: output",
            "BalancedLoss.forward: output",
            "LongTailLoss.forward: output",
            "PrototypeCrossEntropyLoss.forward: output",
        ],
    ),
    (
        {"infinite matrix"},
        [
            "HypersphericalHead.recover_embeddings: logits",
            "balanced_loss: cosines",
            "long_tail_loss: cosines",
            "prototype_cross_entropy: cosines",
        ],
    ),
    (
        {"bool"},
        [
            "DynamicAssigner: attach",
            "PrototypeBank: half_space",
            "convert_model: warm_start",
            "hyperspherical_energy: half_space",
        ],
    ),
    ({"None", "zero"}, ["DynamicAssigner: momentum"]),
    ({"empty list", "empty tensor"}, ["DynamicAssigner.forget: labels"]),
    (
        {"None", "large ints"},
        [
            "LongTailLoss: class_counts",
            "PrototypeCrossEntropyLoss: weight",
            "long_tail_loss: class_counts",
            "prototype_cross_entropy: weight",
            "solve_assignment: weights",
        ],
    ),
    ({"None", "module"}, ["describe: criterion", "check_loss: head"]),
    ({"None", "large ints"}, ["refit_head: class_counts", "compress_head: class_counts"]),
    ({"module"}, ["get_heads: model"]),
    (
        {"None"},
        [f"{each}.forward: indices_tuple" for each in ("BalancedLoss", "LongTailLoss", "PrototypeCrossEntropyLoss")],
    ),
    (
        {"NaN matrix", "infinite matrix", "negative ints", "large ints", "empty matrix", "meta vector", "meta matrix"},
        ["batch_squared_lengths: target"],
    ),
    ({"large ints"}, ["squared_class_lengths: class_counts"]),
    ({"zero", "huge", "huge float"}, ["hyperspherical_energy: power", "check_optimal: tolerance"]),
    ({"None", "negative ints", "large ints"}, ["solve_assignment: prices"]),
]
TAKEN = {argument: kinds for kinds, arguments in MEANT for argument in arguments}
