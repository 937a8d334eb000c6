"""What fewer dimensions can keep of a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperproto.affine import set_affine_
from hyperproto.fitting.statistics import ClassScatter
from hyperproto.projection import build_projection

#: A component that varies by less than this share of the largest is rounding, and is not blown up to its length.
SMALLEST_DEVIATION = 1e-6


@torch.no_grad()
def principal_components(to_logits: Tensor, scatter: ClassScatter, dim: int) -> tuple[nn.Module, Tensor]:
    """A projection onto the leading principal components of a classifier's logits, and class vectors to go with it.

    Those of the logits over the samples: directions of the weights alone may be such as no sample tells apart.

    Args:
        to_logits: (C, F) float64, the classifier's weights.
        scatter: of the features.
        dim: D, at most C.

    Returns:
        "linear+bn" in eval mode, whose batch norm standardises the components, and vectors (C, D) float32, both on the
        CPU. The vectors' products with what is projected are the logits less their mean, as far as D dimensions hold
        them.
    """
    variances, directions = torch.linalg.eigh(to_logits @ scatter.sample_covariance @ to_logits.T)
    leading = directions.flip(1)[:, :dim]  # (C, D)
    deviations = variances.flip(0)[:dim].clamp_min(0.0).sqrt()
    divisors = deviations.clamp_min(SMALLEST_DEVIATION * float(deviations.max()))
    matrix = leading.T @ to_logits / divisors[:, None]  # (D, F)
    mean, covariance = scatter.sample_mean, scatter.sample_covariance
    projection = build_projection("linear+bn", to_logits.shape[1], dim, seed=0).eval()
    set_affine_(projection, matrix, torch.zeros_like(deviations), centre=mean, mean=mean, covariance=covariance)
    return projection, (leading * deviations).float().contiguous()
