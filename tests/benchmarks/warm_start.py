"""How much of a trained softmax classifier survives its conversion, before any further training.

Trains a small ResNet with an ordinary softmax head, converts copies of it with and without `warm_start=True` at
several dimensions, and writes accuracies to docs/warm_start.md. About 25 minutes on one core of a busy machine:

    python tests/benchmarks/warm_start.py DATA

DATA is a folder with cifar100_20k.npz (x_train, y_train, x_test, y_test; images as uint8). The digits are part of
scikit-learn.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from hyperproto import PrototypeBank, convert_model, get_heads
from hyperproto.conversion.warm_start import warm_start_

PAGE = Path(__file__).parents[2] / "docs" / "warm_start.md"

Split = tuple[Tensor, Tensor]


def small_resnet(num_classes: int, in_chans: int, channels: tuple[int, int, int, int]) -> ResNet:
    """timm's ResNet with one block a stage, the first stage at half the resolution of the image."""
    model = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=channels, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_chans, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's 1797 digits of 8 x 8 pixels, every third held out."""
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images).float().div(16.0).sub(0.3).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    held_out = torch.arange(len(labels)) % 3 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def load_cifar100(folder: Path) -> tuple[Split, Split]:
    """CIFAR-100 as normalised float images."""
    data = np.load(folder / "cifar100_20k.npz")
    mean, std = torch.tensor([0.507, 0.487, 0.441]), torch.tensor([0.267, 0.256, 0.276])

    def split(name: str) -> Split:
        images = torch.from_numpy(data[f"x_{name}"]).float().div(255.0)
        if images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        images = (images - mean[:, None, None]) / std[:, None, None]
        return images.contiguous(), torch.from_numpy(data[f"y_{name}"]).long()

    return split("train"), split("test")


def augment(images: Tensor) -> Tensor:
    """Random shift by up to an eighth of the width, zeros outside; mirrored half of the time."""
    pad = images.shape[-1] // 8
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    row, column = torch.randint(0, 2 * pad + 1, (2,)).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (pad, pad, pad, pad))[..., row : row + height, column : column + width]


def train(model: nn.Module, data: Split, *, epochs: int, augmented: bool) -> None:
    """Softmax cross-entropy, SGD with momentum, one cycle, bfloat16."""
    images, labels = data
    batch_size = 128
    steps = epochs * (len(labels) // batch_size)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(batch_size)[: len(labels) // batch_size]:
            inputs = images[batch].to(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(augment(inputs) if augmented else inputs)
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted labels; batch norm of the backbone as in eval mode, the head as it is."""
    return torch.cat([model(batch.to(memory_format=torch.channels_last)).argmax(1) for batch in images.split(500)])


def share(of: Tensor) -> float:
    """Percentage of true entries."""
    return 100.0 * float(of.float().mean())


def measure(model: nn.Module, data: Split, dim: int, seed: int) -> dict[str, float]:
    """Accuracies of converted copies of a trained model, none of them trained further."""
    images, labels = data
    original = predict(model, images)
    num_classes = model.num_classes
    bank = PrototypeBank(num_classes, dim, seed=seed)
    cold = convert_model(copy.deepcopy(model), dim=dim, bank=bank, seed=seed)
    warm = copy.deepcopy(model)
    classifier = warm.get_classifier()
    head = next(iter(get_heads(convert_model(warm, dim=dim, bank=bank, seed=seed)).values()))
    reached = warm_start_(head, classifier)
    predicted = predict(warm, images)
    head.train()  # batch norm of the head by the statistics of each batch, as the first step of training sees it
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    training = predict(warm, images[shuffled])
    return {
        "original": share(original == labels),
        "warm": share(predicted == labels),
        "agreement": share(predicted == original),
        "training": share(training == labels[shuffled]),
        "cold": share(predict(cold, images) == labels),
        "reproduced": 100.0 * reached.reproduced,
    }


def row(name: str, model: nn.Module, data: Split, dim: int, seeds: range) -> str:
    """One line of the table: means over seeds of bank and projection."""
    results = [measure(model, data, dim, seed) for seed in seeds]
    mean = {key: sum(result[key] for result in results) / len(results) for key in results[0]}
    keys = ("original", "warm", "agreement", "training", "cold", "reproduced")
    return f"| {name} | {dim} | " + " | ".join(f"{mean[key]:.1f}" for key in keys) + " |"


def main() -> None:
    """Train, convert, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar100_20k.npz")
    folder = parser.parse_args().data
    started = time.perf_counter()
    rows = []
    for name, (training, test), channels, epochs, dims in (
        ("digits", load_digits(), (16, 32, 64, 64), 8, (10, 5, 3)),
        ("CIFAR-100", load_cifar100(folder), (32, 64, 128, 256), 12, (100, 50, 25)),
    ):
        torch.manual_seed(0)
        model = small_resnet(int(training[1].max()) + 1, training[0].shape[1], channels)
        train(model, training, epochs=epochs, augmented=name != "digits")
        for dim in dims:
            rows.append(row(name, model, test, dim, range(3)))
            print(rows[-1], flush=True)
    PAGE.write_text(PAGE_TEXT.format(rows="\n".join(rows), versions=versions(time.perf_counter() - started)))


def versions(seconds: float) -> str:
    """What the figures were made with."""
    return (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{torch.get_num_threads()} thread(s), {seconds / 60:.0f} minutes"
    )


PAGE_TEXT = """# Warm start from a trained classifier

`convert_model(model, dim=D, warm_start=True)` chooses the head's assignment and projection so that it ranks the
classes as the trained classifier does, as far as D dimensions can. This table shows what is left of a trained softmax
model right after its conversion, before any further training. All figures are percentages.

| data | D | original | warm start | agreement with the original | warm start, train mode | cold | weights reproduced |
|---|---|---|---|---|---|---|---|
{rows}

Original, warm start and cold are accuracies on held-out images: of the softmax model, of its conversion with a warm
start, and of its conversion without. Agreement is the share of images on which warm start and original predict the
same label. Train mode is the accuracy with the head's batch norm using the statistics of each (shuffled) batch of 500,
which is the function that the first steps of further training see. Weights reproduced is the share of the old
classifier's centred weights, by squared length, that the head can express. Means over three seeds of bank and
projection; the softmax model is the same for all.

- With D >= C - 1 the ranking is that of the original on every image: nothing is lost in eval mode.
- In train mode batch norm centres each dimension and divides it by its spread, and no classifier's weights tell what
  these are. At D = C that costs CIFAR-100 a few points until training has adapted; at smaller D it gains some.
- Below that fixed prototypes force classes to share directions (at D = C/2 the default bank puts pairs of classes
  opposite to each other), and what the projection cannot express is lost. With 10 classes that costs little down to
  D = 5; with 100 it costs much. It is still far above a cold start, which is at chance.

Models: timm's ResNet with one block a stage, trained with cross-entropy, SGD and one learning-rate cycle in bfloat16:
8 epochs on the 1797 digits of scikit-learn (a third held out), 12 epochs on 20,000 training images of CIFAR-100.
{versions}. One command makes this page:

    python tests/benchmarks/warm_start.py DATA
"""


if __name__ == "__main__":
    main()
