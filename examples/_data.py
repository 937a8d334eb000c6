"""Data for train.py: class folders, torchvision's and timm's data sets, as loaders of batches."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from timm.data import create_dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

#: Longest side of images that are kept in memory.
LARGEST_IN_MEMORY = 64
TORCHVISION_DATASETS = ("cifar10", "cifar100", "svhn", "stl10")
#: Where timm's `create_dataset` finds data sets with an index.
TIMM_PREFIXES = ("torch/", "hfds/")


def seed_for(*entropy: int) -> int:
    """One seed from a few numbers; zeros at their end count for nothing."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@dataclass
class Split:
    """Training or test images: a data set of (PIL image, label) or all pixels (N, H, W, 3) uint8, and labels (N,)."""

    images: Any
    labels: np.ndarray


class TensorLoader:
    """Batches of images that lie in memory, cropped, flipped and normalised a batch at a time.

    One gather takes all crops and flips of a batch, so that no worker processes are needed. The order of an epoch and
    its crops depend on the seed and the epoch's number alone.

    Args:
        split: images in memory.
        batch_size: of this process.
        mean, std: (3,) of pixels in [0, 255].
        device: where images lie and batches are made.
        augment_seed: None to run through the images in order, as they are.
        rank, world_size: this process and the number of processes that share the augmented images.
        padding: black pixels around an image, of which crops take a part.
        flip: mirror half of the augmented images.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        *,
        augment_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        padding: int = 4,
        flip: bool = True,
    ) -> None:
        self.height, self.width = split.images.shape[1:3]
        self.padding = 0 if augment_seed is None else padding
        self.images = F.pad(split.images, (0, 0, *[self.padding] * 4)).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.batch_size = batch_size
        self.augment_seed = augment_seed
        self.flip = flip
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        # Repeated for a row of pixels: over an innermost dimension of 3 the arithmetic is not vectorised.
        self.scale = (1.0 / std).repeat(self.width).to(device)  # (W * 3,)
        self.shift = (-mean / std).repeat(self.width).to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.augment_seed is None:
            return math.ceil(len(self.labels) / self.batch_size)
        return len(self.labels) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) float32, channels last in memory, and labels (B,)."""
        if self.augment_seed is None:
            for chosen in torch.arange(len(self.labels), device=self.labels.device).split(self.batch_size):
                yield self._normalise(self.images[chosen]), self.labels[chosen]
            return
        for drawn in self.draws(self.epoch).split(self.batch_size, dim=1):
            yield self.augmented(drawn)

    def draws(self, epoch: int) -> Tensor:
        """(4, N) int64: for each image of an epoch's whole batches its index, shift in rows and columns, and flip."""
        # All processes draw the same numbers for all images, and each takes its share of them.
        generator = torch.Generator().manual_seed(seed_for(self.augment_seed, epoch))
        count, num_shifts = len(self.labels), 2 * self.padding + 1
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(num_shifts, (2, count), generator=generator)
        mirrored = torch.randint(2, (1, count), generator=generator) * self.flip
        draws = torch.cat([order[None], shifts, mirrored])[:, self.rank :: self.world_size]
        return draws[:, : len(self) * self.batch_size].to(self.labels.device)

    def augmented(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The batch (B, 3, H, W) and its labels (B,) that some of these draws (4, B) ask for."""
        chosen, tops, lefts, flips = drawn  # (B,) each
        return self._normalise(self._crop_and_flip(chosen, tops, lefts, flips)), self.labels[chosen]

    def _crop_and_flip(self, chosen: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor) -> Tensor:
        """(B,) indices and draws -> (B, H, W, 3) uint8, each image shifted in its black frame and mirrored or not."""
        columns = torch.arange(self.width, device=chosen.device)
        columns = torch.where(flips[:, None] > 0, columns.flip(0), columns) + lefts[:, None]  # (B, W)
        rows = torch.arange(self.height, device=chosen.device) + tops[:, None]  # (B, H)
        first = (chosen[:, None] * self.images.shape[1] + rows) * self.images.shape[2]  # (B, H)
        pixels = first[:, :, None] + columns[:, None, :]  # (B, H, W)
        return self.images.view(-1, 3).index_select(0, pixels.flatten()).view(*pixels.shape, 3)

    def _normalise(self, images: Tensor) -> Tensor:
        rows = torch.addcmul(self.shift, images.flatten(2).float(), self.scale)  # (B, H, W * 3)
        return rows.view(images.shape).permute(0, 3, 1, 2)


class TransformedImages(Dataset):
    """A data set of PIL images with a transform of its own, which timm's `create_loader` sets."""

    def __init__(self, base: Any) -> None:
        self.base, self.transform = base, None

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.base[index]
        return self.transform(image.convert("RGB")), int(label)


@dataclass
class Loaders:
    """Loaders of batches of images and labels.

    Attributes:
        train: augmented training images, this process's share.
        fit: the same images as they are, for `hyperproto.fit_head`.
        holdout: held-out training images as they are, or None.
        test: the test images.
        num_images: training images of all processes, held-out ones excluded.
    """

    train: Any
    fit: Any
    holdout: Any | None
    test: Any
    num_images: int


def read_splits(
    dataset: str,
    folder: Path,
    *,
    decoded: bool,
    cache: Path | None = None,
    download: bool = False,
    test_split: str | None = None,
    target_key: str | None = None,
) -> tuple[Split, Split]:
    """Training and test set; decoded into memory at once, or image by image when they are used."""
    source = {"dataset": dataset, "folder": str(folder.resolve()), "test": test_split, "target": target_key}
    if cache is not None and cache.is_file():
        kept = torch.load(cache)
        if kept["source"] != source:
            sys.exit(f"expected the images of {source} in {cache}, got those of {kept['source']}: choose another file.")
        return tuple(Split(images, labels.numpy()) for images, labels in kept["splits"])
    train, test = (
        open_split(dataset, folder, is_train, download=download, test_split=test_split, target_key=target_key)
        for is_train in (True, False)
    )
    shared = paths_of(train.images) & paths_of(test.images)
    if shared:
        sys.exit(f"training and test set in {folder} share {len(shared)} images.")
    if getattr(train.images, "classes", None) != getattr(test.images, "classes", None):
        sys.exit(f"training and test set in {folder} have different classes.")
    if not decoded:
        return train, test
    train, test = decode(train), decode(test)
    if cache is not None:
        splits = [(split.images, torch.from_numpy(split.labels)) for split in (train, test)]
        save_atomically({"source": source, "splits": splits}, cache)
    return train, test


def paths_of(opened: Any) -> set[str]:
    """Files of a data set's images, where each has one."""
    return {path for path, _ in getattr(opened, "samples", [])}


def open_split(
    dataset: str, folder: Path, train: bool, *, download: bool, test_split: str | None, target_key: str | None
) -> Split:
    """A data set by name: "folder", one of torchvision's, or one with an index that timm's `create_dataset` knows."""
    if dataset == "folder":
        names = ["train"] if train else ["test", "val", "validation"]
        found = [folder / name for name in names if (folder / name).is_dir()]
        if not found:
            sys.exit(f"expected class folders {folder}/{' or '.join(names)}/CLASS/; there is no such folder.")
        opened = torchvision.datasets.ImageFolder(str(found[0]))
    elif dataset in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, dataset.upper())
        opened = kind(str(folder), train=train, download=download)
    elif dataset in TORCHVISION_DATASETS:
        kind = getattr(torchvision.datasets, dataset.upper())
        opened = kind(str(folder), split="train" if train else "test", download=download)
    else:
        split = "train" if train else test_split or "validation"
        target = {"target_key": target_key} if target_key else {}
        opened = create_dataset(dataset, str(folder), split=split, is_training=train, download=download, **target)
    return Split(opened, np.asarray(labels_of(opened, dataset), dtype=np.int64))


def labels_of(opened: Any, name: str) -> Iterable[int]:
    """All labels of a data set, without decoding an image."""
    for attribute in ("targets", "labels"):
        if hasattr(opened, attribute):
            return getattr(opened, attribute)
    reader = getattr(opened, "reader", None)
    if hasattr(reader, "samples"):
        return [label for _, label in reader.samples]
    if hasattr(reader, "label_key"):
        return reader.dataset[reader.label_key]
    sys.exit(f"{name} does not list its labels (it is a stream); a data set with an index is needed.")


def decode(split: Split) -> Split:
    """All images of a split as one tensor (N, H, W, 3) uint8."""
    first = split.images[0][0].size
    if max(first) > LARGEST_IN_MEMORY:
        sys.exit(f"images of {first[0]} x {first[1]} px are too large to keep in memory: choose --image-size.")
    pixels = np.empty((len(split.labels), first[1], first[0], 3), dtype=np.uint8)
    for index in range(len(pixels)):
        image = split.images[index][0].convert("RGB")
        if image.size != first:
            sys.exit(f"images of {first} and of {image.size} px: choose one --image-size.")
        pixels[index] = np.asarray(image)
    return Split(torch.from_numpy(pixels), split.labels)


def long_tail_counts(num_largest: int, num_classes: int, imbalance: float) -> np.ndarray:
    """(C,) images of each class c: the integer part of num_largest * imbalance ** (c / (C - 1))."""
    return np.array([int(num_largest * imbalance ** (c / (num_classes - 1))) for c in range(num_classes)])


def keep_long_tail(split: Split, imbalance: float) -> Split:
    """The first images of each class, as many as the exponential profile asks for."""
    counts = np.bincount(split.labels)
    counts = long_tail_counts(counts.max(), len(counts), imbalance)
    if counts[-1] == 0:
        sys.exit(f"an imbalance of {imbalance} leaves no image of the last class: choose a larger one.")
    kept = np.concatenate([np.flatnonzero(split.labels == c)[:count] for c, count in enumerate(counts)])
    return select(split, np.sort(kept))


def split_holdout(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on, and of `share` of each class, rounded, held out; the same in every run."""
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        held_out[generator.permutation(members)[: round(share * len(members))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def select(split: Split, indices: np.ndarray) -> Split:
    """Some samples of a split."""
    if isinstance(split.images, Tensor):
        return Split(split.images[torch.from_numpy(indices)], split.labels[indices])
    return Split(torch.utils.data.Subset(split.images, indices.tolist()), split.labels[indices])


def make_loaders(
    train: Split, test: Split, holdout: float, make: Callable[[Split, bool], Any], *, rank: int, world_size: int
) -> Loaders:
    """All loaders of a run; `make` gives one for a split, with or without augmentation."""
    training, held_out = split_holdout(train.labels, holdout)
    return Loaders(
        train=make(select(train, training), True),
        fit=make(select(train, training[rank::world_size]), False),
        holdout=make(select(train, held_out), False) if len(held_out) else None,
        test=make(test, False),
        num_images=len(training),
    )


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of the channels of (N, H, W, 3) uint8, from histograms: no float copy."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(3)]).double()
    mean = (counts * levels).sum(dim=1) / counts.sum(dim=1)
    square = (counts * levels**2).sum(dim=1) / counts.sum(dim=1)
    return mean.float(), (square - mean**2).sqrt().clamp_min(1.0).float()


def save_atomically(state: Any, path: Path) -> None:
    """torch.save such that whoever reads the file, now or after a crash, finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(state, unfinished)
    os.replace(unfinished, path)
