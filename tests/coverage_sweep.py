"""Converts every classifier of timm and torchvision and writes docs/coverage.md.

    python tests/coverage_sweep.py [--family resnet] [--names "deit_*"] [--jobs 2]

Each model is built on the meta device, which computes shapes but no numbers, as it comes: timm's with num_classes=10,
or with none where its configuration has none. It is converted, run in train mode with a loss and a backward pass, run
in eval mode, and restored. The page is written only when nothing is filtered out. Nothing is downloaded. About half an
hour on two cores.
"""

import argparse
import fnmatch
import os
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from hyperproto import BalancedLoss, HeadNotFoundError, convert_model, get_heads, restore_model

NUM_CLASSES = 10
DIM = 8
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
STAGES = ("converted", "trained", "predicted", "restored")

INTRODUCTION = """\
# Which models convert

Every classifier that timm and torchvision offer, built, converted with `convert_model(model, dim=8)`, run in train mode
with a loss and a backward pass, run in eval mode, and restored. Restored means: every module and every parameter is
the object it was before. On the meta device, which computes shapes and no numbers; the numbers are the business of
`tests/test_structures.py`. Written by `python tests/coverage_sweep.py`.
"""


@dataclass
class Outcome:
    """How far one model came."""

    library: str
    family: str
    name: str
    stages: tuple[str, ...] = ()
    num_heads: int = 0
    error: str = ""
    has_classifier: bool = True


def build(library: str, name: str) -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    """A model on the meta device, what convert_model has to be told, and the shape of an input."""
    if library == "torchvision":
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        # RegNet computes its widths with tensors.
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            model = torchvision.models.get_model(name, num_classes=NUM_CLASSES, **extra).to("meta")
        size = 299 if name == "inception_v3" else 224
        return model, {}, (2, 3, size, size)
    config = timm.get_pretrained_cfg(name)
    bare = config is not None and config.num_classes == 0
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0 if bare else NUM_CLASSES, pretrained=False)
    return model, {"num_classes": NUM_CLASSES} if bare else {}, (2, *model.pretrained_cfg["input_size"])


def structure(model: nn.Module) -> dict[str, Any]:
    """Every module and parameter by name, to be compared by identity, and the number of classes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    identities = {name: id(each) for name, each in (parameters | modules).items()}
    return identities | {"num_classes": getattr(model, "num_classes", None)}


def run(library: str, family: str, name: str) -> Outcome:
    """Take one model through all stages."""
    outcome = Outcome(library, family, name)
    try:
        _take_through(outcome)
    except Exception:
        outcome.error = traceback.format_exc(limit=-3)
    return outcome


def _take_through(outcome: Outcome) -> None:
    model, extra, shape = build(outcome.library, outcome.name)
    before = structure(model)
    if outcome.library == "timm" and not hasattr(model, "get_classifier"):
        outcome.has_classifier = False
        try:
            convert_model(model, dim=DIM, **extra)
        except HeadNotFoundError:
            return
        raise AssertionError("a model without a classifier was converted")
    convert_model(model, dim=DIM, **extra)
    heads = get_heads(model)
    outcome.num_heads = len(heads)
    if any(head.bank is not next(iter(heads.values())).bank for head in heads.values()):
        raise AssertionError("the heads do not share one bank")
    outcome.stages += ("converted",)
    images = torch.zeros(shape, device="meta")

    output = model.train()(images)
    logits = output if isinstance(output, Tensor) else output[0]  # GoogLeNet, Inception: auxiliary outputs
    BalancedLoss(model)(logits, torch.zeros(2, dtype=torch.int64, device="meta")).backward()
    if any(parameter.grad is None for head in heads.values() for parameter in head.parameters()):
        raise AssertionError("a head gets no gradient")
    outcome.stages += ("trained",)

    with torch.no_grad():
        output = model.eval()(images)
    if tuple(output.shape) != (2, NUM_CLASSES):
        raise AssertionError(f"output of shape {tuple(output.shape)}")
    outcome.stages += ("predicted",)

    restore_model(model)
    if structure(model) != before:
        raise AssertionError("another structure than before")
    outcome.stages += ("restored",)


def list_models(family: str | None, names: str | None) -> list[tuple[str, str, str]]:
    """(library, family, name) of every model that the filters let through."""
    found = [("timm", timm.models._registry._model_to_module[name], name) for name in timm.list_models()]
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        found.append(("torchvision", builder.__module__.rpartition(".")[2], name))
    return [
        each for each in found if (family in (None, each[1])) and (names is None or fnmatch.fnmatch(each[2], names))
    ]


def page(outcomes: list[Outcome]) -> str:
    """The Markdown page: totals, one row for each family, what has no classifier."""
    lines = [
        INTRODUCTION,
        f"{date.today():%d %B %Y}, torch {torch.__version__}, timm {timm.__version__}, "
        f"torchvision {torchvision.__version__}.\n",
    ]
    lines += totals(outcomes)
    for library in ("timm", "torchvision"):
        lines += ["", f"## {library}", "", f"| family | names | heads | {' | '.join(STAGES)} |"]
        lines.append("|---|" + "---:|" * (2 + len(STAGES)))
        families = defaultdict(list)
        for outcome in outcomes:
            if outcome.library == library and outcome.has_classifier:
                families[outcome.family].append(outcome)
        for family, members in sorted(families.items()):
            heads = ", ".join(map(str, sorted({member.num_heads for member in members})))
            reached = [sum(stage in member.stages for member in members) for stage in STAGES]
            lines.append(f"| {family} | {len(members)} | {heads} | {' | '.join(map(str, reached))} |")
    without = [outcome.name for outcome in outcomes if not outcome.has_classifier]
    lines += ["", "## No classifier", ""]
    lines.append(
        "These encoders return features and have no classifier to replace; `convert_model` raises "
        f"`HeadNotFoundError`: {', '.join(f'`{name}`' for name in without)}."
    )
    return "\n".join(lines) + "\n"


def totals(outcomes: list[Outcome]) -> list[str]:
    """One line for each library: how many of its models came through each stage."""
    lines = []
    for library in ("timm", "torchvision"):
        members = [outcome for outcome in outcomes if outcome.library == library and outcome.has_classifier]
        reached = Counter(stage for member in members for stage in member.stages)
        counts = ", ".join(f"{stage} {reached[stage]} of {len(members)}" for stage in STAGES)
        lines.append(f"- {library}: {counts}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="one module of timm.models or torchvision.models, such as resnet")
    parser.add_argument("--names", help="a pattern, such as deit_*")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models = list_models(options.family, options.names)
    with ProcessPoolExecutor(options.jobs) as pool:
        outcomes = list(tqdm(pool.map(run, *zip(*models, strict=True)), total=len(models), mininterval=5))
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        tqdm.write(f"{outcome.library} {outcome.name}\n{outcome.error}")
    tqdm.write("\n".join(totals(outcomes)))
    if options.family is None and options.names is None:
        PAGE.write_text(page(outcomes))
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
