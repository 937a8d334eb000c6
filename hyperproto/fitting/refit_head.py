"""Fit the projections of a trained backbone's heads once more, by cross-entropy; prototypes and assignment stay."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.affine import known_layers
from hyperproto.errors import ArgumentError
from hyperproto.fitting.closed_form import least_squares
from hyperproto.fitting.data import HeldFeatures, check_fit_options, cross_entropy_with
from hyperproto.fitting.features import checking
from hyperproto.fitting.lbfgs import class_mean, minimise
from hyperproto.fitting.report import HeadFit
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads
from hyperproto.projection import has_layers
from hyperproto.ranks import ProcessGroup, check_not_sharded, share_state_
from hyperproto.telling import tell

#: Training accuracy that nothing can be gained on.
ALL_BUT_ALL = 0.999


@torch.inference_mode(False)
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
    learning rate and draws nothing: the same data, the same head. It starts from the present projection, or from least
    squares in closed form where they are better; a head that it finds no better projection for keeps its own, and a
    `HyperprotoWarning` says so, as one does where the samples are all told apart already. docs/results.md shows what a
    refit is worth.

    Memory: all features, 4 N F bytes, and 200 copies of a projection, where the head is. Modes, hooks, gradients and
    the global generator are as before afterwards; batch norm keeps its running statistics. The heads' `logit_scale`
    becomes `scale`; `fit_logit_scale` on held-out data finds a better one. Several heads in one model are fitted one by
    one. Under torch.distributed every rank must call it, each with its share of the data, before fully_shard; all take
    rank 0's buffers first, as DistributedDataParallel does, and arrive at the same head.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: as for `fit_head`, with labels, not soft targets: the training data, without augmentation.
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
    with checking(model, process_group=process_group):
        heads = require_heads(model)
        check_fit_options(scale, iterations)
        check_not_sharded(model, [each for head in heads for each in head.projection.parameters()])
        if not all(has_layers(head.projection) for head in heads):
            raise ArgumentError(
                'a head with projection="none" has nothing to fit: convert with "linear" or "linear+bn".'
            )
    features = HeldFeatures(model, heads, loader, process_group=process_group)
    if features.report(heads[0]).accuracy >= ALL_BUT_ALL:
        tell(
            "refit_head: the head is right on all of these samples already, so that they do not show what a refit is "
            "worth: it can cost accuracy on others, of rare labels first. Compare both heads on held-out data."
        )
    fitted = [_fit(head, features, index, scale, iterations, process_group) for index, head in enumerate(heads)]
    with torch.no_grad():
        for head, state in zip(heads, fitted, strict=True):
            if state is not None:
                head.projection.load_state_dict(state)
            head.logit_scale.fill_(scale)
    if None in fitted:
        tell(
            "refit_head: no projection was found that is better on these samples; the present one stays. Their "
            "features may be too large or too small for float32: normalise them in front of the head."
        )
    return features.report(heads[0])


def _fit(
    head: HypersphericalHead,
    features: HeldFeatures,
    index: int,
    scale: float,
    iterations: int,
    process_group: ProcessGroup | None,
) -> dict[str, Tensor] | None:
    """The state of a better projection for a head, whose features have this number, or None; nothing changes.

    L-BFGS goes to the minimum nearest to its start, and of fresh projections some start behind a ridge: where least
    squares in closed form are better than the present projection, it starts from there.
    """
    batches, device = features.batches[index], head.assignment.device
    projection = copy.deepcopy(head.projection).float().eval().requires_grad_(True)
    share_state_(projection, process_group=process_group)
    loss = cross_entropy_with(projection, head.class_prototypes, scale)
    measure = partial(
        class_mean, loss, batches, num_classes=head.num_classes, device=device, process_group=process_group
    )
    before = lowest = measure()
    best = copy.deepcopy(projection.state_dict())
    layers = known_layers(projection)
    if layers is not None:
        targets = head.class_prototypes.cpu().double()
        state = least_squares(projection, features.balanced(index), targets, intercept=layers.has_intercept)
        projection.load_state_dict(state)
        share_state_(projection, process_group=process_group)
        reached = measure()
        if reached < lowest:
            lowest, best = reached, copy.deepcopy(projection.state_dict())
    projection.load_state_dict(best)
    minimise(
        loss,
        list(projection.parameters()),
        batches,
        num_classes=head.num_classes,
        iterations=iterations,
        process_group=process_group,
    )
    reached = measure()
    if reached < lowest:
        lowest, best = reached, projection.state_dict()
    return best if lowest < before else None
