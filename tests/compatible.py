"""The models on which the tests of compatibility run: one of each structure, as small as it can be made."""

from collections.abc import Iterable

import pytest
import timm
import torch
from torch import Tensor, nn

from hyperproto import HypersphericalHead, convert_model, get_heads

#: Name in timm and what makes it small. All take images of 32 x 32.
MODELS: dict[str, dict[str, object]] = {
    "test_resnet": {},
    "test_vit": {"img_size": 32},
    "test_convnext": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "resnetv2_18": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 16},
}
NUM_CLASSES = 10


def in_front(names: Iterable[str], *first: str) -> list[object]:
    """The names as parameters of a test, of which `first` run always, and the others with `-m slow`."""
    names = list(names)
    assert set(first) <= set(names)
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in names]


def plain(name: str) -> nn.Module:
    """The model as timm makes it."""
    return timm.create_model(name, num_classes=NUM_CLASSES, **MODELS[name])


def converted(name: str, **options: object) -> nn.Module:
    """The same with a hyperspherical head, D = 5 (more classes than dimensions + 1)."""
    return convert_model(plain(name), **({"dim": 5} | options))


def images(num: int = 2) -> Tensor:
    return torch.randn(num, 3, 32, 32)


def heads_of(model: nn.Module) -> list[HypersphericalHead]:
    return list(get_heads(model).values())


def permute_(model: nn.Module, seed: int = 0) -> Tensor:
    """Give every head of the model another assignment, the same one; returns it."""
    order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    for head in heads_of(model):
        head.assign_(order)
    return order
