"""What the measurements found best, on your own images: a simplex in training, few dimensions at the end.

    python examples/recipe.py DATA --dim 50 --epochs 20

DATA is a folder of class folders, DATA/train/CLASS/* and DATA/test/CLASS/*. The backbone trains towards a fixed simplex
in as many dimensions as there are classes; after the last epoch a head of `--dim` dimensions takes its place, and its
temperature is fitted on training images held out for that. This is the first row of the README's first table, for any
model of timm. Copy it and change what you like: model, image size, augmentation, optimiser. docs/training.md tells of
train.py, which has flags for all of it.
"""

import argparse
import math
import os
from pathlib import Path

import timm
import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import hyperproto

MODEL, IMAGE_SIZE, BATCH_SIZE = "resnet18", 224, 128
#: The learning rate is divided by the scale of the loss, since the gradient grows with that.
LEARNING_RATE, WEIGHT_DECAY = 2.0, 5e-4

#: Share of the training images that only the temperature is fitted on.
HOLDOUT = 0.02
WORKERS = min(8, os.cpu_count() or 1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """Half precision for the backbone, on a GPU; the head computes in float32 all the same."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def load_data(folder: Path) -> tuple[DataLoader, DataLoader, DataLoader, DataLoader, int]:
    """Loaders of training images with augmentation and as they are, held-out and test images; number of classes."""
    augmentation, plain = create_transform(IMAGE_SIZE, is_training=True), create_transform(IMAGE_SIZE)
    images = ImageFolder(folder / "train", plain)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    num_held_out = math.ceil(HOLDOUT * len(images))
    held_out, training = order[:num_held_out], order[num_held_out:]
    options = {"batch_size": BATCH_SIZE, "num_workers": WORKERS, "pin_memory": DEVICE.type == "cuda"}
    return (
        DataLoader(
            Subset(ImageFolder(folder / "train", augmentation), training), shuffle=True, drop_last=True, **options
        ),
        DataLoader(Subset(images, training), **options),
        DataLoader(Subset(images, held_out), **options),
        DataLoader(ImageFolder(folder / "test", plain), **options),
        len(images.classes),
    )


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """An ordinary loop."""
    criterion = hyperproto.PrototypeCrossEntropyLoss(model)
    rate = LEARNING_RATE / criterion.scale
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(loader), cycle_momentum=False)
    model.train()
    for _ in tqdm(range(epochs), desc="epochs"):
        for images, labels in loader:
            with autocast():
                output = model(images.to(DEVICE, non_blocking=True))
            criterion(output, labels.to(DEVICE, non_blocking=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, num_classes: int) -> tuple[float, float]:
    """Accuracy and calibration error, both in per cent."""
    accuracy = MulticlassAccuracy(num_classes, average="micro").to(DEVICE)
    calibration_error = MulticlassCalibrationError(num_classes, n_bins=15).to(DEVICE)
    model.eval()
    for images, labels in loader:
        with autocast():
            probabilities = model(images.to(DEVICE)).softmax(dim=1)
        accuracy.update(probabilities, labels.to(DEVICE))
        calibration_error.update(probabilities, labels.to(DEVICE))
    return 100.0 * float(accuracy.compute()), 100.0 * float(calibration_error.compute())


def main(argv: list[str] | None = None) -> None:
    """Train, fit the final head and its temperature, evaluate once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the class folders")
    parser.add_argument("--dim", type=int, help="of the embeddings in the end (default: half the number of classes)")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    training, training_plain, held_out, test, num_classes = load_data(arguments.data)
    model = timm.create_model(MODEL, num_classes=num_classes)
    hyperproto.convert_model(model, dim=num_classes)  # a simplex
    model.to(DEVICE)
    train(model, training, arguments.epochs)
    with autocast():
        hyperproto.compress_head(model, training_plain, dim=arguments.dim or math.ceil(num_classes / 2))
        hyperproto.fit_logit_scale(model, held_out)
    accuracy, error = evaluate(model, test, num_classes)
    print(f"test accuracy {accuracy:.1f} %, calibration error {error:.1f} %")


if __name__ == "__main__":
    main()
