"""Which scale of the cosines trains best, and at which learning rate: the grid behind the default.

    python experiments/scale.py scratch --data MOSAICS        # a minute a run on one core
    python experiments/scale.py frozen --features FEATURES.npz      # seconds a run

scratch    ResNet-8 from scratch, 100 images of each class of CIFAR-100, 5 epochs of one-cycle SGD
frozen     a head alone, on features of a pretrained backbone, 45 images of each class

Each trains `PrototypeCrossEntropyLoss` at a scale and a learning rate in D dimensions, and is measured on 100 held-out
*training* images of each class: no test image has a say in a default. The scale "default" is that of the library;
"learned" is one more parameter, which begins there and does not decay. A line of JSON for each run goes to
experiments/results/scale.jsonl as it ends; runs that are there are not made again.

MOSAICS is a folder with the files that mosaics.py tells of.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar100  # puts examples/ on the path
import numpy as np
import torch
import train
from _data import Loaders, Split, TensorLoader, pixel_statistics, select
from mosaics import read_mosaics
from torch import Tensor, nn
from torch.nn import functional as F

import hyperproto

RESULTS = cifar100.HERE / "results" / "scale.jsonl"
NUM_CLASSES = 100

#: Training images of each class, and as many that accuracy is measured on.
PER_CLASS = 100
PER_CLASS_FROZEN, EPOCHS_FROZEN = 45, 20

DIMS = (100, 50, 10)
SCALES = ("default", 4.0, 16.0, 9.1, 6.5, 1.0, 24.0, "learned")
#: Of SGD; like the scales, the most telling first.
RATES = (0.2, 0.4, 0.8, 0.1)

#: What is near the default from scratch, at its best rate, and more seeds of it: scale, rate, dimension.
NEAR = ((9.1, 0.2, 100), (16.0, 0.2, 100), ("learned", 0.1, 100), ("default", 0.1, 50), ("learned", 0.1, 50))
MORE_SEEDS = (1, 2)

FLAGS = (
    "--head dl2pa --refit 0 --model cifar_resnet8 --epochs 5 --precision bf16 --holdout 0 --device cpu "
    "--dim {dim} --lr {rate} --seed {seed}"
)


class LearnedScale(nn.Module):
    """`PrototypeCrossEntropyLoss` whose scale is a parameter."""

    def __init__(self, assigner: hyperproto.DynamicAssigner) -> None:
        super().__init__()
        self.assigner = assigner
        self.log_scale = nn.Parameter(assigner.head.logit_scale.log())

    @property
    def scale(self) -> float:
        """As learned so far."""
        return math.exp(float(self.log_scale.detach()))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        """(B, C) or (B, D), (B,) -> ()."""
        self.assigner.update(output, labels)
        return F.cross_entropy(self.log_scale.exp() * self.assigner.head.cosines_from_output(output), labels)


def runs(suite: str) -> Iterator[dict[str, Any]]:
    """Scale, rate, dimension and seed of each run, in order of worth."""
    for scale in SCALES:
        for rate in RATES:
            for dim in DIMS:
                if (scale, dim) != ("default", NUM_CLASSES):  # which is 9.1
                    yield {"suite": suite, "scale": scale, "rate": rate, "dim": dim, "seed": 0}
    for seed in MORE_SEEDS if suite == "scratch" else ():
        for scale, rate, dim in NEAR:
            yield {"suite": suite, "scale": scale, "rate": rate, "dim": dim, "seed": seed}


def scratch_loaders(data: Path) -> Loaders:
    """The first images of each class to train on, and the next ones to measure."""
    images, _ = read_mosaics([data])
    places = [np.flatnonzero(images.labels == label) for label in range(NUM_CLASSES)]
    parts = [
        select(images, np.concatenate([own[start : start + PER_CLASS] for own in places])) for start in (0, PER_CLASS)
    ]
    mean, std = pixel_statistics(parts[0].images)

    def make(split: Split, augment: bool) -> TensorLoader:
        return TensorLoader(split, 128, mean, std, torch.device("cpu"), augment_seed=0 if augment else None)

    return Loaders(make(parts[0], True), make(parts[0], False), None, make(parts[1], False), len(parts[0].labels))


def make_trainer(run: dict[str, Any], loaders: Loaders, scale: float | None = None) -> train.Trainer:
    """Train.py's network and schedule."""
    args = train.parse_arguments(["DATA", *FLAGS.format(**run).split()])
    args.scale = scale
    args.num_classes = NUM_CLASSES
    loaders.train.augment_seed = run["seed"]
    train.seed_everything(run["seed"])
    return train.Trainer(args, train.build_model(args), loaders, torch.device("cpu"))


def train_from_scratch(run: dict[str, Any], loaders: Loaders) -> dict[str, Any]:
    """What was reached by train.py's network and schedule."""
    trainer = make_trainer(run, loaders, given_scale(run))
    if run["scale"] == "learned":
        trainer.criterion = LearnedScale(trainer.assigner)
        trainer.optimizer.add_param_group({"params": trainer.criterion.parameters(), "weight_decay": 0.0})
    trainer.train()
    logits, labels = trainer.predict(trainer.model, loaders.test)
    losses, moved = ([entry[key] for entry in trainer.history] for key in ("loss", "moved"))
    return summary(logits, labels, losses, moved, trainer.criterion)


def frozen_loaders(features: Path) -> list[tuple[Tensor, Tensor]]:
    """Features and labels to train on, and to measure: of each class the first ones, and the next."""
    stored = np.load(features)
    rows, labels = torch.from_numpy(stored["x_train"]), torch.from_numpy(stored["y_train"])
    places = [torch.nonzero(labels == label).flatten() for label in range(NUM_CLASSES)]
    ranges = ((0, PER_CLASS_FROZEN), (PER_CLASS_FROZEN, PER_CLASS_FROZEN + PER_CLASS))
    parts = [torch.cat([own[slice(*ends)] for own in places]) for ends in ranges]
    return [(rows[chosen], labels[chosen]) for chosen in parts]


def train_head(run: dict[str, Any], samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One-cycle SGD of a head that starts from the data; what was reached."""
    (rows, labels), (held_out, truth) = samples
    args = train.parse_arguments(["DATA", *FLAGS.format(**run).split(), "--epochs", str(EPOCHS_FROZEN)])
    train.seed_everything(run["seed"])
    head = hyperproto.HypersphericalHead(rows.shape[1], NUM_CLASSES, dim=run["dim"], seed=run["seed"])
    hyperproto.fit_head(head, (rows, labels))
    assigner = hyperproto.DynamicAssigner(head)
    learns = run["scale"] == "learned"
    criterion: nn.Module = (
        LearnedScale(assigner) if learns else hyperproto.PrototypeCrossEntropyLoss(assigner, scale=given_scale(run))
    )
    optimizer = train.build_optimizer(args, head)
    if learns:
        optimizer.add_param_group({"params": criterion.log_scale, "weight_decay": 0.0})
    history, moved = train_on_features(head, assigner, criterion, optimizer, samples[0], args)
    return summary(head.eval()(held_out), truth, history, moved, criterion)


def train_on_features(
    head: nn.Module,
    assigner: hyperproto.DynamicAssigner,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> tuple[list[float], list[int]]:
    """Train a head on features (N, F) and labels (N,): of each epoch the mean loss, and how many labels moved."""
    rows, labels = samples
    history, moved, steps = [], [], len(labels) // args.batch_size
    for epoch in range(args.epochs):
        head.train()
        total = 0.0
        order = torch.randperm(len(labels))[: steps * args.batch_size].split(args.batch_size)
        for index, chosen in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(args, epoch + (index + 0.5) / steps)
            loss = criterion(head(rows[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        history.append(total / steps)
        moved.append(assigner.step().changed)
    return history, moved


def given_scale(run: dict[str, Any]) -> float | None:
    """What the criterion is told; None for the default."""
    return run["scale"] if isinstance(run["scale"], float) else None


def summary(
    logits: Tensor, labels: Tensor, losses: list[float], moved: list[int], criterion: nn.Module
) -> dict[str, Any]:
    """What a result line says of a run that is over."""
    return {
        "top1": round(100.0 * float((logits.argmax(dim=1) == labels).double().mean()), 2),
        "loss": [round(loss, 4) for loss in losses],
        "moved": moved,
        "used": round(criterion.scale, 4),
    }


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("scratch", "frozen"))
    parser.add_argument("--data", type=Path, help="folder of the mosaics")
    parser.add_argument("--features", type=Path, metavar="FEATURES.npz", help="file that pretrained.py writes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = [
        {key: result[key] for key in ("suite", "scale", "rate", "dim", "seed")} for result in map(json.loads, lines)
    ]
    if arguments.suite == "scratch":
        data, make = scratch_loaders(arguments.data), train_from_scratch
    else:
        data, make = frozen_loaders(arguments.features), train_head
    for run in runs(arguments.suite):
        if run in done:
            continue
        started = time.perf_counter()
        try:
            reached = make(run, data)
        except SystemExit:  # the loss is not finite
            reached = {"top1": 100.0 / NUM_CLASSES, "diverged": True}
        line = {**run, **reached, "seconds": round(time.perf_counter() - started, 1)}
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
