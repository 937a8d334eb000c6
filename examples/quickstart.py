"""Handwritten digits, softmax against prototypes in half as many dimensions as classes: install, train, see it work.

    pip install -e ".[examples]" && python examples/quickstart.py

Trains a small timm model on scikit-learn's digits (1797 real 8 x 8 images, shipped with the package) twice: with its
own linear classifier, and with the classifier replaced by ten fixed prototypes in five dimensions. Prints a table and
writes a picture. Half a minute on two CPU cores; where other programs use them as well, `--threads 1` is faster than
threads that wait for each other. `--short` is a smoke test of a few seconds.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.ticker import MaxNLocator
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError
from tqdm import tqdm

import hyperproto

NUM_CLASSES, DIM, BATCH_SIZE, LEARNING_RATE = 10, 5, 64, 1e-2


# ---- what you would copy: your model, your loop, four lines of hyperproto -------------------------------------------
def train_hyperproto(loader: DataLoader, epochs: int) -> tuple[nn.Module, list[Tensor]]:
    """A converted timm model, trained; and the assignment after each epoch."""
    model = timm.create_model("test_resnet", in_chans=1, num_classes=NUM_CLASSES)
    hyperproto.convert_model(model, dim=DIM)
    assigner = hyperproto.DynamicAssigner(model)
    criterion = hyperproto.BalancedLoss(assigner)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * len(loader))
    assignments = [assigner.head.assignment.clone()]
    for _ in tqdm(range(epochs), desc="hyperproto"):
        model.train()
        for images, labels in loader:
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assigner.step()
        assignments.append(assigner.head.assignment.clone())
    return model, assignments


# ---------------------------------------------------------------------------------------------------------------------


def train_softmax(loader: DataLoader, epochs: int) -> nn.Module:
    """The same model with its own linear classifier, the same optimiser and schedule."""
    model = timm.create_model("test_resnet", in_chans=1, num_classes=NUM_CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * len(loader))
    for _ in tqdm(range(epochs), desc="softmax"):
        model.train()
        for images, labels in loader:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def load_data(seed: int) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Training, validation and test loaders (60 / 20 / 20 %), images (B, 1, 32, 32) in [0, 1]."""
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32), size=32, mode="bilinear")
    labels = torch.tensor(digits.target, dtype=torch.int64)
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=seed)
    return tuple(
        DataLoader(TensorDataset(images[part], labels[part]), batch_size=BATCH_SIZE, shuffle=part is train)
        for part in (train, validation, test)
    )


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a whole loader."""
    model.eval()
    logits, labels = zip(*((model(images), labels) for images, labels in loader), strict=True)
    return torch.cat(logits), torch.cat(labels)


def fit_temperature(model: nn.Module, loader: DataLoader) -> float:
    """What `fit_logit_scale(match="likelihood")` does for a head, for the softmax classifier: a fair comparison."""
    logits, labels = predict(model, loader)
    likelihood = lambda log_scale: float(nn.functional.cross_entropy(math.exp(log_scale) * logits, labels))  # noqa: E731
    return math.exp(minimize_scalar(likelihood, bounds=(-5, 5), method="bounded").x)


def evaluate(model: nn.Module, loader: DataLoader, scale: float = 1.0) -> tuple[float, float]:
    """Accuracy and expected calibration error (15 bins), both in per cent."""
    logits, labels = predict(model, loader)
    logits = scale * logits
    calibration_error = MulticlassCalibrationError(NUM_CLASSES, n_bins=15)(logits.softmax(dim=1), labels)
    return 100 * float((logits.argmax(dim=1) == labels).float().mean()), 100 * float(calibration_error)


@torch.no_grad()
def class_mean_similarity(model: nn.Module, loader: DataLoader) -> Tensor:
    """(C, C): cosine of the mean test embedding of each label with the prototype of each label."""
    [head] = hyperproto.get_heads(model).values()
    logits, labels = predict(model, loader)
    embeddings = head.recover_embeddings(logits)
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(NUM_CLASSES)])
    return nn.functional.normalize(means) @ head.class_prototypes.T


def draw(assignments: list[Tensor], similarity: Tensor, path: Path) -> None:
    """The assignment over the epochs, and where the class means came to lie."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, path_of_label in enumerate(torch.stack(assignments, dim=1)):
        left.plot(path_of_label, color=f"C{label}", label=f"digit {label}", marker=".", markersize=4)
    left.set(title="which prototype stands for which digit", xlabel="epoch", ylabel="prototype")
    left.set_yticks(range(NUM_CLASSES))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture = right.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1)
    right.set(title="cosine of class means with prototypes (test)", xlabel="prototype of digit", ylabel="mean of digit")
    right.set_xticks(range(NUM_CLASSES))
    right.set_yticks(range(NUM_CLASSES))
    figure.colorbar(picture, ax=right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train both, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; 1 where other programs keep the machine busy")
    parser.add_argument("--short", action="store_true", help="two epochs: a smoke test")
    parser.add_argument("--picture", type=Path, default=Path("examples/output/quickstart.png"))
    arguments = parser.parse_args()
    epochs = 2 if arguments.short else arguments.epochs
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    train, validation, test = load_data(arguments.seed)
    torch.manual_seed(arguments.seed)
    softmax = train_softmax(train, epochs)
    torch.manual_seed(arguments.seed)
    model, assignments = train_hyperproto(train, epochs)
    hyperproto.fit_logit_scale(model, validation, match="likelihood")  # the temperature, as softmax gets its own

    moved = [int((after != before).sum()) for before, after in pairwise(assignments)]
    row = "{:<12} {:>9} {:>14} {:>18}   {}"
    print("\n" + row.format("classifier", "dimension", "test accuracy", "calibration error", "labels moved per epoch"))
    for name, dimension, trained, scale, extra in (
        ("softmax", softmax.num_features, softmax, fit_temperature(softmax, validation), "-"),
        ("hyperproto", DIM, model, 1.0, " ".join(map(str, moved))),
    ):
        accuracy, error = evaluate(trained, test, scale)
        print(row.format(name, dimension, f"{accuracy:.1f} %", f"{error:.1f} %", extra))
    draw(assignments, class_mean_similarity(model, test), arguments.picture)
    print(f"\npicture: {arguments.picture}")


if __name__ == "__main__":
    main()
