"""The models on which the tests of compatibility run, and what the installed torch and timm cannot do.

One model of each structure, as small as it can be made.
"""

import inspect
from collections.abc import Iterable
from importlib.metadata import version

import pytest
import timm
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

#: What DistributedDataParallel calls the argument that keeps it from broadcasting buffers in each forward pass.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def needs(what: str, **oldest: str) -> pytest.MarkDecorator:
    """Skips a test on a version of a library that is older than the oldest that was seen to do `what`."""
    [(library, wanted)] = oldest.items()
    found = version(library)
    reason = f"{library} {found} lacks {what}; {library} {wanted} has it"
    return pytest.mark.skipif(Version(found) < Version(wanted), reason=reason)


#: Models whose own `get_classifier` raises in timm before this version.
MENDED = {"resnet50_clip": "1.0.31"}


def needs_model(name: str) -> None:
    """Skips the test that asks where timm does not know the model yet, or cannot tell its classifier."""
    found = version("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {found} has no model {name}")
    if Version(found) < Version(MENDED.get(name, "0")):
        pytest.skip(f"timm {found} cannot tell the classifier of {name}; timm {MENDED[name]} can")


def in_front(cases: Iterable[object], *first: object) -> list[object]:
    """The cases as parameters of a test, of which `first` run always, and the others with `-m slow`.

    A case of several parameters is a tuple.
    """
    cases = list(cases)
    assert set(first) <= set(cases)
    return [
        case if case in first else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


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
