"""What fewer dimensions can keep of a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.fitting.statistics import ClassScatter
from hyperproto.fitting.unit_head import Coordinates, UnitHead

#: A component that varies by less than this share of the largest is rounding, and is not blown up to its length.
SMALLEST_DEVIATION = 1e-6


def principal_components(to_logits: Tensor, scatter: ClassScatter, dim: int, coordinates: Coordinates) -> UnitHead:
    """A projection onto the leading principal components of a classifier's logits, and class vectors to go with it.

    Those of the logits over the samples: directions of the weights alone may be such as no sample tells apart.

    Args:
        to_logits: (C, F) float64, the classifier's weights.
        scatter: of the features.
        dim: D, at most C.
        coordinates: of the features.

    Returns:
        Its projection standardises the components, and the products of its vectors with what is projected are the
        logits less their mean, as far as D dimensions hold them.
    """
    variances, directions = torch.linalg.eigh(to_logits @ scatter.sample_covariance @ to_logits.T)
    leading = directions.flip(1)[:, :dim]  # (C, D)
    deviations = variances.flip(0)[:dim].clamp_min(0.0).sqrt()
    divisors = deviations.clamp_min(SMALLEST_DEVIATION * float(deviations.max()))
    matrix = leading.T @ to_logits / (coordinates.inverse_spread * divisors[:, None])  # (D, F)
    offset = leading.T @ (to_logits @ (coordinates.centre.cpu().double() - scatter.sample_mean)) / divisors
    parts = (matrix, offset, leading * deviations)
    matrix, offset, vectors = (part.float().contiguous().to(coordinates.centre.device) for part in parts)
    return UnitHead(coordinates, matrix, offset, vectors)
