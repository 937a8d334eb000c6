"""The temperature of the probabilities, fitted on data that the model was not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn

from hyperproto.arguments import choice
from hyperproto.errors import ArgumentError
from hyperproto.fitting.features import checking, evaluating, run_batches
from hyperproto.fitting.temperature import SCALE_BOUNDS, Match, ScaleCurves
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads, unwrapped
from hyperproto.ranks import ProcessGroup, add_up_ranks, share_first_
from hyperproto.telling import tell


def fit_logit_scale(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    match: Match = "confidence",
    process_group: ProcessGroup | None = None,
) -> float:
    r"""Scale s at which held-out samples are as often right as they are sure; set on the model's heads in place.

    $$
    \frac1N \sum_b \max_k \operatorname{softmax}(s \, \cos_b)_k = \frac1N \sum_b [\arg\max_k \cos_{bk} = y_b]
        \qquad \text{or} \qquad
    s = \arg\min_s \; -\frac1N \sum_b \log \operatorname{softmax}(s \, \cos_b)_{y_b}
    $$

    The second is temperature scaling as published. Unit embeddings have no length by which a sample could say how sure
    it is: where that makes their likelihood a poor model, its maximum is where probabilities are too small or too large
    on the whole. The first equation is right on average then (docs/results_pretrained.md compares both). It takes of
    each sample only whether it is right: where there are few samples for many classes, or few right ones, the
    likelihood says more.

    One pass in eval mode without gradients; modes and the global generator are as before afterwards. The ranking of
    classes does not change, only how sure the probabilities are. Use data apart from training and test set. Memory:
    that of one batch; curves that never fall with s are summed up at scales between which they are interpolated.
    Where there is no such scale in the interval, a `HyperprotoWarning` says so, and s is the bound. Under
    torch.distributed every rank must call it, each with its share of the data or all with the same: all take rank 0's
    buffers first, as DistributedDataParallel does, and arrive at the same scale.

    Args:
        model: a converted model, bare or wrapped, or a head.
        loader: as for `fit_head`. Soft targets count by the share that they give to the largest cosine.
        match: "confidence", the first equation, or "likelihood", the second.
        process_group: the ranks that share out the data; by default all.

    Returns:
        s, within [1e-2, 1e4].

    Raises:
        HeadNotFoundError: the model has no hyperspherical head.
        ArgumentError: another `match`, the loader is empty, or the model's outputs are not finite; the old scale stays.

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> features = torch.randn(64, 8)
        >>> labels = torch.multinomial(head(features).softmax(dim=1), 1)[:, 0]
        >>> scale = fit_logit_scale(head, (features, labels))
        >>> scale == float(head.logit_scale)
        True

    References:
        Guo et al., On calibration of modern neural networks, ICML 2017 (temperature scaling).
    """
    with checking(model, process_group=process_group):
        heads = require_heads(model)
        choice(match, "match", get_args(Match))
    scale = _sum_curves(unwrapped(model), heads[0], loader, process_group).best_scale(match)
    if scale == SCALE_BOUNDS[0]:
        tell(
            f"fit_logit_scale: the smaller the scale the better, down to the bound of {scale:g}: the model predicts "
            "nothing of these labels. Train it first, and check that the labels are numbered as in training."
        )
    elif scale == SCALE_BOUNDS[1]:
        tell(
            f"fit_logit_scale: the larger the scale the better, up to the bound of {scale:g}: the model is right on "
            "all of these samples, and their probabilities become 1. Fit on data that the model was not trained on, "
            "and on more of them."
        )
    with torch.no_grad():  # a scale may be a parameter
        for head in heads:
            share_first_(head.logit_scale.fill_(scale), process_group=process_group)
    return float(heads[0].logit_scale.detach())


@torch.no_grad()
def _sum_curves(
    model: nn.Module, head: HypersphericalHead, loader: Iterable[Any], process_group: ProcessGroup | None
) -> ScaleCurves:
    """What all ranks' samples say of each scale.

    Args:
        model: not wrapped.
        head: the first of the model's.
        loader: of this rank; it may be empty.
        process_group: the ranks that share out the data.

    Raises:
        ArgumentError: no samples, or outputs that are not finite.
    """
    curves = ScaleCurves()
    counts = torch.zeros(2, dtype=torch.float64, device="cpu")  # samples, and values that are not finite
    with evaluating(model, process_group=process_group):
        for output, target in run_batches(model, loader, head):
            readout = head.read(output)
            target = readout.read_target(target.to(readout.output.device)).values
            cosines = readout.cosines()
            counts += torch.tensor([len(cosines), int((~torch.isfinite(cosines)).sum())], device="cpu")
            curves.add(cosines, target)
    add_up_ranks([counts, *curves.tensors()], head.assignment.device, process_group=process_group)
    num_samples, num_wrong = counts.tolist()
    if not num_samples:
        raise ArgumentError("the loader gave no samples: the scale needs held-out data to be fitted on.")
    if num_wrong:
        raise ArgumentError("the model returned NaN or infinite logits; the scale is unchanged.")
    return curves
