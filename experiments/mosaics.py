"""Images of 32 x 32 pixels in WebP files without loss, each rows of 20 images of one class: CIFAR-100 in 95 MiB.

The last number of a file's name is the class: train_a_07.webp and train_b_07.webp are training images, in this order,
test_07.webp test images of class 7. The files may lie in several folders.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from _data import Split, select
from PIL import Image

SIDE = 32


def read_mosaics(folders: list[Path]) -> tuple[Split, Split]:
    """Training and test images that lie in any of the folders."""
    splits = []
    for part in ("train", "test"):
        files = {path.name: path for folder in folders for path in folder.glob(f"{part}_*.webp")}
        images, labels = [], []
        for name in sorted(files):
            with Image.open(files[name]) as sheet:
                pixels = np.asarray(sheet.convert("RGB"))
            rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
            images.append(pixels.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
            labels += [int(Path(name).stem.split("_")[-1])] * len(images[-1])
        if not images:
            sys.exit(f"no file {part}_*.webp in {', '.join(map(str, folders))}.")
        splits.append(Split(torch.from_numpy(np.concatenate(images)), np.array(labels)))
    return splits[0], splits[1]


def first_images(split: Split, counts: np.ndarray) -> Split:
    """So many images of each class, the first ones."""
    found = np.bincount(split.labels, minlength=len(counts))
    if (found < counts).any():
        missing = np.flatnonzero(found < counts)
        sys.exit(
            f"{len(missing)} classes have fewer training images than this queue takes: class {missing[0]} has "
            f"{found[missing[0]]} of {counts[missing[0]]}. Add the folder with the other mosaics to --data."
        )
    return select(split, np.concatenate([np.flatnonzero(split.labels == c)[:n] for c, n in enumerate(counts)]))
