"""Train an image classifier with fixed hyperspherical prototypes, or with softmax at the same bottleneck.

    python examples/train.py DATA --preset recipe --dim 50 --model cifar_resnet20 --epochs 20 --results results.jsonl
    python examples/train.py DATA --preset cifar100-balanced
    torchrun --nproc-per-node 8 -- examples/train.py DATA --preset imagenet

DATA is a folder of class folders (DATA/train/<class>/*, DATA/test/<class>/* or DATA/val/<class>/*), or where a data
set of torchvision or timm lies (`--dataset`). docs/training.md explains the presets and what a result line holds.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from _cifar_resnet import CifarResNet
from _data import (
    Loaders,
    Split,
    TensorLoader,
    TransformedImages,
    keep_long_tail,
    make_loaders,
    pixel_statistics,
    read_splits,
    save_atomically,
    seed_for,
)
from scipy.optimize import minimize_scalar
from timm.data import Mixup, create_loader, resolve_data_config
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

import hyperproto

#: What docs/results.md found to work, and published settings; flags given on the command line override them.
#: docs/training.md says where we differ from what was published.
PRESETS: dict[str, dict[str, Any]] = {
    "recipe": {
        "head": "dl2pa", "bank": "class-vectors", "assignment": "static", "projection": "linear+bn",
        "loss": "cross-entropy", "refit": 100, "optimizer": "sgd", "lr": 0.2, "schedule": "one-cycle",
    },
    "cifar100-balanced": {
        "model": "cifar_resnet32", "width": 16, "head": "dl2pa", "dim": 50, "projection": "linear", "bank": "uniform",
        "start": "random", "momentum": 0.95, "loss": "balanced", "reduction": "sum", "epochs": 250, "batch_size": 128,
        "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "schedule": "step", "milestones": [100, 200],
        "precision": "fp32",
    },
    "cifar100-lt": {
        "model": "cifar_resnet32", "width": 32, "head": "dl2pa", "dim": 128, "projection": "linear+bn",
        "bank": "uniform", "start": "random", "momentum": 0.95, "loss": "long-tail", "reduction": "mean",
        "imbalance": 0.01, "mixup": 1.0, "epochs": 200, "batch_size": 128, "optimizer": "sgd", "lr": 0.1,
        "weight_decay": 2e-4, "schedule": "step", "milestones": [160, 180], "warmup_epochs": 5.0, "precision": "fp32",
    },
    "imagenet": {
        "model": "resnet50", "head": "dl2pa", "dim": 512, "projection": "linear", "bank": "uniform", "start": "random",
        "momentum": 0.95, "loss": "balanced", "reduction": "sum", "image_size": 224, "epochs": 105, "batch_size": 128,
        "optimizer": "sgd", "lr": 0.5, "weight_decay": 2e-5, "schedule": "cosine", "warmup_epochs": 5.0,
        "precision": "fp16",
    },
}  # fmt: skip

#: Arguments that do not decide a result: where things lie, what it runs on, what the data say.
LOCAL_ARGUMENTS = (
    *("data", "output", "results", "cache", "resume", "quiet", "download", "device", "threads", "workers"),
    *("num_classes", "keep_checkpoints", "free_from"),
)

#: What softmax training makes no use of, and what it has in the place of fixed prototypes.
UNUSED_BY_SOFTMAX = ("scale", "momentum", "assign_every", "freeze_epoch")
SOFTMAX = {
    "head": "softmax",
    "loss": "cross-entropy",
    "bank": "random",
    "assignment": "static",
    "start": "none",
    "start_epoch": 0,
    "truncate": None,
    "refit": None,
}


# ---- arguments ------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and defaults behind the help of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.default not in (None, False, [], {}, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default else text


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="a setting of many flags; others override its own")

    data = parser.add_argument_group("data")
    data.add_argument("data", type=Path, help="folder of the data set")
    data.add_argument("--dataset", default="folder",
                      help="folder, cifar10, cifar100, svhn, stl10, or a name of timm's create_dataset, as hfds/NAME")
    data.add_argument("--download", action="store_true", help="let torchvision or timm fetch the data set")
    data.add_argument("--image-size", type=int,
                      help="random resized crops and flips to this size, by timm. Without it: images of one size up to "
                      "64 px, kept in memory, cropped from a black frame of 4 px and flipped")
    data.add_argument("--cache", type=Path, help="file that keeps the decoded images in memory from run to run")
    data.add_argument("--imbalance", type=float, default=1.0,
                      help="class c of C keeps the first n_max * imbalance ** (c / (C - 1)) training images")
    data.add_argument("--holdout", type=float, default=0.02,
                      help="share of each class's training images that only the temperature is fitted on; 0: none")
    data.add_argument("--workers", type=int, default=8, help="processes that load images, with --image-size")

    model = parser.add_argument_group("model and head")
    model.add_argument("--model", default="cifar_resnet20",
                       help="a name of timm, torchvision/NAME, or cifar_resnetN with N = 6 n + 2 (He et al. 2016)")
    model.add_argument("--width", type=int, default=16, help="channels of cifar_resnetN's first stage")
    model.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
                       help="more arguments of the model's constructor")
    model.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    model.add_argument("--head", choices=("softmax", "etf", "hpn", "dl2pa"), default="dl2pa",
                       help="class vectors that train, a fixed simplex, fixed HPN prototypes, or any bank, assigned")
    model.add_argument("--dim", type=int,
                       help="of the embeddings; for softmax that of a bottleneck (default: none); "
                       "default for etf: the number of classes, else the width of the features")
    model.add_argument("--projection", choices=("none", "linear", "linear+bn"), default="linear+bn",
                       help="from features to embeddings or bottleneck")
    model.add_argument("--bank", help="method of hyperproto.PrototypeBank, for dl2pa; or class-vectors: made from free "
                       "class vectors at --start-epoch (default: auto)")
    model.add_argument("--assignment", choices=("static", "dynamic"), help="for dl2pa (default: dynamic)")
    model.add_argument("--assign-every", type=float, default=1.0, help="epochs between assignment steps; may be < 1")
    model.add_argument("--freeze-epoch", type=int, help="no assignment steps from this epoch on")
    model.add_argument("--momentum", type=optional_float, default=0.9,
                       help="of the class means; none: plain means since the last assignment step")
    model.add_argument("--start", choices=("none", "random", "data"), default="none",
                       help="first assignment: in order, at random, or (with the projection) by hyperproto.fit_head")
    model.add_argument("--start-epoch", type=int,
                       help="with --start data or --bank class-vectors: train free class vectors until this epoch, "
                       "in as many dimensions as there are classes; with as many as --epochs the closed form is the "
                       "end of training (default: 0, for class-vectors the end)")
    model.add_argument("--refit", type=int,
                       help="after the last epoch: iterations of L-BFGS that fit the projection (for softmax: and the "
                       "class vectors) to the features of the training images as they are, without crops and flips, "
                       "all classes alike")
    model.add_argument("--truncate", type=int,
                       help="for softmax: leave no more than so many dimensions of the logits after the last epoch")
    model.add_argument("--loss", choices=("balanced", "long-tail", "cross-entropy"),
                       default="cross-entropy", help="squared pull, dot regression, or over the cosines")
    model.add_argument("--reduction", choices=("mean", "sum"), default="mean", help="of the loss over a batch")
    model.add_argument("--scale", type=float, default=16.0, help="of the cosines in --loss cross-entropy")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    training.add_argument("--batch-size", type=int, default=128, help="of each process")
    training.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="what takes the steps")
    training.add_argument("--lr", type=float, default=0.1, help="the largest learning rate")
    training.add_argument("--sgd-momentum", type=float, default=0.9, help="of the gradients")
    training.add_argument("--nesterov", action="store_true", help="for sgd")
    training.add_argument("--weight-decay", type=float, default=5e-4,
                          help="of all parameters; adamw spares biases and norm layers")
    training.add_argument("--schedule", choices=("step", "cosine", "one-cycle"), default="one-cycle",
                          help="of the learning rate")
    training.add_argument("--milestones", type=int, nargs="*", default=[], help="epochs from which lr is a tenth")
    training.add_argument("--warmup-epochs", type=float, help="default: 0, for one-cycle 30 %% of all epochs")
    training.add_argument("--label-smoothing", type=float, default=0.0, help="of a cross-entropy loss")
    training.add_argument("--mixup", type=float, default=0.0, help="alpha; 0: none")
    training.add_argument("--ema", type=float, help="decay of an average of the weights, which is then evaluated")
    training.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                          help="of the backbone; auto: bf16 on a GPU that has it, else fp32. CPUs without AVX-512 or "
                          "AMX compute many times slower in bf16")
    training.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True,
                          help="memory format of images and convolutions")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    training.add_argument("--threads", type=int, help="CPU threads of each process")
    training.add_argument("--seed", type=int, default=0, help="of all that is drawn, but for the held-out images")

    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, help="folder for checkpoint, log, final weights and result")
    files.add_argument("--resume", action="store_true", help="go on where the run in --output stopped, if there is one")
    files.add_argument("--keep-checkpoints", action="store_true",
                       help="keep that of each epoch N in --output as epochN.pt")
    files.add_argument("--free-from", type=Path,
                       help="epochN.pt of a softmax run that did the same as this one until --start-epoch N or, with "
                       "--truncate and --refit of softmax, until the end: go on from there, without doing it again")
    files.add_argument("--results", type=Path, help="append the result as one line of JSON to this file")
    files.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
# fmt: on


def optional_float(text: str) -> float | None:
    """A number, or None for "none"."""
    return None if text == "none" else float(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the preset over the defaults, checked, with what depends on the head filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.preset:
        preset = dict(PRESETS[args.preset])
        # What belongs to the preset's own head does not carry over to another one.
        foreign = () if args.head == "dl2pa" else ("bank", "start", "assignment")
        for key in (*foreign, "loss", "reduction") if args.head == "softmax" else foreign:
            preset.pop(key, None)
        parser.set_defaults(**preset)
        args = parser.parse_args(argv)
    softmax = args.head == "softmax"
    from_vectors = args.bank == "class-vectors"
    if args.start_epoch is None:
        args.start_epoch = args.epochs if from_vectors else 0
    checks = {
        "--head softmax trains with --loss cross-entropy": softmax and args.loss != "cross-entropy",
        "--head softmax has no --start": softmax and args.start != "none",
        "--bank and --assignment are for --head dl2pa": args.head != "dl2pa" and (args.bank or args.assignment),
        "--label-smoothing is for --loss cross-entropy": args.label_smoothing and args.loss != "cross-entropy",
        "--imbalance must lie in (0, 1]": not 0.0 < args.imbalance <= 1.0,
        "--holdout must lie in [0, 1)": not 0.0 <= args.holdout < 1.0,
        "--start-epoch is for --start data and --bank class-vectors": args.start_epoch
        and args.start != "data"
        and not from_vectors,
        "--bank class-vectors needs a --start-epoch of at least 1": from_vectors and args.start_epoch < 1,
        "--bank class-vectors has no --start": from_vectors and args.start != "none",
        "--bank class-vectors needs a --dim": from_vectors and args.dim is None,
        "--bank class-vectors needs --projection linear+bn": from_vectors and args.projection != "linear+bn",
        "--truncate is for --head softmax with at least so large a --dim": args.truncate is not None
        and not (softmax and 1 <= args.truncate <= (args.dim or 0)),
        "--refit must be at least 1, with a --projection, for softmax with a --dim and no --truncate": args.refit
        is not None
        and (args.refit < 1 or args.projection == "none" or (softmax and (args.dim is None or args.truncate))),
        "--free-from is for --start-epoch, or for softmax with --truncate or --refit": args.free_from
        and not (args.start_epoch or (softmax and (args.truncate or args.refit))),
        "--start-epoch needs a --projection": args.start_epoch and args.projection == "none",
        "--start-epoch must not lie behind the last epoch": args.start_epoch > args.epochs,
        "--ema averages nothing that --start-epoch leaves": args.ema and args.start_epoch == args.epochs,
        "--mixup needs an even --batch-size": args.mixup and args.batch_size % 2,
        "--pretrained is for models of timm": args.pretrained and args.model.startswith(("cifar_", "torchvision/")),
        "--cache is for images in memory, without --image-size": args.cache and args.image_size,
        "--resume needs --output, the folder of the run": args.resume and args.output is None,
    }
    for message, wrong in checks.items():
        if wrong:
            parser.error(message)
    args.bank = {"softmax": "random", "etf": "simplex", "hpn": "hpn"}.get(args.head, args.bank or "auto")
    args.assignment = args.assignment or ("dynamic" if args.head == "dl2pa" else "static")
    if args.warmup_epochs is None:
        args.warmup_epochs = 0.3 * args.epochs if args.schedule == "one-cycle" else 0.0
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.precision == "auto":
        args.precision = "bf16" if args.device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return args


# ---- processes and randomness ---------------------------------------------------------------------------------------


def rank() -> int:
    """Of this process among those that torchrun started; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(name: str) -> torch.device:
    """The device of this process; joins the others if torchrun started it."""
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def seed_everything(*entropy: int) -> None:
    """Seed all generators from a few numbers.

    Called for each epoch with its number, so that a resumed run draws what the undisturbed one would have drawn.
    """
    seed = seed_for(*entropy)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# ---- model ----------------------------------------------------------------------------------------------------------


class FreeClassVectors(nn.Module):
    """Class vectors that train, behind a projection like that of a hyperspherical head: softmax with a bottleneck."""

    def __init__(self, in_features: int, num_classes: int, dim: int, projection: str, seed: int) -> None:
        super().__init__()
        like = hyperproto.HypersphericalHead(
            in_features, num_classes, dim=dim, bank="random", projection=projection, seed=seed
        )
        self.projection = like.projection
        self.vectors = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B, C), or pooled maps (B, in_features, 1, 1) -> (B, C, 1, 1)."""
        logits = self.vectors(self.projection(features.flatten(1)))
        return logits.view(*logits.shape, *features.shape[2:])


def free_dim(args: argparse.Namespace, num_classes: int) -> int | None:
    """In how many dimensions free class vectors train: those of the softmax head, else C.

    They train better in so many, whatever the dimension of the prototypes that take their place.
    """
    return args.dim if args.head == "softmax" else num_classes


@torch.no_grad()
def linear_layer(free: FreeClassVectors, head: hyperproto.HypersphericalHead) -> nn.Linear:
    """What free class vectors and their projection are together in eval mode."""
    free.eval()
    layer = nn.Linear(head.in_features, head.num_classes).to(free.vectors.weight.device)
    layer.bias.copy_(free(torch.zeros_like(layer.weight[:1]))[0])
    layer.weight.copy_((free(torch.eye(head.in_features, device=layer.weight.device)) - layer.bias).T)
    return layer


def principal_components(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (N, C): mean (C,), deviations (C,) along the principal directions, these as columns (C, C).

    The direction with the largest standard deviation is the first.
    """
    logits = logits.double()
    variances, directions = torch.linalg.eigh(torch.cov(logits.T))
    return logits.mean(dim=0), variances.flip(0).clamp(min=0.0).sqrt(), directions.flip(1)


def check_one_linear_classifier(classifiers: list[nn.Module], name: str) -> None:
    """Stop if `--bank class-vectors` cannot take the model of this name, which has these classifiers."""
    if len(classifiers) > 1 or not isinstance(classifiers[0], nn.Linear):
        sys.exit(f"--bank class-vectors is for models with one classifier, an nn.Linear; {name} has another.")


@torch.no_grad()
def keep_function_in_training(
    model: nn.Module, batch_norm: nn.Module, loader: Any, to_device: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Give a batch norm the statistics of the training images, and scale and shift that make up for the change.

    In eval mode nothing changes, and train mode, which normalises by each batch, comes to do about the same.
    """
    count, total, squares = 0, 0.0, 0.0

    def gather(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal count, total, squares
        values = inputs[0].cpu().double()
        count, total, squares = count + len(values), total + values.sum(dim=0), squares + values.square().sum(dim=0)

    model.eval()
    hook = batch_norm.register_forward_pre_hook(gather)
    for images, labels in loader:
        model(to_device(images, labels)[0])
    hook.remove()
    mean = (total / count).to(batch_norm.running_mean)
    variance = (squares / count - (total / count).square()).to(batch_norm.running_var)
    factor = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
    batch_norm.bias += factor * (mean - batch_norm.running_mean)
    batch_norm.weight.copy_(factor * (variance + batch_norm.eps).sqrt())
    batch_norm.running_mean.copy_(mean)
    batch_norm.running_var.copy_(variance)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The network with its own linear classifier, its weights drawn from the global generator."""
    family, _, name = args.model.rpartition("/")
    if args.model.startswith("cifar_resnet"):
        return CifarResNet(int(args.model.removeprefix("cifar_resnet")), args.num_classes, args.width)
    if family == "torchvision":
        return torchvision.models.get_model(name, num_classes=args.num_classes, **args.model_kwargs)
    return timm.create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes, **args.model_kwargs)


def build_loaders(
    args: argparse.Namespace, train: Split, test: Split, model: nn.Module, device: torch.device
) -> Loaders:
    """Loaders of images in memory, or with `--image-size` timm's, normalised as the model was trained."""
    if args.image_size is None:
        mean, std = pixel_statistics(train.images)

        def make(split: Split, augment: bool) -> Any:
            augmentation = {"augment_seed": args.seed, "rank": rank(), "world_size": world_size()} if augment else {}
            return TensorLoader(split, args.batch_size, mean, std, device, **augmentation)

    else:
        config = resolve_data_config({"input_size": (3, args.image_size, args.image_size)}, model=model)
        on_cuda = device.type == "cuda"

        def make(split: Split, augment: bool) -> Any:
            return create_loader(
                TransformedImages(split.images),
                batch_size=args.batch_size,
                is_training=augment,
                color_jitter=0.0,
                distributed=augment and world_size() > 1,
                num_workers=args.workers,
                # The workers of each epoch are seeded by that epoch.
                persistent_workers=False,
                use_prefetcher=on_cuda,
                pin_memory=on_cuda,
                device=device,
                **{key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
            )

    return make_loaders(train, test, args.holdout, make, rank=rank(), world_size=world_size())


def build_criterion(args: argparse.Namespace, source: nn.Module) -> nn.Module:
    """The loss of fixed prototypes; `source` is an assigner, which it feeds, or the model."""
    if args.loss == "balanced":
        return hyperproto.BalancedLoss(source, reduction=args.reduction)
    if args.loss == "long-tail":
        return hyperproto.LongTailLoss(source, reduction=args.reduction)
    return hyperproto.PrototypeCrossEntropyLoss(
        source, scale=args.scale, label_smoothing=args.label_smoothing, reduction=args.reduction
    )


# ---- training -------------------------------------------------------------------------------------------------------


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SGD, or AdamW without weight decay on biases and norm layers."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), args.lr)
    return torch.optim.SGD(
        model.parameters(), args.lr, args.sgd_momentum, weight_decay=args.weight_decay, nesterov=args.nesterov
    )


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """Learning rate at a time in epochs; a function of nothing else, so that there is no state to resume."""
    if epoch < args.warmup_epochs:
        progress = epoch / args.warmup_epochs
        if args.schedule != "one-cycle":
            return args.lr * progress
        return args.lr * (0.04 + 0.96 * (1.0 - math.cos(math.pi * progress)) / 2.0)
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1.0 + math.cos(math.pi * progress)) / 2.0


def class_mean_loss(
    head: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Mean over the classes of the mean over a class's samples, of a loss without reduction; leaves its gradients."""
    optimizer.zero_grad()
    counts = torch.cat([labels for _, labels in batches]).bincount()
    weights, total = 1.0 / (counts * counts.count_nonzero()), torch.zeros((), device=counts.device)
    for features, labels in batches:
        loss = (criterion(head(features).flatten(1), labels) * weights[labels]).sum()
        loss.backward()
        total += loss.detach()
    return total


class Trainer:
    """A model and all that trains it.

    Attributes:
        heads: the hyperspherical heads, whether they are in the model or wait until `start_from_data`.
        free: whether free class vectors train in their places.
        history: what each epoch did.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, loaders: Loaders, device: torch.device) -> None:
        self.args, self.model, self.loaders, self.device = args, model, loaders, device
        self.history: list[dict[str, Any]] = []
        self.mixup = Mixup(args.mixup, label_smoothing=0.0, num_classes=args.num_classes) if args.mixup else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.heads: dict[str, hyperproto.HypersphericalHead] = {}
        if args.head != "softmax" or args.dim is not None:
            dim = args.num_classes if args.head == "etf" and args.dim is None else args.dim
            # Prototypes made of class vectors come when these have trained; others hold their place.
            bank = "random" if args.bank == "class-vectors" else args.bank
            modules = dict(model.named_modules())
            hyperproto.convert_model(model, dim=dim, bank=bank, projection=args.projection, seed=args.seed)
            self.heads = hyperproto.get_heads(model)
            if args.bank == "class-vectors":
                check_one_linear_classifier([modules[name] for name in self.heads], args.model)
        if args.start == "random":
            order = torch.randperm(args.num_classes, generator=torch.Generator().manual_seed(args.seed))
            for head in self.heads.values():
                head.assign_(order)
        self.free = bool(self.heads) and (args.head == "softmax" or args.start_epoch > 0)
        if self.free:
            dim = free_dim(args, args.num_classes)
            for index, (name, head) in enumerate(self.heads.items()):
                free = FreeClassVectors(head.in_features, head.num_classes, dim, args.projection, args.seed + index)
                model.set_submodule(name, free)
        model.to(device, memory_format=memory_format(args))
        self._build()

    def _build(self) -> None:
        """Make what depends on which parameters the model has."""
        args, model = self.args, self.model
        self.assigner: hyperproto.DynamicAssigner | None = None
        if args.head == "softmax" or self.free:
            self.criterion: nn.Module = nn.CrossEntropyLoss(
                label_smoothing=args.label_smoothing, reduction=args.reduction
            )
        else:
            if args.assignment == "dynamic":
                self.assigner = hyperproto.DynamicAssigner(model, momentum=args.momentum)
            self.criterion = build_criterion(args, self.assigner or model)
        self.optimizer = build_optimizer(args, model)
        self.ema = ModelEmaV3(model, decay=args.ema) if args.ema else None
        self.forward: nn.Module = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
        if args.compile:
            self.forward = torch.compile(self.forward)

    def autocast(self) -> AbstractContextManager[Any]:
        """Lower precision, where chosen."""
        dtype = torch.float16 if self.args.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.args.precision != "fp32")

    def end_free_phase(self) -> None:
        """Put the heads in the place of the free class vectors.

        The optimiser's state of the backbone carries on. The average of weights starts anew: one over free class
        vectors and fixed prototypes would be neither.
        """
        for name, head in self.heads.items():
            self.model.set_submodule(name, head.to(self.device))
        self.free = False
        before = self.optimizer.state
        self._build()
        of_heads = {parameter for head in self.heads.values() for parameter in head.parameters()}
        for parameter in self.model.parameters():
            if parameter in before and parameter not in of_heads:
                self.optimizer.state[parameter] = before[parameter]

    def end_of_free_training(self) -> dict[str, float]:
        """What comes at `--start-epoch`, if anything; what a fit to the data reached."""
        if self.args.start == "data":
            return self.start_from_data()
        if self.args.bank == "class-vectors":
            self.start_from_vectors()
        return {}

    def start_from_vectors(self) -> None:
        """Fix prototypes made from the free class vectors, which end here, without changing what is predicted.

        Their leading directions are those of the logits over the training images, so that D dimensions hold the
        classifier as it is used; the directions of its weights may be such as no image tells apart.
        """
        [(name, head)] = self.heads.items()
        _, deviations, directions = principal_components(self.predict(self.model, self.loaders.fit)[0])
        bank = hyperproto.PrototypeBank.from_class_vectors(directions * deviations, self.args.dim)
        classifier = linear_layer(self.model.get_submodule(name), head)
        self.take_prototypes(classifier, bank, warm_start=True)
        keep_function_in_training(self.model, self.heads[name].projection[1], self.loaders.fit, self.to_device)
        self.end_free_phase()

    def take_prototypes(self, classifier: nn.Linear, bank: hyperproto.PrototypeBank, *, warm_start: bool) -> None:
        """Convert the model anew, with these prototypes, from this classifier in the place of free class vectors."""
        [name] = self.heads
        self.model.set_submodule(name, classifier)
        hyperproto.convert_model(
            self.model,
            bank=bank,
            classifier=name,
            projection=self.args.projection,
            warm_start=warm_start,
            seed=self.args.seed,
        )
        self.heads = hyperproto.get_heads(self.model)

    def start_from_data(self) -> dict[str, float]:
        """Fit projection and assignment to the training images; what was reached. Free class vectors end here."""
        if self.free:
            self.end_free_phase()
        with self.autocast():
            fit = hyperproto.fit_head(self.model, self.loaders.fit)
        if self.ema is not None:
            self.ema.set(self.model)
        return {"start_accuracy": 100.0 * fit.accuracy, "start_similarity": fit.similarity}

    @torch.no_grad()
    def truncate(self, dim: int) -> None:
        """Keep the leading principal components of the training images' logits: the class vectors get rank `dim`.

        With the bias, which keeps the mean, this is what a bottleneck of that width could hold of the classifier.
        """
        model = self.evaluated_model()
        mean, _, directions = principal_components(self.predict(model, self.loaders.fit)[0])
        projector = directions[:, :dim] @ directions[:, :dim].T
        for name in self.heads:
            vectors = model.get_submodule(name).vectors
            bias = mean + projector @ (vectors.bias.cpu().double() - mean)
            vectors.weight.copy_(projector @ vectors.weight.cpu().double())
            vectors.bias.copy_(bias)

    def refit(self, iterations: int) -> None:
        """Fit what trains in each head by the loss, with the backbone as it is (Kang et al., ICLR 2020).

        Each class counts alike, however many images it has. L-BFGS needs no learning rate and draws nothing. The
        features of all training images stay in memory.
        """
        args, model = argparse.Namespace(**vars(self.args) | {"reduction": "none"}), self.evaluated_model()
        features: dict[nn.Module, list[Tensor]] = {model.get_submodule(name): [] for name in self.heads}
        hooks = [
            head.register_forward_pre_hook(lambda head, inputs: features[head].append(inputs[0].float()))
            for head in features
        ]
        _, labels = self.predict(model, self.loaders.fit)
        for hook in hooks:
            hook.remove()
        for head, kept in features.items():
            batches = list(zip(kept, labels.to(self.device).split([len(batch) for batch in kept]), strict=True))
            criterion = nn.CrossEntropyLoss(reduction="none") if self.free else build_criterion(args, head)
            parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
            optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")
            optimizer.step(partial(class_mean_loss, head, criterion, optimizer, batches))

    def train(self) -> None:
        """Train from where the history ends to the last epoch."""
        for epoch in range(len(self.history), self.args.epochs):
            seed_everything(self.args.seed, epoch, rank())
            started = time.perf_counter()
            start = self.end_of_free_training() if epoch == self.args.start_epoch else {}
            entry = {"epoch": epoch, **start, **self._train_epoch(epoch), "seconds": time.perf_counter() - started}
            self.history.append(entry)
            if rank() == 0:
                print("  ".join(f"{key} {value:.5g}" for key, value in entry.items()), flush=True)
                if self.args.output is not None:
                    self.save(self.args.output)
        if self.args.start_epoch == self.args.epochs:
            self.history[-1] |= self.end_of_free_training()
        if self.args.truncate is not None:
            self.truncate(self.args.truncate)
        if self.args.refit is not None:
            self.refit(self.args.refit)

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        args, loader = self.args, self.loaders.train
        set_epoch(loader, epoch)
        self.model.train()
        num_images, moved, total = 0, 0, torch.zeros((), device=self.device)
        interval = max(1, round(args.assign_every * len(loader)))
        assigning = self.assigner is not None and (args.freeze_epoch is None or epoch < args.freeze_epoch)
        hidden = rank() > 0 or args.quiet or not sys.stderr.isatty()
        for index, (images, labels) in enumerate(tqdm(loader, f"epoch {epoch}", leave=False, disable=hidden)):
            step = epoch * len(loader) + index
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(args, (step + 0.5) / len(loader))
            total += self._train_step(images, labels)
            num_images += len(labels)
            if assigning and (step + 1) % interval == 0:
                moved += self.assigner.step().changed
        if dist.is_initialized():
            dist.all_reduce(total)
        loss = float(total) / (len(loader) * world_size())
        if not math.isfinite(loss):
            sys.exit(f"the loss is {loss} in epoch {epoch}: lower --lr.")
        return {"loss": loss, "moved": moved, "images": num_images * world_size()}

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimiser; returns the loss () without its graph."""
        images, target = self.to_device(images, labels)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with self.autocast():
            output = self.forward(images)
        loss = self.criterion(output.float(), target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return loss.detach()

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where the model is, in the memory format that it likes."""
        images = images.to(self.device, non_blocking=True, memory_format=memory_format(self.args))
        return images, labels.to(self.device, non_blocking=True)

    def evaluated_model(self) -> nn.Module:
        """The average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    @torch.no_grad()
    def predict(self, model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
        """Logits (N, C) float32 and labels (N,) of a whole loader, on the CPU."""
        model.eval()
        logits, targets = [], []
        for images, labels in loader:
            with self.autocast():
                logits.append(model(self.to_device(images, labels)[0]).float().cpu())
            targets.append(labels.cpu())
        return torch.cat(logits), torch.cat(targets)

    def save(self, folder: Path) -> None:
        """Write the checkpoint and the log."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        checkpoint = state | {"arguments": described(self.args), "history": self.history}
        save_atomically(checkpoint, folder / "last.pt")
        if self.args.keep_checkpoints:
            save_atomically(checkpoint, folder / f"epoch{len(self.history)}.pt")
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in self.history))

    def resume(self, folder: Path) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        if not (folder / "last.pt").is_file():
            return
        state = torch.load(folder / "last.pt", map_location=self.device)
        check_same_run(described(self.args), state["arguments"], folder)
        self.history = state["history"]
        if self.args.head != "softmax" and self.free and len(self.history) > self.args.start_epoch:
            if self.args.bank == "class-vectors":
                [(name, head)] = self.heads.items()
                bank = hyperproto.PrototypeBank.from_tensor(state["model"][f"{name}.bank.prototypes"].cpu())
                self.take_prototypes(nn.Linear(head.in_features, head.num_classes), bank, warm_start=False)
            self.end_free_phase()
        self._load(state)

    def begin_from(self, path: Path) -> None:
        """Take the epochs with free class vectors from a softmax run."""
        state, args = torch.load(path, map_location=self.device), self.args
        expected = described(args) | SOFTMAX | {"dim": free_dim(args, args.num_classes)}
        for key in UNUSED_BY_SOFTMAX:
            expected[key] = state["arguments"][key]
        check_same_run(expected, state["arguments"], path)
        epochs = args.start_epoch or args.epochs
        if len(state["history"]) != epochs:
            sys.exit(f"expected {epochs} epochs in {path}, got {len(state['history'])}. --keep-checkpoints keeps each.")
        self.history = state["history"]
        self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        optional = {"assigner": self.assigner, "ema": self.ema}
        return parts | {name: part for name, part in optional.items() if part is not None}


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Of images and convolutions."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the loader, or its distributed sampler, which epoch's order to draw."""
    for part in (loader, getattr(loader, "sampler", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(trainer: Trainer, class_counts: Tensor) -> dict[str, Any]:
    """Figures on the test set; the temperature is fitted on the held-out training images."""
    model = trainer.evaluated_model()
    logits, labels = trainer.predict(model, trainer.loaders.test)
    temperature = None
    if trainer.loaders.holdout is not None:
        heads = list(hyperproto.get_heads(model).values())
        if heads:
            before = float(heads[0].logit_scale)
            with trainer.autocast():
                temperature = before / hyperproto.fit_logit_scale(model, trainer.loaders.holdout)
        else:
            temperature = fit_temperature(*trainer.predict(model, trainer.loaders.holdout))
    return figures(logits, labels, class_counts, temperature)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of the logits with the largest likelihood: what `fit_logit_scale` finds, for softmax."""
    logits = logits.double()

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    return math.exp(minimize_scalar(negative_log_likelihood, bounds=(-7.0, 7.0), method="bounded").x)


def figures(logits: Tensor, labels: Tensor, class_counts: Tensor, temperature: float | None) -> dict[str, Any]:
    """Accuracies and calibration errors in per cent; None where there is nothing to measure.

    Head, median and tail classes have more than 100, 20 to 100 and fewer than 20 training images. Logits divided by the
    temperature are adjusted by the log of their class's share of the training images (Menon et al., ICLR 2021), so that
    each class counts alike.
    """
    num_classes = logits.shape[1]
    hits = (logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]).double()
    correct = torch.bincount(labels, weights=hits[:, 0], minlength=num_classes)
    per_class = 100.0 * correct / torch.bincount(labels, minlength=num_classes)  # NaN where a class has no image
    groups = {
        "head_accuracy": class_counts > 100,
        "median_accuracy": (class_counts >= 20) & (class_counts <= 100),
        "tail_accuracy": class_counts < 20,
    }
    balanced = bool((class_counts == class_counts[0]).all())
    adjusted = logits / (temperature or 1.0) - class_counts.clamp(min=1).log()

    def calibration_error(temperature: float) -> float:
        probabilities = (logits / temperature).softmax(dim=1)
        return 100.0 * float(multiclass_calibration_error(probabilities, labels, num_classes, n_bins=15))

    return {
        "top1": 100.0 * float(hits[:, 0].mean()),
        "top5": 100.0 * float(hits.sum(dim=1).mean()),
        "top1_adjusted": None if balanced else 100.0 * float((adjusted.argmax(dim=1) == labels).double().mean()),
        "class_mean_accuracy": finite_mean(per_class),
        **{name: finite_mean(per_class[members]) for name, members in groups.items()},
        "calibration_error": calibration_error(1.0),
        "calibration_error_fitted": None if temperature is None else calibration_error(temperature),
        "temperature": temperature,
        "class_accuracy": [None if math.isnan(value) else round(value, 2) for value in per_class.tolist()],
    }


def finite_mean(values: Tensor) -> float | None:
    """Mean without NaN; None if nothing is left."""
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else None


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory of this process so far: the GPU's, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide a result."""
    return {key: value for key, value in vars(args).items() if key not in LOCAL_ARGUMENTS}


def summarise(trainer: Trainer, class_counts: Tensor) -> dict[str, Any]:
    """The result of a finished run; docs/training.md explains each entry."""
    history = trainer.history
    seconds = sum(entry["seconds"] for entry in history)
    start = next((entry for entry in history if "start_accuracy" in entry), {})
    return {
        **evaluate(trainer, class_counts),
        "loss": history[-1]["loss"],
        "moved": [entry["moved"] for entry in history],
        "start_accuracy": start.get("start_accuracy"),
        "start_similarity": start.get("start_similarity"),
        "seconds": round(seconds, 1),
        "images_per_second": round(sum(entry["images"] for entry in history) / seconds, 1),
        "peak_memory_mib": round(peak_memory_mib(trainer.device)),
        "data": trainer.args.data.resolve().name,
        "training_images": trainer.loaders.num_images,
        "arguments": described(trainer.args),
        "device": trainer.device.type,
        "processes": world_size(),
        "versions": {
            "hyperproto": hyperproto.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def check_same_run(expected: dict[str, Any], arguments: dict[str, Any], place: Path) -> None:
    """Stop if the run to go on with had other arguments than those that this one expects of it."""
    different = [key for key, value in expected.items() if arguments.get(key) != value]
    if different:
        sys.exit(f"the run in {place} has other arguments: {', '.join(different)}. Choose another one.")


def write_result(trainer: Trainer, result: dict[str, Any]) -> None:
    """Append the line to the results, leave it and the weights in the output folder, print what matters."""
    args, line = trainer.args, json.dumps(result) + "\n"
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(line)
    if args.output is not None:
        save_atomically(trainer.evaluated_model().state_dict(), args.output / "model.pt")
        (args.output / "result.json").write_text(line)
    shown = ("top1", "top5", "class_mean_accuracy", "calibration_error", "calibration_error_fitted", "seconds")
    print("  ".join(f"{key} {result[key]:.2f}" for key in shown if result[key] is not None))


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate once at the end, write the result."""
    args = parse_arguments(argv)
    finished = None if args.output is None else args.output / "result.json"
    if args.resume and finished.is_file():
        check_same_run(described(args), json.loads(finished.read_text())["arguments"], args.output)
        print(f"the run in {args.output} has finished")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    device = start_processes(args.device)
    seed_everything(args.seed)
    train, test = read_splits(
        args.dataset, args.data, download=args.download, decoded=args.image_size is None, cache=args.cache
    )
    if args.imbalance != 1.0:
        train = keep_long_tail(train, args.imbalance)
    class_counts = torch.bincount(torch.from_numpy(train.labels))
    args.num_classes = len(class_counts)
    model = build_model(args)
    loaders = build_loaders(args, train, test, model, device)
    if len(loaders.train) == 0:
        sys.exit(f"{loaders.num_images} training images are fewer than a batch of {args.batch_size * world_size()}.")
    trainer = Trainer(args, model, loaders, device)
    if args.resume:
        trainer.resume(args.output)
    elif finished is not None and rank() == 0:
        finished.unlink(missing_ok=True)
    if args.free_from and not trainer.history:
        trainer.begin_from(args.free_from)
    trainer.train()
    if rank() == 0:
        write_result(trainer, summarise(trainer, class_counts))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
