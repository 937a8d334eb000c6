"""The blocks of docs/inside.md, and what they run on."""

import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parents[1] / "docs" / "inside.md"

NUM_CLASSES, DIM, NUM_SAMPLES = 6, 4, 48


def block(heading: str) -> str:
    """The code below a heading of the page."""
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def network(num_classes: int = NUM_CLASSES) -> nn.Module:
    """A multilayer perceptron over images of 3 x 2 x 2."""
    return nn.Sequential(
        OrderedDict(flat=nn.Flatten(), hidden=nn.Linear(12, 16), act=nn.ReLU(), fc=nn.Linear(16, num_classes))
    )


def samples(num: int = NUM_SAMPLES) -> tuple[Tensor, Tensor]:
    """Images around one centre a class, and their labels; of each class equally many."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(NUM_CLASSES, 3, 2, 2, generator=generator)
    labels = torch.arange(num) % NUM_CLASSES
    return centres[labels] + torch.randn(num, 3, 2, 2, generator=generator), labels


def batches(num: int = NUM_SAMPLES) -> DataLoader:
    """The samples, twelve at a time."""
    return DataLoader(TensorDataset(*samples(num)), batch_size=12)
