"""The temperature of the probabilities, fitted on data that the model was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.errors import ArgumentError, ShapeError
from hyperproto.fitting.features import eval_mode
from hyperproto.head import HypersphericalHead, require_heads
from hyperproto.targets import check_target

#: Scales between which the best one is looked for.
SCALE_BOUNDS = (1e-2, 1e4)


def fit_logit_scale(model: nn.Module, loader: Iterable[Any]) -> float:
    r"""Scale s that minimises the negative log-likelihood of held-out data; set on the model's heads in place.

    .. math:: s = \arg\min_s \; -\frac1N \sum_b \log \operatorname{softmax}(s \, \cos_b)_{y_b}

    One pass in eval mode without gradients; train and eval modes are as before afterwards. The ranking of classes does
    not change, only how sure the probabilities are. Use data apart from training and test set.

    Args:
        model: a converted model, or a head.
        loader: batches whose first two items are inputs and labels (N,) int64 (or soft targets).

    Returns:
        s, within [1e-2, 1e4].

    Raises:
        HeadNotFoundError: the model has no hyperspherical head.
        ArgumentError: the loader is empty, or the model's outputs are not finite; the old scale stays.

    Example:
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
    cosines, target = _collect_cosines(model, heads[0], loader)

    def negative_log_likelihood(log_scale: float) -> float:
        return float(F.cross_entropy(math.exp(log_scale) * cosines, target))

    bounds = tuple(math.log(bound) for bound in SCALE_BOUNDS)
    scale = math.exp(minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)
    for head in heads:
        head.logit_scale.fill_(scale)
    return float(heads[0].logit_scale)


@torch.no_grad()
def _collect_cosines(model: nn.Module, head: HypersphericalHead, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """(N, C) cosines and the targets of a whole loader, on the CPU."""
    device = head.assignment.device
    cosines, targets = [], []
    with eval_mode(model):
        for images, target, *_ in loader:
            output = model(images.to(device))
            if not isinstance(output, Tensor) or output.dim() != 2:
                raise ShapeError(f"expected the model to return logits (B, C) in eval mode, got {type(output)}.")
            check_target(target, len(output), head.num_classes)
            cosines.append((output.float() / head.logit_scale).cpu())
            targets.append(target.cpu())
    if not cosines or not sum(map(len, cosines)):
        raise ArgumentError("the loader gave no samples: the scale needs held-out data to be fitted on.")
    gathered = torch.cat(cosines).double()
    if not bool(torch.isfinite(gathered).all()):
        raise ArgumentError("the model returned NaN or infinite logits; the scale is unchanged.")
    return gathered, torch.cat(targets)
