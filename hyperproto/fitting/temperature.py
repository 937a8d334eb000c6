"""The scale of cosines, or of logits, at which their probabilities suit labels best."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Scales between which the best one is looked for.
SCALE_BOUNDS = (1e-2, 1e4)

#: Scales at which the likelihood's slope is summed up, at even ratios. Between two of them it is a cubic to 1e-5.
NUM_SCALES = 61

#: Slopes below this, for each sample: the likelihood is flat there.
SMALLEST_SLOPE = 1e-12


class Slopes:
    """First and second derivative by s of the negative log-likelihood, summed batch by batch at a few scales.

    Attributes:
        scales: (K,) float64 on the CPU, as are the sums.
        slopes: (K,), which never fall.
        curvatures: (K,).
        total: () weights of all samples.
    """

    def __init__(self) -> None:
        self.scales = torch.from_numpy(np.geomspace(*SCALE_BOUNDS, NUM_SCALES))
        self.slopes, self.curvatures = torch.zeros_like(self.scales), torch.zeros_like(self.scales)
        self.total = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, cosines: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Count cosines (B, C) with labels (B,) or soft targets (B, C), and weights (B,) of the samples."""
        derivatives = slopes_of(cosines, target, self.scales.tolist())
        if weights is not None:
            derivatives = derivatives * weights
        sums = derivatives.sum(dim=2).cpu().double()
        self.slopes += sums[:, 0]
        self.curvatures += sums[:, 1]
        self.total += len(cosines) if weights is None else float(weights.sum())

    def tensors(self) -> list[Tensor]:
        """All that adding up the slopes of several processes means adding up."""
        return [self.slopes, self.curvatures, self.total]

    def best_scale(self) -> float:
        """Where the likelihood is largest: between the bounds, or one of them."""
        from scipy.interpolate import CubicHermiteSpline  # imported where it is needed: it takes long

        flat = SMALLEST_SLOPE * float(self.total)
        if self.slopes[0] > -flat:
            return SCALE_BOUNDS[0]
        if self.slopes[-1] < flat:
            return SCALE_BOUNDS[1]
        above = int((self.slopes > 0.0).int().argmax())
        interval = slice(above - 1, above + 1)
        curve = CubicHermiteSpline(
            self.scales[interval].log(), self.slopes[interval], (self.scales * self.curvatures)[interval]
        )
        return float(np.exp(curve.solve(0.0, extrapolate=False)[0]))


def slopes_of(cosines: Tensor, target: Tensor, scales: list[float]) -> Tensor:
    r"""First and second derivative by s of each sample's negative log-likelihood.

    $$ \operatorname{E}_{k \sim \operatorname{softmax}(s \cos_b)} \cos_{bk} - \cos_{b y_b}, \qquad
        \operatorname{Var}_{k \sim \operatorname{softmax}(s \cos_b)} \cos_{bk} $$

    Args:
        cosines: (B, C) float32.
        target: labels (B,), or soft targets (B, C), whose sums weigh the samples.
        scales: K numbers.

    Returns:
        (K, 2, B) float32.
    """
    if target.dim() == 1:
        weights, own = torch.ones_like(cosines[:, 0]), cosines.gather(1, target[:, None])
    else:
        weights = target.float().sum(dim=1)
        own = torch.linalg.vecdot(target.float(), cosines)[:, None] / weights[:, None].clamp_min(1e-30)
    # Differences, so that the mean of small ones does not drown in the rounding of cosines.
    gaps = cosines - own
    squares, exponents, shares = gaps.square(), gaps - gaps.amax(dim=1, keepdim=True), torch.empty_like(gaps)
    slopes = []
    for scale in scales:
        torch.mul(exponents, scale, out=shares).exp_()
        total = shares.sum(dim=1)
        mean = torch.linalg.vecdot(shares, gaps) / total
        variance = torch.linalg.vecdot(shares, squares) / total - mean.square()
        slopes.append(torch.stack([weights * mean, weights * variance]))
    return torch.stack(slopes)
