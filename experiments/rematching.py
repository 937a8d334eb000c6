"""What to do with prototypes once an epoch: the published matching, and two ways to let them follow the class means.

    python experiments/rematching.py frozen --features FEATURES.npz      # seconds a run
    python experiments/rematching.py scratch --data MOSAICS              # a minute a run on one core

The suites are those of scale.py, and like there held-out training images are what is measured. At the end of an epoch

static         nothing happens
matching       labels are matched to prototypes by the class means: `DynamicAssigner`
rotation       rotation of all prototypes and matching, in turn, until no label moves: their angles stay
class means    the prototypes become the unit class means: class-mean features (ICML 2024)

A line of JSON for each run goes to experiments/results/rematching.jsonl; runs that are there are not made again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar100  # puts examples/ on the path
import scale as grid
import torch
import train
from torch import Tensor, nn
from torch.nn import functional as F

import hyperproto

RESULTS = cifar100.HERE / "results" / "rematching.jsonl"
DIMS, SEEDS, RATE = (50, 10), (0, 1, 2), 0.2


class Static(hyperproto.DynamicAssigner):
    """Steps that change nothing."""

    @torch.no_grad()
    def step(self) -> hyperproto.AssignmentStep:
        """Take the batches' means, and leave the assignment."""
        kept = self.head.assignment.clone()
        record = super().step()
        self.head.assign_(kept)
        return record


class Rotation(hyperproto.DynamicAssigner):
    """Matching up to a rotation of all prototypes together."""

    @torch.no_grad()
    def step(self) -> hyperproto.AssignmentStep:
        """Rotate the prototypes, then match."""
        record = super().step()
        means, bank, assignment = self.class_means.double(), self.head.bank, self.head.assignment
        for _ in range(100):
            own = bank.prototypes.double()[assignment]
            left, _, right = torch.linalg.svd(own.T @ F.normalize(means, dim=1))
            rotated = F.normalize(bank.prototypes.double() @ (left @ right), dim=1).float()
            solution = hyperproto.functional.solve_assignment(self.class_means, rotated, current=assignment)
            bank.prototypes.copy_(rotated)
            if torch.equal(solution.assignment, assignment):
                break
            assignment = solution.assignment
        self.head.assign_(assignment)
        return record


class ClassMeans(Static):
    """The class means as prototypes."""

    @torch.no_grad()
    def step(self) -> hyperproto.AssignmentStep:
        """Put them into the bank."""
        record = super().step()
        self.head.bank.prototypes[self.head.assignment] = F.normalize(self.class_means, dim=1)
        return record


WAYS = {"matching": hyperproto.DynamicAssigner, "static": Static, "rotation": Rotation, "class means": ClassMeans}
LOSSES = {"cross-entropy": hyperproto.PrototypeCrossEntropyLoss, "pull": hyperproto.BalancedLoss}


def runs(suite: str) -> Iterator[dict[str, Any]]:
    """Way, loss, dimension and seed of each run."""
    for seed in SEEDS:
        for loss in LOSSES:
            for dim in DIMS:
                for way in WAYS:
                    yield {"suite": suite, "way": way, "loss": loss, "dim": dim, "rate": RATE, "seed": seed}


def train_from_scratch(run: dict[str, Any], loaders: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of what is measured."""
    trainer = grid.make_trainer(run, loaders)
    trainer.assigner = WAYS[run["way"]](trainer.model)
    trainer.criterion = LOSSES[run["loss"]](trainer.assigner)
    trainer.train()
    return trainer.predict(trainer.model, loaders.test)


def train_head(run: dict[str, Any], samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The same, of a fresh head on features."""
    (rows, _), (held_out, truth) = samples
    args = train.parse_arguments(["DATA", *grid.FLAGS.format(**run).split(), "--epochs", str(grid.EPOCHS_FROZEN)])
    train.seed_everything(run["seed"])
    head = hyperproto.HypersphericalHead(rows.shape[1], grid.NUM_CLASSES, dim=run["dim"], seed=run["seed"])
    assigner = WAYS[run["way"]](head)
    criterion: nn.Module = LOSSES[run["loss"]](assigner)
    grid.train_on_features(head, assigner, criterion, train.build_optimizer(args, head), samples[0], args)
    return head.eval()(held_out), truth


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("frozen", "scratch"))
    parser.add_argument("--data", type=Path, help="folder of the mosaics")
    parser.add_argument("--features", type=Path, metavar="FEATURES.npz", help="file that pretrained.py writes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keys = ("suite", "way", "loss", "dim", "rate", "seed")
    done = [{key: line[key] for key in keys} for line in cifar100.results_of("rematching")]
    if arguments.suite == "scratch":
        data, make = grid.scratch_loaders(arguments.data), train_from_scratch
    else:
        data, make = grid.frozen_loaders(arguments.features), train_head
    for run in runs(arguments.suite):
        if run in done:
            continue
        started = time.perf_counter()
        logits, labels = make(run, data)
        top1 = round(100.0 * float((logits.argmax(dim=1) == labels).double().mean()), 2)
        line = {**run, "top1": top1, "seconds": round(time.perf_counter() - started, 1)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
