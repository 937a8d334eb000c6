"""Features of classes that are Gaussian clouds, and heads to fit to them."""

import torch
from torch import nn

from hyperproto import HypersphericalHead

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clouds(
    num_classes: int, width: int, *, apart: float = 3.0, per_class: int = 30, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, width) of Gaussian classes with an unequal spread in each direction, far from zero; labels (N,)."""
    labels = torch.arange(num_classes).repeat(per_class)
    spread = torch.linspace(0.5, 1.5, width)
    means = apart * normal(num_classes, width, seed=seed)
    return 2.0 + (means[labels] + normal(len(labels), width, seed=seed + 1)) * spread, labels


def batched(features: torch.Tensor, labels: torch.Tensor, size: int = 50) -> Batches:
    return list(zip(features.split(size), labels.split(size), strict=True))


def make_head(num_classes: int, width: int, dim: int, **options: object) -> HypersphericalHead:
    return HypersphericalHead(width, num_classes, dim=dim, **{"bank": "random", **options}).eval()


def batch(num: int = 32, num_classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (num, 8) that say nothing of their labels."""
    features = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    return features, torch.arange(num) % num_classes


def make_model(num_classes: int = 4, dim: int = 3, **options: object) -> nn.Sequential:
    """A model for `batch`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), HypersphericalHead(8, num_classes, dim=dim, **options))


def assert_same_state(first: nn.Module, second: nn.Module | dict, **tolerance: float) -> None:
    other = second if isinstance(second, dict) else second.state_dict()
    for name, value in first.state_dict().items():
        if tolerance:
            torch.testing.assert_close(value, other[name], **tolerance)
        else:
            assert torch.equal(value, other[name]), name
