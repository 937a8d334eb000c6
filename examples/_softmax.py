"""Softmax behind a bottleneck as the peer of fixed prototypes: the same projection, but class vectors that train.

And its fit after the last epoch, as `hyperproto.refit_head` and `hyperproto.compress_head` fit a head of prototypes.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import hyperproto

#: Features (B, F) float32 that reach a head, and their labels (B,), both where the head is.
Batches = list[tuple[Tensor, Tensor]]

#: Least deviation of a principal component, as a share of the largest: below it there is rounding.
SMALLEST_DEVIATION = 1e-6


class FreeClassVectors(nn.Module):
    """Class vectors that train and a bias, behind the projection of the hyperspherical head whose place this takes."""

    def __init__(self, head: hyperproto.HypersphericalHead) -> None:
        super().__init__()
        self.projection = head.projection
        self.vectors = nn.Linear(head.dim, head.num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, C), or pooled maps (B, F, 1, 1) -> (B, C, 1, 1)."""
        logits = self.vectors(self.projection(features.flatten(1)))
        return logits.view(*logits.shape, *features.shape[2:])


def head_features(
    model: nn.Module, names: list[str], predict: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, Batches]:
    """What reaches each of a model's heads while `predict` runs it, which returns logits and labels (N,)."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, head: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows[name].append(arguments[0].flatten(1).float())

    share_buffers(model)
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(keep, name)))
        _, labels = predict()
    return {
        name: list(zip(own, labels.to(own[0].device).split([len(batch) for batch in own]), strict=True))
        for name, own in rows.items()
    }


def fit_softmax(head: FreeClassVectors, batches: Batches, iterations: int) -> None:
    """Fit all parameters by L-BFGS on the cross-entropy, classes counting alike; batch norm keeps its statistics."""
    head.eval()
    parameters = list(head.parameters())
    device = parameters[0].device
    counts = torch.cat([labels for _, labels in batches]).bincount(minlength=head.vectors.out_features)
    add_up_processes([counts], device)
    weights = 1.0 / (counts.clamp(min=1) * counts.count_nonzero())  # (C,)
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for rows, labels in batches:
            loss = (F.cross_entropy(head(rows), labels, reduction="none") * weights[labels]).sum()
            loss.backward()
            total += loss.detach()
        add_up_processes([total, *(parameter.grad for parameter in parameters)], device)
        return total

    optimizer.step(evaluate)


@torch.no_grad()
def compressed_softmax(trained: FreeClassVectors, batches: Batches, dim: int) -> FreeClassVectors:
    """Class vectors of fewer dimensions: what the principal components of the trained one's logits hold of them.

    Args:
        trained: with "linear+bn" as its projection.
        batches: of features that reach it. Directions of the weights alone may be such as no image tells apart.
        dim: D, at most C.

    Returns:
        A module on the same device. Its projection standardises the components.
    """
    device = trained.vectors.weight.device
    classes, width = trained.vectors.out_features, trained.projection[0].in_features
    # In float64, where the covariance can be had from moments about zero; on the CPU, since not all devices have it.
    count, total, moment = (torch.zeros(shape, dtype=torch.float64) for shape in ((1,), (width,), (width, width)))
    for rows, _ in batches:
        rows = rows.cpu().double()
        count += len(rows)
        total += rows.sum(dim=0)
        moment.addmm_(rows.T, rows)
    add_up_processes([count, total, moment], device)
    mean = total / count
    covariance = moment / count - torch.outer(mean, mean)

    # In eval mode the logits are affine in the features.
    state = {name: value.cpu().double() for name, value in trained.state_dict().items()}
    gain = state["projection.1.weight"] / (state["projection.1.running_var"] + trained.projection[1].eps).sqrt()
    projected = gain * (state["projection.0.weight"] @ mean - state["projection.1.running_mean"])
    mean_logits = state["vectors.weight"] @ (projected + state["projection.1.bias"]) + state["vectors.bias"]
    to_logits = state["vectors.weight"] @ (gain[:, None] * state["projection.0.weight"])  # (C, F)

    variances, directions = torch.linalg.eigh(to_logits @ covariance @ to_logits.T)
    leading = directions.flip(1)[:, :dim]  # (C, D)
    deviations = variances.flip(0)[:dim].clamp(min=0.0).sqrt()
    deviations = deviations.clamp(min=SMALLEST_DEVIATION * float(deviations[0]))
    standardising = leading.T @ to_logits / deviations[:, None]  # (D, F)

    # As long as fresh weights are, since the steps of L-BFGS depend on it; batch norm takes the scale out again.
    scale = math.sqrt(dim / 3.0) / standardising.norm()
    like = hyperproto.HypersphericalHead(width, classes, dim=dim, bank="random", projection="linear+bn")
    head = FreeClassVectors(like)
    variance = scale.square().expand(dim)
    head.load_state_dict(
        head.state_dict()
        | {
            "projection.0.weight": scale * standardising,
            "projection.1.running_mean": scale * standardising @ mean,
            "projection.1.running_var": variance,
            "projection.1.weight": (variance + head.projection[1].eps).sqrt() / scale,
            "projection.1.bias": torch.zeros(dim),
            "vectors.weight": leading * deviations,
            "vectors.bias": mean_logits,
        }
    )
    return head.to(device)


def add_up_processes(tensors: list[Tensor], device: torch.device) -> None:
    """Sum each tensor over the processes that torchrun started, in place, by way of `device`."""
    if dist.is_initialized():
        for tensor in tensors:
            summed = tensor.to(device)
            dist.all_reduce(summed)
            tensor.copy_(summed)


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: since the last step each has running statistics of its own."""
    if dist.is_initialized():
        for buffer in model.buffers():
            shared = buffer.contiguous()
            dist.broadcast(shared, 0)
            buffer.copy_(shared)
