"""A pretrained backbone whose last stages train with the head: the first code block of the README, where people use it.

    python experiments/finetune.py --data MOSAICS --weights LITE0.pth

tf_efficientnet_lite0 from ImageNet on CIFAR-100 at 112 px, 45 images of each class, the first 40 test images of each.
What comes before the last two stages is frozen and computed once; those stages and the head train for 4 epochs of
AdamW (weight decay 0.05, cosine, batches of 64), with no crops or flips. Five more images of each class choose
penalties and temperatures, and twenty more the learning rate: with the first seed each method climbs from 1e-3 by
factors of two to the rate whose neighbours are both worse, which the other seeds take. A seed draws the images, their
order and what starts at random.

MOSAICS is a folder with the files that mosaics.py tells of, LITE0.pth the file that pretrained.py tells of. A line of
JSON for each run goes to experiments/results/finetune.jsonl as it ends; runs that are there are not made again. A run
takes a minute and a half on one core.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cifar100  # puts examples/ on the path
import numpy as np
import torch
import train
from _data import Split, select
from mosaics import read_mosaics
from penalised import Probe, fit_probe
from pretrained import NAME, features_of, load_pretrained
from scipy.optimize import brentq
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import hyperproto

RESULTS = cifar100.HERE / "results" / "finetune.jsonl"
NUM_CLASSES = 100

SEEDS = (0, 1, 2)

#: Images of each class: to train on, held out, to choose the learning rate by, of the test set.
TRAINED, HELD_OUT, JUDGES, TESTED = 45, 5, 20, 40

EPOCHS, BATCH_SIZE, FIRST_RATE, WEIGHT_DECAY = 4, 64, 1e-3, 0.05

#: How many of the backbone's stages are frozen.
FROZEN = 5

DIMS = (50, 25, 10)
WIDE = ("softmax, from zero", "softmax, from its penalised probe")
NARROW = (
    "cross-entropy, from class vectors",
    "two-factor softmax, from its penalised probe",
    "published pull, from class vectors",
    "published pull, from fit_head",
    "published pull, from refit_head",
)
#: A refit of the default bank comes to nothing in fewer.
LEAST_REFITTED = 25

#: Maps that reach the stages that train, or features, and their labels.
Samples = tuple[Tensor, Tensor]

#: Method and dimension.
Cell = tuple[str, int | None]


def cells() -> Iterator[list[Cell]]:
    """All methods and dimensions, those first that matter most."""
    for wide, narrow in ((WIDE[:1], NARROW[:2]), (WIDE[1:], NARROW[2:])):
        yield [*((method, None) for method in wide), *narrow_cells(narrow)]


def narrow_cells(methods: Iterable[str]) -> Iterator[Cell]:
    """Methods in all dimensions in which they are of use."""
    for dim in DIMS:
        for method in methods:
            if dim >= LEAST_REFITTED or not method.endswith("refit_head"):
                yield method, dim


def runs(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Method, dimension, seed and learning rate of each run that is missing; `lines` grows by its result meanwhile."""
    for group in cells():
        for seed in SEEDS:
            for cell in group:
                while (rate := missing_rate(cell, seed, lines)) is not None:
                    yield {"method": cell[0], "dim": cell[1], "seed": seed, "rate": rate}


def missing_rate(cell: Cell, seed: int, lines: Iterable[dict[str, Any]]) -> float | None:
    """The learning rate that a method is to be tried with next, in the light of all that was tried."""
    own = [line for line in lines if (line["method"], line["dim"]) == cell]
    if seed != SEEDS[0]:
        rate = best_rate(own)
        return None if any((line["seed"], line["rate"]) == (seed, rate) for line in own) else rate
    tried = {line["rate"] for line in own if line["seed"] == seed}
    wanted = (2 * best_rate(own), best_rate(own) / 2) if own else (FIRST_RATE,)
    return next((rate for rate in wanted if rate not in tried), None)


def best_rate(lines: Iterable[dict[str, Any]]) -> float:
    """The rate of one method with which the images that choose it were most often right, with the first seed."""
    return max((line for line in lines if line["seed"] == SEEDS[0]), key=lambda line: line["judged_top1"])["rate"]


def chosen(lines: Iterable[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """Of the lines of each method, those with its best rate."""
    found: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        found[line["method"], line["dim"]].append(line)
    return {cell: [line for line in own if line["rate"] == best_rate(own)] for cell, own in found.items()}


class Data:
    """The images of a seed, as the frozen stages leave them.

    Attributes:
        fit, held_out, judges, test: maps (N, C, H, W) that reach the stages that train, and labels (N,).
        features: of `fit` and `held_out`, as the whole pretrained backbone has them.
    """

    def __init__(self, splits: tuple[Split, Split], weights: Path, seed: int) -> None:
        generator = np.random.default_rng(seed)
        places = [generator.permutation(np.flatnonzero(splits[0].labels == label)) for label in range(NUM_CLASSES)]
        tested = [np.flatnonzero(splits[1].labels == label)[:TESTED] for label in range(NUM_CLASSES)]
        first, second, third = TRAINED, TRAINED + HELD_OUT, TRAINED + HELD_OUT + JUDGES
        kept = {
            "fit": select(splits[0], np.concatenate([own[:first] for own in places])),
            "held_out": select(splits[0], np.concatenate([own[first:second] for own in places])),
            "judges": select(splits[0], np.concatenate([own[second:third] for own in places])),
            "test": select(splits[1], np.concatenate(tested)),
        }
        frozen, tuned = load_stages(weights)
        maps = {
            part: (features_of(frozen, split.images), torch.from_numpy(split.labels)) for part, split in kept.items()
        }
        self.fit, self.held_out, self.judges, self.test = (maps[part] for part in kept)
        with torch.no_grad():
            self.features = {
                part: (torch.cat([tuned.eval()(batch) for batch in maps[part][0].split(100)]), maps[part][1])
                for part in ("fit", "held_out")
            }


def load_stages(weights: Path) -> tuple[nn.Module, nn.Module]:
    """The stages that are frozen, from images to maps, and the others, from maps to pooled features."""
    tuned = load_pretrained(NAME, weights, num_classes=0).to(memory_format=torch.channels_last)
    frozen = load_pretrained(NAME, weights, num_classes=0).to(memory_format=torch.channels_last)
    frozen.blocks, frozen.conv_head, frozen.bn2, frozen.global_pool = frozen.blocks[:FROZEN], *(nn.Identity(),) * 3
    tuned.conv_stem, tuned.bn1, tuned.blocks = nn.Identity(), nn.Identity(), tuned.blocks[FROZEN:]
    tuned._forward_pre_hooks.clear()
    return frozen, tuned


class TwoFactors(nn.Module):
    """Class vectors and a bias behind a bottleneck, without a normalisation."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.down = nn.Linear(probe.first.shape[1], probe.first.shape[0])
        self.up = nn.Linear(probe.first.shape[0], len(probe.second))
        self.load_state_dict(
            {
                "down.weight": probe.first,
                "down.bias": probe.offset,
                "up.weight": probe.second,
                "up.bias": probe.bias,
            }
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, C)."""
        return self.up(self.down(features))


def build(run: dict[str, Any], data: Data, tuned: nn.Module) -> tuple[nn.Module, Any, dict[str, Any]]:
    """What trains, its loss, and what there is to say of the start."""
    method, dim = run["method"], run["dim"]
    if method in WIDE:
        tuned.reset_classifier(NUM_CLASSES)
        probe = None if method == WIDE[0] else fit_probe(data.features, dim=None)
        with torch.no_grad():
            tuned.classifier.weight.copy_(torch.zeros(()) if probe is None else probe.second)
            tuned.classifier.bias.copy_(torch.zeros(()) if probe is None else probe.bias)
        return tuned, F.cross_entropy, {} if probe is None else {"penalty": probe.penalty}
    if method.startswith("two-factor"):
        probe = fit_probe(data.features, dim=dim)
        tuned.reset_classifier(NUM_CLASSES)
        tuned.classifier = TwoFactors(probe)
        return tuned, F.cross_entropy, {"penalty": probe.penalty}
    tuned.reset_classifier(NUM_CLASSES)
    hyperproto.convert_model(tuned, dim=dim, seed=run["seed"])
    loader = list(zip(data.fit[0].split(100), data.fit[1].split(100), strict=True))
    hyperproto.fit_head(tuned, loader, bank="class-vectors" if method.endswith("class vectors") else None)
    if method.endswith("refit_head"):
        hyperproto.refit_head(tuned, loader)
    assigner = hyperproto.DynamicAssigner(tuned)
    if method.startswith("cross-entropy"):
        criterion = hyperproto.PrototypeCrossEntropyLoss(assigner)
        return tuned, criterion, {"scale": criterion.scale}
    return tuned, hyperproto.BalancedLoss(assigner), {}


def train_run(run: dict[str, Any], data: Data, weights: Path) -> dict[str, Any]:
    """Train the last stages and the head; figures before and after."""
    train.seed_everything(run["seed"])
    started = time.perf_counter()
    model, criterion, told = build(run, data, load_stages(weights)[1])
    start_seconds = time.perf_counter() - started
    before = accuracy(*predict(model, data.test))
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY), run["rate"])
    maps, labels = data.fit
    num_steps, step, moved, history = EPOCHS * (len(labels) // BATCH_SIZE), 0, [], []
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(labels)).split(BATCH_SIZE):
            if len(chosen) < BATCH_SIZE:
                continue
            for group in optimizer.param_groups:
                group["lr"] = run["rate"] * (1.0 + math.cos(math.pi * (step + 0.5) / num_steps)) / 2.0
            batch = maps[chosen].contiguous(memory_format=torch.channels_last)
            loss = criterion(model(batch), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total, step = total + float(loss.detach()), step + 1
        history.append(round(total * EPOCHS / num_steps, 4))
        if isinstance(getattr(criterion, "assigner", None), hyperproto.DynamicAssigner):
            moved.append(criterion.assigner.step().changed)
    logits, labels = predict(model, data.test)
    held_out, counts = predict(model, data.held_out), torch.full((NUM_CLASSES,), TRAINED)
    figures = train.figures(logits, labels, counts, train.fit_temperature(*held_out))
    matched = train.figures(logits, labels, counts, matched_temperature(*held_out))
    return {
        **{key: figures[key] for key in ("top1", "top5", "calibration_error", "calibration_error_fitted")},
        "calibration_error_matched": matched["calibration_error_fitted"],
        "judged_top1": accuracy(*predict(model, data.judges)),
        "start_top1": before,
        **told,
        "loss": history,
        "moved": moved,
        "correct": np.packbits((logits.argmax(dim=1) == labels).numpy()).tobytes().hex(),
        "start_seconds": round(start_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def matched_temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of the logits with which mean confidence is accuracy."""
    right = float((logits.argmax(dim=1) == labels).double().mean())

    def excess(log_scale: float) -> float:
        return float((math.exp(log_scale) * logits.double()).softmax(dim=1).amax(dim=1).mean()) - right

    return math.exp(-brentq(excess, -7.0, 7.0))


@torch.no_grad()
def predict(model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,)."""
    model.eval()
    return torch.cat([model(batch) for batch in samples[0].split(100)]).float(), samples[1]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In per cent."""
    return 100.0 * float((logits.argmax(dim=1) == labels).double().mean())


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", metavar="MOSAICS", required=True, help="folders of the images")
    parser.add_argument("--weights", type=Path, metavar="LITE0.pth", required=True, help="file of the backbone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = arguments.results.read_text() if arguments.results.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    splits = read_mosaics(arguments.data)
    data: Data | None = None
    seed = None
    for run in runs(lines):
        if run["seed"] != seed:
            seed, data = run["seed"], Data(splits, arguments.weights, run["seed"])
        line = {**run, **train_run(run, data, arguments.weights)}
        lines.append(line)
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{run}: {line['start_top1']:.1f}, then {line['top1']:.1f} in {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
