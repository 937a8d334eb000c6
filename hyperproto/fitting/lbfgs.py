"""Fit a few layers to features that are all at hand, without a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyperproto.ranks import ProcessGroup, add_up_ranks, steered_by_first

#: Of features (N, F) and labels (N,), a loss for each (N,).
SampleLoss = Callable[[Tensor, Tensor], Tensor]

#: Features (N, F) and labels (N,) int64, both where the parameters are.
Batches = list[tuple[Tensor, Tensor]]


def class_weights(
    batches: Batches, num_classes: int, device: torch.device, *, process_group: ProcessGroup | None = None
) -> Tensor:
    """(C,) float32 weights of a sample of each class with which classes count alike and all samples add up to 1."""
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for _, labels in batches:
        counts += labels.bincount(minlength=num_classes)
    add_up_ranks([counts], device, process_group=process_group)
    return 1.0 / (counts * counts.count_nonzero())  # infinite where there is no sample to weigh


@torch.no_grad()
def class_mean(
    loss: SampleLoss,
    batches: Batches,
    *,
    num_classes: int,
    device: torch.device,
    process_group: ProcessGroup | None = None,
) -> float:
    """What `minimise` minimises; infinity where it is not a number."""
    weights = class_weights(batches, num_classes, device, process_group=process_group)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for features, labels in batches:
        total += (loss(features, labels) * weights[labels]).sum()
    add_up_ranks([total], device, process_group=process_group)
    return float(total) if bool(torch.isfinite(total)) else math.inf


def minimise(
    loss: SampleLoss,
    parameters: list[nn.Parameter],
    batches: Batches,
    *,
    num_classes: int,
    iterations: int,
    process_group: ProcessGroup | None = None,
) -> None:
    r"""L-BFGS on the mean over classes of the mean over a class's samples; in place.

    $$ \min_\theta \frac1S \sum_c \frac1{n_c} \sum_{i: y_i = c} \ell_\theta(x_i, c) $$

    with n_c samples of class c, and S classes that have any. Nothing is drawn: the same features, the same result.
    Under torch.distributed each rank has its own samples, and all take the steps of the first.

    Args:
        loss: differentiable in the parameters, which it reads.
        parameters: what is fitted, all of one dtype and on one device.
        batches: all samples of this rank; their sizes matter to memory only.
        num_classes: labels lie below it.
        iterations: at most so many; each costs one or two passes over the samples.
        process_group: the ranks that share out the samples.

    References:
        Liu, Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
    """
    device = parameters[0].device
    weights = class_weights(batches, num_classes, device, process_group=process_group)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    @torch.enable_grad()
    def evaluate() -> Tensor:
        total = parameters[0].new_zeros(())
        optimizer.zero_grad(set_to_none=False)
        for features, labels in batches:
            part = (loss(features, labels) * weights[labels]).sum()
            part.backward()  # type: ignore[no-untyped-call]
            total += part.detach()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        add_up_ranks([total, *gradients], device, process_group=process_group)
        return total

    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")
    steered_by_first(optimizer.step, evaluate, list(parameters), process_group=process_group)
