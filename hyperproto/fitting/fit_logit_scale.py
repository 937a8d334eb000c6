"""The temperature of the probabilities, fitted on data that the model was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.errors import ArgumentError
from hyperproto.fitting.features import evaluating, run_batches, unwrapped
from hyperproto.head import HypersphericalHead, require_heads
from hyperproto.ranks import ProcessGroup, add_up_ranks, check_member

#: Scales between which the best one is looked for.
SCALE_BOUNDS = (1e-2, 1e4)


def fit_logit_scale(model: nn.Module, loader: Iterable[Any], *, process_group: ProcessGroup | None = None) -> float:
    r"""Scale s that minimises the negative log-likelihood of held-out data; set on the model's heads in place.

    $$ s = \arg\min_s \; -\frac1N \sum_b \log \operatorname{softmax}(s \, \cos_b)_{y_b} $$

    One pass in eval mode without gradients; modes and the global generator are as before afterwards. The ranking of
    classes does not change, only how sure the probabilities are. Use data apart from training and test set. Under
    torch.distributed every rank must call it, each with its share of the data or all with the same: all take rank 0's
    buffers first, as DistributedDataParallel does, and arrive at the same scale.

    Args:
        model: a converted model, bare or wrapped, or a head.
        loader: batches whose first two items are inputs and labels (N,) int64 (or soft targets).
        process_group: the ranks that share out the data; by default all.

    Returns:
        s, within [1e-2, 1e4].

    Raises:
        HeadNotFoundError: the model has no hyperspherical head.
        ArgumentError: the loader is empty, or the model's outputs are not finite; the old scale stays.

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> features = torch.randn(64, 8)
        >>> scale = fit_logit_scale(head, [(features, head(features).argmax(dim=1))])
        >>> scale == float(head.logit_scale)
        True

    References:
        Guo et al., On calibration of modern neural networks, ICML 2017 (temperature scaling).
    """
    from scipy.optimize import minimize_scalar

    heads = require_heads(model)
    check_member(process_group)
    device = heads[0].assignment.device
    cosines, target = _collect_cosines(unwrapped(model), heads[0], loader, process_group)

    def negative_log_likelihood(log_scale: float) -> float:
        loss = F.cross_entropy(math.exp(log_scale) * cosines, target, reduction="sum")
        total = loss.reshape(1)
        add_up_ranks([total], device, process_group=process_group)
        return float(total)

    bounds = tuple(math.log(bound) for bound in SCALE_BOUNDS)
    scale = math.exp(minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)
    for head in heads:
        head.logit_scale.fill_(scale)
    return float(heads[0].logit_scale)


@torch.no_grad()
def _collect_cosines(
    model: nn.Module, head: HypersphericalHead, loader: Iterable[Any], process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(N, C) cosines and the targets of a whole loader, on the CPU; N may be 0 on ranks that have none."""
    cosines, targets = [torch.zeros(0, head.num_classes, device="cpu")], []
    with evaluating(model, process_group=process_group):
        for output, target in run_batches(model, loader, head):
            cosines.append(head.read(output).cosines().cpu())
            targets.append(target)
    gathered = torch.cat(cosines).double()
    checks = torch.tensor([len(gathered), (~torch.isfinite(gathered)).sum()], dtype=torch.float64, device="cpu")
    add_up_ranks([checks], head.assignment.device, process_group=process_group)
    num_samples, num_wrong = checks.tolist()
    if not num_samples:
        raise ArgumentError("the loader gave no samples: the scale needs held-out data to be fitted on.")
    if num_wrong:
        raise ArgumentError("the model returned NaN or infinite logits; the scale is unchanged.")
    return gathered, torch.cat(targets) if targets else torch.zeros(0, dtype=torch.int64, device="cpu")
