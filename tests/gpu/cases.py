"""Heads, losses and batches on which the tests of GPUs run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
)

NUM_CLASSES, DIM, FEATURES, BATCH = 40, 24, 32, 64

LOSSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "balanced": BalancedLoss,
    "long-tail": LongTailLoss,
    "long-tail, counts": lambda source: LongTailLoss(source, class_counts=torch.arange(1, NUM_CLASSES + 1)),
    "cross-entropy": PrototypeCrossEntropyLoss,
}


def make_head(output: str = "logits", projection: str = "linear+bn", **options: object) -> HypersphericalHead:
    bank = PrototypeBank(NUM_CLASSES, DIM, method="random")
    head = HypersphericalHead(
        FEATURES, NUM_CLASSES, bank=bank, projection=projection, training_output=output, **options
    )
    head.assign_(torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(3)))
    return head


def batch(device: torch.device, target: str = "hard", seed: int = 0, num: int = BATCH) -> tuple[Tensor, Tensor]:
    """Features (num, FEATURES) that tell the labels apart, and labels or soft targets; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    centres = torch.randn(NUM_CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + 0.3 * torch.randn(num, FEATURES, generator=generator)
    if target == "soft":
        one_hot = torch.eye(NUM_CLASSES)[labels]
        return features.to(device), (0.7 * one_hot + 0.3 * one_hot.flip(0)).to(device)
    return features.to(device), labels.to(device)


def training_step(
    head: nn.Module, criterion: nn.Module, features: Tensor, target: Tensor, optimizer: torch.optim.Optimizer
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = criterion(head(features), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assigner_of(head: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> DynamicAssigner:
    """An assigner that has seen these batches."""
    assigner = DynamicAssigner(head)
    for features, target in batches:
        assigner.update(head(features).detach(), target)
    return assigner


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """What waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
