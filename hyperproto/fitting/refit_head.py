"""Fit the projections of a trained backbone's heads once more, by cross-entropy; prototypes and assignment stay."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hyperproto.errors import ArgumentError
from hyperproto.fitting.data import HeldFeatures, check_fit_options, cross_entropy_with
from hyperproto.fitting.lbfgs import minimise
from hyperproto.fitting.report import HeadFit
from hyperproto.head import require_heads
from hyperproto.projection import has_layers
from hyperproto.ranks import ProcessGroup, check_member


def refit_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scale: float = 16.0,
    iterations: int = 200,
    process_group: ProcessGroup | None = None,
) -> HeadFit:
    r"""Fit the projections of a trained model once more, to all features at once; prototypes and assignment stay.

    $$
    \min_A \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\log
        \frac{\exp(s \langle z(x), w_{\sigma(c)} \rangle)}{\sum_k \exp(s \langle z(x), w_{\sigma(k)} \rangle)}
        \right], \qquad z(x) = \frac{A x}{\lVert A x \rVert}
    $$

    After the last epoch: the features are those of the finished backbone, in eval mode, and labels count alike however
    many samples they have, where training counted samples. One pass without gradients, then L-BFGS, which has no
    learning rate and draws nothing: the same data, the same head. docs/results.md shows what it is worth.

    Memory: all features, 4 N F bytes, and 200 copies of a projection, where the head is. Modes, hooks, gradients and
    the global generator are as before afterwards; batch norm keeps its running statistics. The heads' `logit_scale`
    becomes `scale`; `fit_logit_scale` on held-out data finds a better one. Several heads in one model are fitted one by
    one. Under torch.distributed every rank must call it, each with its share of the data, before fully_shard; all take
    rank 0's buffers first, as DistributedDataParallel does, and arrive at the same head.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: batches whose first two items are inputs and labels (B,) int64: the training data, without
            augmentation.
        scale: s > 0, of the cosines; what the backbone was trained with, as in `PrototypeCrossEntropyLoss`.
        iterations: at most so many of L-BFGS, at least 1; each costs one or two passes over the features.
        process_group: the ranks that share out the data; by default all.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, or does not call it.
        ArgumentError: a head without a projection, a scale or iterations out of range, no samples, or features that are
            not finite or tell no labels apart.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> from hyperproto import HypersphericalHead
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> refit_head(head, [(features, labels)]).accuracy
        1.0

    References:
        Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020 (classifier
        re-training).
    """
    heads = require_heads(model)
    check_fit_options(scale, iterations)
    check_member(process_group)
    if not all(has_layers(head.projection) for head in heads):
        raise ArgumentError('a head with projection="none" has nothing to fit: convert with "linear" or "linear+bn".')
    features = HeldFeatures(model, heads, loader, process_group=process_group)
    fitted = []
    for head, batches in zip(heads, features.batches, strict=True):
        projection = copy.deepcopy(head.projection).float().eval().requires_grad_(True)
        loss = cross_entropy_with(projection, head.class_prototypes, scale)
        minimise(
            loss,
            list(projection.parameters()),
            batches,
            num_classes=head.num_classes,
            iterations=iterations,
            process_group=process_group,
        )
        fitted.append(projection)
    with torch.no_grad():
        for head, projection in zip(heads, fitted, strict=True):
            for parameter, value in zip(head.projection.parameters(), projection.parameters(), strict=True):
                parameter.copy_(value)
            head.logit_scale.fill_(scale)
    return features.report(heads[0])
