"""Train an image classifier with fixed hyperspherical prototypes, or with softmax at the same bottleneck.

    python examples/train.py DATA --final-dim 50 --results results.jsonl
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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from _cifar_resnet import CifarResNet
from _data import (
    TIMM_PREFIXES,
    TORCHVISION_DATASETS,
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
    select,
    split_holdout,
)
from _softmax import Batches, FreeClassVectors, compressed_softmax, fit_softmax, head_features
from scipy.optimize import minimize_scalar
from timm.data import Mixup, create_loader, resolve_data_config
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

import hyperproto

#: Published settings; flags given on the command line override them, and docs/training.md says where we differ. The
#: defaults are the recipe of docs/results_scratch.md.
PRESETS: dict[str, dict[str, Any]] = {
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
    *("num_classes", "keep_checkpoints", "epochs_from"),
)

#: What comes after the last epoch and so is no part of the training.
AFTER_TRAINING = ("refit", "final_dim", "final_bank")


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
                      help="folder, cifar10, cifar100, svhn, stl10, or a name of timm's create_dataset: hfds/NAME or "
                      "torch/NAME")
    data.add_argument("--test-split", metavar="NAME", help="of hfds/ and torch/ data sets (default: validation)")
    data.add_argument("--target-key", metavar="NAME", help="of the labels in an hfds/ data set (default: label)")
    data.add_argument("--download", action="store_true", help="let torchvision or timm fetch the data set")
    data.add_argument("--image-size", type=int,
                      help="random resized crops and flips to this size, by timm. Without it: images of one size up to "
                      "64 px, kept in memory, cropped from a black frame of 4 px and flipped")
    data.add_argument("--no-flip", action="store_const", const=True, help="do not mirror images, as for digits")
    data.add_argument("--cache", type=Path, help="file that keeps the decoded images in memory from run to run")
    data.add_argument("--imbalance", type=float, default=1.0,
                      help="class c of C keeps the first n_max * imbalance ** (c / (C - 1)) training images")
    data.add_argument("--holdout", type=float, default=0.02,
                      help="share of each class's training images that only the temperature is fitted on; 0: none")
    data.add_argument("--validation", type=float, metavar="SHARE",
                      help="so many of each class's training images take the place of the test set: to choose settings")
    data.add_argument("--workers", type=int, default=8, help="processes that load images, with --image-size")

    model = parser.add_argument_group("model and head")
    model.add_argument("--model", default="cifar_resnet20",
                       help="a name of timm, torchvision/NAME, or cifar_resnetN with N = 6 n + 2 (He et al. 2016)")
    model.add_argument("--width", type=int, default=16, help="channels of cifar_resnetN's first stage")
    model.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
                       help="more arguments of the model's constructor")
    model.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    model.add_argument("--head", choices=("softmax", "etf", "hpn", "dl2pa"), default="etf",
                       help="class vectors that train, a fixed simplex, fixed HPN prototypes, or any bank, assigned")
    model.add_argument("--dim", type=int,
                       help="of the embeddings; for softmax that of a bottleneck (default: none); "
                       "default for etf: the number of classes, else the width of the features")
    model.add_argument("--projection", choices=("none", "linear", "linear+bn"), default="linear+bn",
                       help="from features to embeddings or bottleneck")
    model.add_argument("--bank", type=method_or_file,
                       help="for dl2pa: method of hyperproto.PrototypeBank, or a .npy file of C x D numbers, one's own "
                       "prototypes (default: auto)")
    model.add_argument("--assignment", choices=("static", "dynamic"), help="for dl2pa (default: dynamic)")
    model.add_argument("--assign-every", type=float, default=1.0, help="epochs between assignment steps; may be < 1")
    model.add_argument("--freeze-epoch", type=int, help="no assignment steps from this epoch on")
    model.add_argument("--momentum", type=optional_float, default=0.9,
                       help="of the class means; none: plain means since the last assignment step")
    model.add_argument("--start", choices=("none", "random", "data"), default="none",
                       help="first assignment: in order, at random, or (with the projection) by hyperproto.fit_head")
    model.add_argument("--refit", type=int,
                       help="after the last epoch: iterations of L-BFGS that fit the projection (for softmax: and the "
                       "class vectors) to the features of the training images as they are, without crops and flips, "
                       "all classes alike; 0: none (default: 200 for prototypes with --loss cross-entropy, else none)")
    model.add_argument("--final-dim", type=int,
                       help="with --refit: dimension of a head that takes the place of the trained one after the last "
                       "epoch; its class vectors are fitted as well, and for prototypes fixed then")
    model.add_argument("--final-bank", type=method_or_file,
                       help="with --final-dim: its prototypes, as for --bank, or class-vectors (the default; "
                       "softmax stays softmax by default)")
    model.add_argument("--loss", choices=("balanced", "long-tail", "cross-entropy"),
                       default="cross-entropy", help="squared pull, dot regression, or over the cosines")
    model.add_argument("--reduction", choices=("mean", "sum"), default="mean", help="of the loss over a batch")
    model.add_argument("--scale", type=float,
                       help="of the cosines in --loss cross-entropy (default: hyperproto's own)")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    training.add_argument("--batch-size", type=int, default=128, help="of each process")
    training.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="what takes the steps")
    training.add_argument("--lr", type=float, help="the largest learning rate (default: 0.2 for sgd, 1e-3 for adamw)")
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
    files.add_argument("--epochs-from", type=Path,
                       help="last epochN.pt of a run that trained the same, whose epochs are not done again")
    files.add_argument("--results", type=Path, help="append the result as one line of JSON to this file")
    files.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
# fmt: on


def optional_float(text: str) -> float | None:
    """A number, or None for "none"."""
    return None if text == "none" else float(text)


def method_or_file(text: str) -> str | Path:
    """Where prototypes come from."""
    return Path(text) if text.endswith(".npy") else text


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
    refittable = args.loss == "cross-entropy" and args.projection != "none" and not args.label_smoothing
    if args.refit is None and refittable and not softmax:
        args.refit = 200
    args.refit = args.refit or None
    checks = {
        "--head softmax trains with --loss cross-entropy": softmax and args.loss != "cross-entropy",
        "--head softmax has no --start": softmax and args.start != "none",
        "--bank and --assignment are for --head dl2pa": args.head != "dl2pa" and (args.bank or args.assignment),
        "--label-smoothing is for --loss cross-entropy": args.label_smoothing and args.loss != "cross-entropy",
        "--dataset is folder, a name of torchvision's, or begins with hfds/ or torch/": args.dataset
        not in ("folder", *TORCHVISION_DATASETS)
        and not args.dataset.startswith(TIMM_PREFIXES),
        "--test-split is for hfds/ and torch/ data sets": args.test_split
        and not args.dataset.startswith(TIMM_PREFIXES),
        "--target-key is for hfds/ data sets": args.target_key and not args.dataset.startswith("hfds/"),
        "--imbalance must lie in (0, 1]": not 0.0 < args.imbalance <= 1.0,
        "--holdout must lie in [0, 1)": not 0.0 <= args.holdout < 1.0,
        "--validation must lie in (0, 1)": args.validation is not None and not 0.0 < args.validation < 1.0,
        "--refit must be at least 0, with a --projection, for softmax with a --dim": args.refit is not None
        and (args.refit < 1 or args.projection == "none" or (softmax and args.dim is None)),
        "--refit is for --loss cross-entropy, without --label-smoothing": args.refit is not None
        and (args.loss != "cross-entropy" or args.label_smoothing),
        "--final-dim needs --refit and --projection linear+bn": args.final_dim is not None
        and (args.refit is None or args.projection != "linear+bn"),
        "--final-bank needs --final-dim": args.final_bank and args.final_dim is None,
        "--final-bank class-vectors is for heads of fixed prototypes": softmax and args.final_bank == "class-vectors",
        "--mixup needs an even --batch-size": args.mixup and args.batch_size % 2,
        "--pretrained is for models of timm": args.pretrained and args.model.startswith(("cifar_", "torchvision/")),
        "--cache is for images in memory, without --image-size": args.cache and args.image_size,
        "--resume needs --output, the folder of the run": args.resume and args.output is None,
    }
    for message, wrong in checks.items():
        if wrong:
            parser.error(message)
    args.bank = {"softmax": "random", "etf": "simplex", "hpn": "hpn"}.get(args.head, args.bank or "auto")
    if args.final_dim is not None and not softmax:
        args.final_bank = args.final_bank or "class-vectors"
    if args.lr is None:
        args.lr = {"sgd": 0.2, "adamw": 1e-3}[args.optimizer]
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


def load_bank(bank: str | Path) -> str | hyperproto.PrototypeBank:
    """What hyperproto takes as bank: the method's name, or the prototypes of a file."""
    if isinstance(bank, str):
        return bank
    try:
        rows = np.load(bank)
    except (OSError, ValueError) as error:
        sys.exit(f"{bank}: expected a .npy file of C x D numbers, got: {error}")
    return hyperproto.PrototypeBank.from_tensor(torch.from_numpy(rows))


def check_final_head(args: argparse.Namespace, num_heads: int) -> None:
    """Stop if the model cannot get the final head, before all epochs are spent."""
    if args.final_dim is None:
        return
    if args.final_bank not in (None, "class-vectors"):
        hyperproto.HypersphericalHead(
            args.final_dim, args.num_classes, dim=args.final_dim, bank=load_bank(args.final_bank), seed=args.seed
        )
        return
    if not 2 <= args.final_dim <= args.num_classes:
        sys.exit(f"--final-dim of class vectors is from 2 to the number of classes, {args.num_classes}.")
    if args.final_bank and num_heads > 1:
        sys.exit(f"--final-bank class-vectors is for models with one classifier; {args.model} has {num_heads}.")


def build_model(args: argparse.Namespace) -> nn.Module:
    """The network with its own linear classifier, its weights drawn from the global generator."""
    family, _, name = args.model.rpartition("/")
    if args.model.startswith("cifar_resnet"):
        return CifarResNet(int(args.model.removeprefix("cifar_resnet")), args.num_classes, args.width)
    if family == "torchvision":
        return torchvision.models.get_model(name, num_classes=args.num_classes, **args.model_kwargs)
    return timm.create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes, **args.model_kwargs)


def read_data(args: argparse.Namespace) -> tuple[Split, Split]:
    """Training and test set; the first process of each machine fetches them before the others look."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    splits = read_splits(
        args.dataset,
        args.data,
        decoded=args.image_size is None,
        cache=args.cache,
        download=args.download and first,
        test_split=args.test_split,
        target_key=args.target_key,
    )
    if dist.is_initialized() and first:
        dist.barrier()
    return splits


def build_loaders(
    args: argparse.Namespace, train: Split, test: Split, model: nn.Module, device: torch.device
) -> Loaders:
    """Loaders of images in memory, or with `--image-size` timm's, normalised as the model was trained."""
    if args.image_size is None:
        mean, std = pixel_statistics(train.images)

        def make(split: Split, augment: bool) -> Any:
            augmentation = {"augment_seed": args.seed, "flip": not args.no_flip}
            augmentation |= {"rank": rank(), "world_size": world_size()}
            return TensorLoader(split, args.batch_size, mean, std, device, **augmentation if augment else {})

    else:
        config = resolve_data_config({"input_size": (3, args.image_size, args.image_size)}, model=model)
        on_cuda = device.type == "cuda"

        def make(split: Split, augment: bool) -> Any:
            return create_loader(
                TransformedImages(split.images),
                batch_size=args.batch_size,
                is_training=augment,
                color_jitter=0.0,
                hflip=0.0 if args.no_flip else 0.5,
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


class Trainer:
    """A model and all that trains it.

    Attributes:
        heads: dotted names of the layers in the place of the model's classifiers, if there are any.
        free: whether these are free class vectors behind a projection.
        history: what each epoch did.
        fit_seconds: what it took to fit the head after the last epoch.
        assign_interval: batches between assignment steps.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, loaders: Loaders, device: torch.device) -> None:
        self.args, self.model, self.loaders, self.device = args, model, loaders, device
        self.history: list[dict[str, Any]] = []
        self.fit_seconds = 0.0
        self.assign_interval = max(1, round(args.assign_every * len(loaders.train)))
        self.mixup = Mixup(args.mixup, label_smoothing=0.0, num_classes=args.num_classes) if args.mixup else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.heads: list[str] = []
        self.free = args.head == "softmax" and args.dim is not None
        if args.head != "softmax" or self.free:
            dim = args.num_classes if args.head == "etf" and args.dim is None else args.dim
            bank = load_bank(args.bank)
            hyperproto.convert_model(model, dim=dim, bank=bank, projection=args.projection, seed=args.seed)
            heads = hyperproto.get_heads(model)
            self.heads = list(heads)
            for name, head in heads.items():
                if args.start == "random":
                    order = torch.randperm(args.num_classes, generator=torch.Generator().manual_seed(args.seed))
                    head.assign_(order)
                if self.free:
                    model.set_submodule(name, FreeClassVectors(head))
        check_final_head(args, len(self.heads))
        model.to(device, memory_format=memory_format(args))
        self.assigner: hyperproto.DynamicAssigner | None = None
        if args.head == "softmax":
            self.criterion: nn.Module = nn.CrossEntropyLoss(
                label_smoothing=args.label_smoothing, reduction=args.reduction
            )
        else:
            if args.assignment == "dynamic":
                self.assigner = hyperproto.DynamicAssigner(model, momentum=args.momentum)
                self._check_checkpoints()
            self.criterion = build_criterion(args, self.assigner or model)
        self.optimizer = build_optimizer(args, model)
        self.ema = ModelEmaV3(model, decay=args.ema) if args.ema else None
        self.forward: nn.Module = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
        if args.compile:
            self.forward = torch.compile(self.forward)

    def _check_checkpoints(self) -> None:
        """Stop if checkpoints of the first process would not hold what the others know."""
        if self.args.output is not None and world_size() > 1 and len(self.loaders.train) % self.assign_interval:
            sys.exit(
                f"with several processes and --output an epoch of {len(self.loaders.train)} batches has to end with an "
                f"assignment step, got one every {self.assign_interval}: between two of them each process has class "
                "means of its own. Choose --assign-every 1."
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Lower precision, where chosen."""
        dtype = torch.float16 if self.args.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.args.precision != "fp32")

    def start_from_data(self) -> dict[str, float]:
        """Fit projection and assignment to the training images; what was reached."""
        with self.autocast():
            fit = hyperproto.fit_head(self.model, self.loaders.fit)
        if self.ema is not None:
            self.ema.set(self.model)
        return {"start_accuracy": 100.0 * fit.accuracy, "start_similarity": fit.similarity}

    def refit(self) -> None:
        """Fit what trains in each head to the features of the finished backbone, each class counting alike."""
        args, model = self.args, self.evaluated_model()
        if self.free:
            for name, batches in self.features().items():
                fit_softmax(model.get_submodule(name), batches, args.refit)
        else:
            with self.autocast():
                hyperproto.refit_head(model, self.loaders.fit, **self.refit_options())

    def refit_options(self) -> dict[str, Any]:
        """What hyperproto's fits are told; without `--scale` they choose theirs."""
        scale = {} if self.args.scale is None else {"scale": self.args.scale}
        return {"iterations": self.args.refit, **scale}

    def fit_final_head(self) -> None:
        """Put heads of `--final-dim` dimensions in the places of the trained ones."""
        args, model = self.args, self.evaluated_model()
        if args.final_bank is None:
            for name, batches in self.features().items():
                head = compressed_softmax(model.get_submodule(name), batches, args.final_dim)
                fit_softmax(head, batches, args.refit)
                model.set_submodule(name, head)
            return
        with self.autocast():
            if args.final_bank == "class-vectors":
                hyperproto.compress_head(model, self.loaders.fit, dim=args.final_dim, **self.refit_options())
            else:
                hyperproto.restore_model(model)
                bank = load_bank(args.final_bank)
                hyperproto.convert_model(
                    model, dim=args.final_dim, bank=bank, projection=args.projection, seed=args.seed
                )
                hyperproto.fit_head(model, self.loaders.fit)
                hyperproto.refit_head(model, self.loaders.fit, **self.refit_options())

    def features(self) -> dict[str, Batches]:
        """What reaches each head of free class vectors from the training images as they are, with labels."""
        model = self.evaluated_model()
        return head_features(model, self.heads, lambda: self.predict(model, self.loaders.fit))

    def train(self) -> None:
        """Train from where the history ends to the last epoch, and fit the head at the end."""
        for epoch in range(len(self.history), self.args.epochs):
            seed_everything(self.args.seed, epoch, rank())
            started = time.perf_counter()
            start = self.start_from_data() if epoch == 0 and self.args.start == "data" else {}
            entry = {"epoch": epoch, **start, **self._train_epoch(epoch), "seconds": time.perf_counter() - started}
            self.history.append(entry)
            if rank() == 0:
                print("  ".join(f"{key} {value:.5g}" for key, value in entry.items()), flush=True)
                if self.args.output is not None:
                    self.save(self.args.output)
        if isinstance(self.criterion, hyperproto.PrototypeCrossEntropyLoss):
            # Probabilities are those that the loss saw.
            for head in hyperproto.get_heads(self.evaluated_model()).values():
                head.logit_scale.fill_(self.criterion.scale)
        started = time.perf_counter()
        if self.args.final_dim is not None:
            self.fit_final_head()
        elif self.args.refit is not None:
            self.refit()
        self.fit_seconds = time.perf_counter() - started

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        args, loader = self.args, self.loaders.train
        set_epoch(loader, epoch)
        self.model.train()
        num_images, moved, total = 0, 0, torch.zeros((), device=self.device)
        assigning = self.assigner is not None and (args.freeze_epoch is None or epoch < args.freeze_epoch)
        hidden = rank() > 0 or args.quiet or not sys.stderr.isatty()
        for index, (images, labels) in enumerate(tqdm(loader, f"epoch {epoch}", leave=False, disable=hidden)):
            step = epoch * len(loader) + index
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(args, (step + 0.5) / len(loader))
            total += self._train_step(images, labels)
            num_images += len(labels)
            if assigning and (step + 1) % self.assign_interval == 0:
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
        if not isinstance(output, Tensor):
            sys.exit(
                f"{self.args.model} returns {type(output).__name__} in training, not one tensor of logits. "
                "For torchvision's auxiliary classifiers pass --model-kwargs aux_logits=False."
            )
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
        self._load(state)

    def begin_from(self, path: Path) -> None:
        """Take all epochs from a run that trained the same."""
        state = torch.load(path, map_location=self.device)
        check_same_run(training_of(described(self.args)), state["arguments"], path)
        if len(state["history"]) != self.args.epochs:
            sys.exit(
                f"expected {self.args.epochs} epochs in {path}, got {len(state['history'])}. "
                "--keep-checkpoints keeps each."
            )
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
                temperature = before / hyperproto.fit_logit_scale(model, trainer.loaders.holdout, match="likelihood")
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
    """The arguments that decide a result, of files the names."""
    arguments = {key: value for key, value in vars(args).items() if key not in LOCAL_ARGUMENTS}
    return {key: value.name if isinstance(value, Path) else value for key, value in arguments.items()}


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
        "fit_seconds": round(trainer.fit_seconds, 1),
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


def training_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arguments, those that decide its training."""
    return {key: value for key, value in arguments.items() if key not in AFTER_TRAINING}


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
    train, test = read_data(args)
    if args.validation:
        kept, chosen = split_holdout(train.labels, args.validation)
        train, test = select(train, kept), select(train, chosen)
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
    if args.epochs_from and not trainer.history:
        trainer.begin_from(args.epochs_from)
    trainer.train()
    result = summarise(trainer, class_counts)
    if rank() == 0:
        write_result(trainer, result)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
