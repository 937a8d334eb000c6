"""Fit a head to the features of a trained backbone: anew, or in fewer dimensions."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: Features (B, F) of the training images, with labels (B,).
Batches = list[tuple[Tensor, Tensor]]


def class_mean_loss(loss: Callable[[Tensor, Tensor], Tensor], batches: Batches) -> Tensor:
    """Mean () over the classes of the mean over a class's samples; adds its gradients.

    Args:
        loss: of features (B, F) and labels (B,), for each sample (B,).
        batches: of all samples, so that memory is that of one.
    """
    counts = torch.cat([labels for _, labels in batches]).bincount()
    weights, total = 1.0 / (counts * counts.count_nonzero()), torch.zeros((), device=counts.device)
    for features, labels in batches:
        part = (loss(features, labels) * weights[labels]).sum()
        part.backward()
        total += part.detach()
    return total


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor], parameters: Iterable[nn.Parameter], batches: Batches, iterations: int
) -> None:
    """L-BFGS on `class_mean_loss`: it needs no learning rate and draws nothing."""
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=iterations, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        return class_mean_loss(loss, batches)

    optimizer.step(evaluate)


def principal_components(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of values (N, C): mean (C,), deviations (C,) along the principal directions, these as columns (C, C).

    The direction with the largest standard deviation is the first. In float64, which not every GPU has.
    """
    values = values.double()
    variances, directions = torch.linalg.eigh(torch.cov(values.T))
    return values.mean(dim=0), variances.flip(0).clamp(min=0.0).sqrt(), directions.flip(1)


@torch.no_grad()
def compress(logits: Callable[[Tensor], Tensor], projection: nn.Sequential, batches: Batches) -> tuple[Tensor, Tensor]:
    """Let a projection onto D dimensions keep what it can of a linear classifier's logits over the samples.

    They are the logits' leading principal components, which batch norm standardises. Directions of the weights alone
    may be such as no image tells apart.

    Args:
        logits: affine map from features (B, F) to (B, C), with C >= D.
        projection: a linear map without bias, and fresh batch norm; in eval mode afterwards.
        batches: the samples.

    Returns:
        Class vectors (C, D) and bias (C,), with which the projection gives the logits truncated to D dimensions.
    """
    features = torch.cat([features for features, _ in batches])
    mean, deviations, directions = principal_components(logits(features).cpu())
    linear, batch_norm = projection
    dim = linear.out_features
    identity = torch.eye(features.shape[1], device=features.device)
    weight = logits(identity) - logits(torch.zeros_like(identity[:1]))  # (F, C)
    linear.weight.copy_((weight.cpu().double() @ directions[:, :dim]).T)
    momentum, batch_norm.momentum = batch_norm.momentum, None  # the statistics of this one batch
    projection.train()(features)
    batch_norm.momentum = momentum
    projection.eval()
    vectors = (directions * deviations)[:, :dim].float().contiguous()
    return vectors.to(features.device), mean.float().to(features.device)
