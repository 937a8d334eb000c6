"""How well prototypes are separated: the report of a bank, and the temperature that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.bounds import cosine_lower_bound
from hyperproto.constructions.code import choose_code
from hyperproto.sphere import largest_cosines, sampled_largest_cosines

#: Up to here `report` compares every pair, in blocks; the time for that grows with P^2 D.
MOST_COMPARED_PROTOTYPES = 50_000
#: Beyond, prototypes that are compared with all the others.
SAMPLED_PROTOTYPES = 1024

#: A sample exactly on its prototype gets this probability under the default logit scale, or less.
PLACED_PROBABILITY = 0.99

#: Prototypes count as at least this far apart, by 1 less the mean cosine: overlapping ones would ask for any scale.
SMALLEST_GAP = 0.05


@dataclass(frozen=True)
class BankReport:
    """How well a bank's prototypes are separated, beside what is possible.

    Attributes:
        max_cosine: the largest cosine between two prototypes; the smaller, the better.
        mean_max_cosine: mean over prototypes of the largest cosine to another.
        min_angle_deg: the angle of the nearest pair, in degrees.
        lower_bound: no bank of this size has a smaller `max_cosine`.
        bound_name: "rankin" (attained) or "levenshtein" (rarely attained).
        gap: `max_cosine` - `lower_bound`.
        mean_norm: length of the mean prototype; 0 if the bank favours no direction.
        source: where the cosines come from: "all pairs", the code's "weight distribution" (an upper bound where the
            code was shortened), or "sample" (of 1024 prototypes against all: the true maximum may be larger).
    """

    max_cosine: float
    mean_max_cosine: float
    min_angle_deg: float
    lower_bound: float
    bound_name: str
    gap: float
    mean_norm: float
    source: str

    def __str__(self) -> str:
        return (
            f"largest cosine {self.max_cosine:.4f} (nearest pair {self.min_angle_deg:.1f} degrees apart), "
            f"lower bound {self.lower_bound:.4f} ({self.bound_name}), gap {self.gap:.4f}; "
            f"mean over rows {self.mean_max_cosine:.4f}; length of the mean {self.mean_norm:.4f} "
            f"(from {self.source})"
        )


@torch.no_grad()
def report_separation(prototypes: Tensor, method: str) -> BankReport:
    """The report of prototypes (P, D) that were made by a method of `PrototypeBank`; see `PrototypeBank.report`."""
    max_cosine, mean_max_cosine, source = _largest_cosines(prototypes, method)
    lower_bound, bound_name = cosine_lower_bound(*prototypes.shape)
    return BankReport(
        max_cosine=max_cosine,
        mean_max_cosine=mean_max_cosine,
        min_angle_deg=math.degrees(math.acos(max_cosine)),
        lower_bound=lower_bound,
        bound_name=bound_name,
        gap=max_cosine - lower_bound,
        mean_norm=float(prototypes.mean(dim=0).norm()),
        source=source,
    )


@torch.no_grad()
def default_logit_scale(prototypes: Tensor, num_classes: int) -> float:
    r"""The scale that heads and cross-entropy have by default: the logit gap that a perfectly placed sample needs.

    $$
    s = \min\left(a, \sqrt{D} \max\left(1, \frac{a}{\sqrt{C - 1}}\right)\right), \qquad
    a = \frac{\log\left((C - 1) \, p / (1 - p)\right)}{1 - \rho}, \qquad p = 0.99
    $$

    with rho the mean cosine of two prototypes. A sample exactly on its prototype is ahead of the others by a (1 - rho)
    on average; at the scale a it gets the probability p from a simplex, and at most p from any other bank (Jensen).

    The other bound is for samples that are not there yet. Over the classes the logits of any sample have a standard
    deviation of about s / sqrt(D); in few dimensions a scale for placed samples would spread them so far that chance
    decides. They may spread by 1, or as far as on the simplex, which has C - 1 dimensions: there both bounds agree.
    docs/training.md has the measurements behind this.

    Args:
        prototypes: (P, D) unit rows; without values (on the device "meta") they count as favouring no direction.
        num_classes: C, at least 2.

    Examples:
        >>> corners = torch.eye(100) - 0.01  # of a regular simplex
        >>> round(default_logit_scale(corners / corners.norm(dim=1, keepdim=True), 100), 2)
        9.1

    References:
        Wang et al., NormFace, ACM Multimedia 2017, section 3.3 (the first bound, for class vectors that train).
    """
    count, dim = prototypes.shape
    squared_mean = 0.0 if prototypes.is_meta else float(prototypes.float().mean(dim=0).square().sum())
    scale = placed_scale(num_classes, rho=(count * squared_mean - 1.0) / (count - 1))
    return min(scale, math.sqrt(dim) * max(1.0, scale / math.sqrt(num_classes - 1)))


def placed_scale(num_classes: int, *, rho: float) -> float:
    """The bound a of `default_logit_scale` from C, at least 2, and the mean cosine of two prototypes."""
    odds = PLACED_PROBABILITY / (1.0 - PLACED_PROBABILITY)
    return math.log((num_classes - 1) * odds) / max(1.0 - rho, SMALLEST_GAP)


def _largest_cosines(prototypes: Tensor, method: str) -> tuple[float, float, str]:
    """Largest cosine, mean over rows of the largest cosine, and where both come from."""
    if len(prototypes) <= MOST_COMPARED_PROTOTYPES:
        row_maxima, source = largest_cosines(prototypes), "all pairs"
    elif method == "code":
        cosine = choose_code(*prototypes.shape).largest_cosine
        return cosine, cosine, "weight distribution"
    else:
        row_maxima, source = sampled_largest_cosines(prototypes, SAMPLED_PROTOTYPES), "sample"
    return min(1.0, max(-1.0, float(row_maxima.max()))), float(row_maxima.mean()), source


def is_simplex(prototypes: Tensor) -> bool:
    """Whether unit rows (P, D) are all at one angle from each other, as far apart as P rows can be."""
    num_prototypes, dim = prototypes.shape
    if num_prototypes > dim + 1:
        return False
    # Only a simplex reaches Rankin's bound in every row.
    return bool((largest_cosines(prototypes) + 1.0 / (num_prototypes - 1)).abs().max() < 1e-5)
