"""The scale of cosines, or of logits, at which their probabilities suit labels best."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

#: What a scale is fitted to.
Match = Literal["likelihood", "confidence"]

#: Scales between which the best one is looked for.
SCALE_BOUNDS = (1e-2, 1e4)

#: Scales at which the curves are summed up, at even ratios. Between two of them the likelihood's slope is a cubic to
#: 1e-5.
NUM_SCALES = 61

#: Slopes below this, for each sample: the likelihood is flat there.
SMALLEST_SLOPE = 1e-12

#: Accuracy and confidence nearer to each other than this are equal: sums are of float32.
SMALLEST_GAP = 1e-6


class ScaleCurves:
    """What samples say of each scale, summed batch by batch at a few of them.

    Attributes:
        scales: (K,) float64 on the CPU, as are the sums.
        curves: (4, K): first and second derivative by s of the negative log-likelihood, the first of which never falls;
            the largest probability, which never falls, and its derivative.
        correct: () weights of the samples whose largest cosine is that of their label.
        total: () weights of all samples.
    """

    def __init__(self) -> None:
        self.scales = torch.from_numpy(np.geomspace(*SCALE_BOUNDS, NUM_SCALES))
        self.curves = torch.zeros(4, NUM_SCALES, dtype=torch.float64, device="cpu")
        self.correct, self.total = (torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(2))

    def add(self, cosines: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Count cosines (B, C) with labels (B,) or soft targets (B, C), and weights (B,) of the samples."""
        largest = cosines.argmax(dim=1, keepdim=True)
        if target.dim() == 1:
            own, shares = cosines.gather(1, target[:, None])[:, 0], torch.ones_like(cosines[:, 0])
            correct = (largest[:, 0] == target).float()
        else:
            target, shares = target.float(), target.float().sum(dim=1)
            own = torch.linalg.vecdot(target, cosines) / shares.clamp_min(1e-30)
            correct = target.gather(1, largest)[:, 0] / shares.clamp_min(1e-30)
        weights = shares if weights is None else shares * weights
        self.curves += curves_of(cosines, own, weights, self.scales.tolist()).cpu().double()
        self.correct += float(correct @ weights)
        self.total += float(weights.sum())

    def tensors(self) -> list[Tensor]:
        """All that adding up those of several processes means adding up."""
        return [self.curves, self.correct, self.total]

    def are_finite(self) -> bool:
        """Whether all cosines were."""
        return bool(self.curves.isfinite().all())

    def best_scale(self, match: Match) -> float:
        """Where the likelihood is largest, or mean confidence is accuracy: between the bounds, or one of them."""
        total = float(self.total)
        if match == "likelihood":
            return self._root(self.curves[0], self.curves[1], SMALLEST_SLOPE * total)
        return self._root(self.curves[2] - self.correct, self.curves[3], SMALLEST_GAP * total)

    def _root(self, curve: Tensor, derivative: Tensor, flat: float) -> float:
        from scipy.interpolate import CubicHermiteSpline  # imported where it is needed: it takes long

        if curve[0] > -flat:
            return SCALE_BOUNDS[0]
        if curve[-1] < flat:
            return SCALE_BOUNDS[1]
        above = int((curve > 0.0).int().argmax())
        interval = slice(above - 1, above + 1)
        spline = CubicHermiteSpline(self.scales[interval].log(), curve[interval], (self.scales * derivative)[interval])
        return float(np.exp(spline.solve(0.0, extrapolate=False)[0]))


def curves_of(cosines: Tensor, own: Tensor, weights: Tensor, scales: list[float]) -> Tensor:
    r"""The sums of `ScaleCurves` over a batch.

    $$ \operatorname{E}_{k \sim \operatorname{softmax}(s \cos_b)} \cos_{bk} - \cos_{b y_b}, \qquad
        \operatorname{Var}_{k \sim \operatorname{softmax}(s \cos_b)} \cos_{bk}, \qquad
        \max_k \operatorname{softmax}(s \cos_b)_k $$

    and the derivative of the last.

    Args:
        cosines: (B, C) float32.
        own: (B,) cosines with the samples' labels.
        weights: (B,) of the samples.
        scales: K numbers.

    Returns:
        (4, K) float32.
    """
    # Differences, so that the mean of small ones does not drown in the rounding of cosines.
    gaps = cosines - own[:, None]
    largest = gaps.amax(dim=1)
    squares, exponents, shares = gaps.square(), gaps - largest[:, None], torch.empty_like(gaps)
    sums = []
    for scale in scales:
        torch.mul(exponents, scale, out=shares).exp_()
        confidence = 1.0 / shares.sum(dim=1)
        mean = torch.linalg.vecdot(shares, gaps) * confidence
        variance = torch.linalg.vecdot(shares, squares) * confidence - mean.square()
        sums.append(torch.stack([mean, variance, confidence, confidence * (largest - mean)]) @ weights)
    return torch.stack(sums, dim=1)
