"""Fit the projections of a trained backbone's heads once more, by cross-entropy; prototypes and assignment stay."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.affine import layers_of
from hyperproto.errors import ArgumentError
from hyperproto.fitting.closed_form import least_squares
from hyperproto.fitting.data import FitOptions, HeldFeatures
from hyperproto.fitting.features import checking
from hyperproto.fitting.hand_over import start_with_prototypes
from hyperproto.fitting.report import HeadFit
from hyperproto.fitting.unit_fit import Fit, Task, fit_unit_head
from hyperproto.fitting.unit_head import UnitHead
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads
from hyperproto.projection import has_layers
from hyperproto.ranks import ProcessGroup, check_not_sharded, share_first_, share_state_


@torch.inference_mode(False)
def refit_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scale: float | None = None,
    iterations: int = 200,
    class_counts: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> HeadFit:
    r"""Fit the projections of a trained model once more, to all features at once; prototypes and assignment stay.

    $$
    \min_{U, V, b} \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\log p_c(x) \right]
        + \tfrac\lambda2 \left( \lVert U \rVert^2 + \lVert V \rVert^2 \right),
        \qquad p(x) = \operatorname{softmax}(V U x + b)
    $$

    $$
    \min_A \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\sum_k p_k(x) \log
        \frac{\exp(s \langle z(x), w_{\sigma(k)} \rangle)}{\sum_l \exp(s \langle z(x), w_{\sigma(l)} \rangle)}
        \right], \qquad z(x) = \frac{A x}{\lVert A x \rVert}
    $$

    After the last epoch, or on the features of a pretrained backbone. First what the features say: a softmax
    classifier of rank D with a penalty on lengths, which means something there, where in a normalised head it does
    nothing. Then its answers are handed on to the prototypes: they say of each sample what all of its like say, so
    that there is nothing to overfit. On a simplex the head ranks as that classifier does. Both by L-BFGS, which has no
    learning rate and draws nothing: the same batches, the same head. In another order sums round otherwise, and of few
    samples that is enough to choose another penalty.

    The penalty is the one that does best on a tenth of each class that is held out meanwhile (none of classes of fewer
    than six samples; equal samples stay together). Where these do better than with the present head, likelier and
    not fewer right by more than a standard error, the fit is made once more with them; else the head stays as it is.
    Least squares in closed form stand in for a present head that must have been fitted to them. The report says all
    this. Samples that the backbone was trained on say less than others would.

    Memory: all features, 4 N F bytes, and 40 copies of a projection, where the head is. Modes, hooks, gradients and
    the global generator are as before afterwards; batch norm keeps its running statistics. Several heads in one model
    are fitted one by one, and take the first one's `logit_scale`. Under torch.distributed every rank must call it, each
    with its share of the data, before fully_shard; all take rank 0's buffers first, as DistributedDataParallel does,
    and arrive at the same head.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: as for `fit_head`, with labels, not soft targets: the training data, without augmentation.
        scale: s > 0, of the cosines, and the heads' `logit_scale` afterwards. None: s is three quarters of the
            classifier's own (the mean length of U x times that of the label's row of V), or with D >= C - 1 all of it
            where held-out samples are likelier then; at least 6. `logit_scale` is the one at which they are as often
            right as they are sure.
        iterations: at most so many of L-BFGS for each penalty, at least 1; each costs one or two passes over the
            features.
        class_counts: (C,) samples of each class, to predict labels as if they were equally frequent, from samples that
            count alike: logits are adjusted by their logarithm while fitting. None: labels count alike.
        process_group: the ranks that share out the data; by default all.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, or does not call it.
        ArgumentError: a head without a projection, or one that cannot be set; an option out of range; no samples,
            features that are not finite, too large or too small, or that tell no labels apart.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> import torch
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> refit_head(head, (features, labels)).accuracy
        1.0

    References:
        Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015; Menon et al., Long-tail learning via
        logit adjustment, 2021 (class_counts).
    """
    with checking(model, process_group=process_group):
        heads = require_heads(model)
        options = FitOptions.checked(scale, iterations, class_counts, heads[0].num_classes)
        check_not_sharded(model, [each for head in heads for each in head.projection.parameters()])
        for head in heads:
            if not has_layers(head.projection):
                raise ArgumentError(
                    'a head with projection="none" has nothing to fit: convert with "linear" or "linear+bn".'
                )
            layers_of(head.projection)  # raises for a projection that cannot be set, before the pass over the data
    features = HeldFeatures(model, heads, loader, process_group=process_group)
    fits = [_fit(head, features, index, options) for index, head in enumerate(heads)]
    states = [
        fit.head.state_of(head.projection, features.scatters[index], keep_statistics=True) if fit.is_new else {}
        for index, (head, fit) in enumerate(zip(heads, fits, strict=True))
    ]
    with torch.no_grad():
        for head, fit, state in zip(heads, fits, states, strict=True):
            if fit.is_new:
                head.projection.load_state_dict(state)
                share_state_(head.projection, process_group=process_group)
            if fits[0].is_new:  # heads of one model have one scale
                share_first_(head.logit_scale.fill_(fits[0].logit_scale), process_group=process_group)
    return features.report(heads[0], fits[0].held_out)


def _fit(head: HypersphericalHead, features: HeldFeatures, index: int, options: FitOptions) -> Fit:
    prototypes, intercept = head.class_prototypes, layers_of(head.projection).has_intercept
    task = Task(
        index,
        rank=min(head.dim, head.num_classes),
        present=partial(UnitHead.of_projection, head.projection, prototypes),
        start=partial(start_with_prototypes, class_prototypes=prototypes, intercept=intercept),
        stand_in=partial(least_squares, class_prototypes=prototypes, intercept=intercept),
        asks_present=True,
        free_vectors=torch.zeros(0, dtype=torch.int64, device=prototypes.device),
        intercept=intercept,
    )
    return fit_unit_head(features, task, options)
