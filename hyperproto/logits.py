"""What makes logits of embeddings: scaled cosines with the assigned prototypes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.bank import PrototypeBank
from hyperproto.geometry import sampled_largest_cosines
from hyperproto.precision import full_precision

#: A sample exactly on its prototype gets about this probability under the default logit scale.
PLACED_PROBABILITY = 0.99


def scaled_cosines(embeddings: Tensor, prototypes: Tensor, assignment: Tensor, scale: Tensor) -> Tensor:
    """Scale * <z, w_assignment[k]> in float32: (..., D), (P, D), (C,), () -> (..., C)."""
    if torch.jit.is_scripting():
        return F.linear(embeddings.float(), prototypes[assignment]) * scale
    else:
        with full_precision(embeddings.device):
            return F.linear(embeddings.float(), prototypes[assignment]) * scale


def default_logit_scale(bank: PrototypeBank, num_classes: int) -> float:
    r"""The scale at which a sample exactly on its prototype gets a probability of about 0.99.

    $$ s = \frac{\log\left((C - 1) \, p / (1 - p)\right)}{1 - \rho}, \qquad p = 0.99 $$

    With every other cosine at rho this is the softmax solved for s. rho is the mean over prototypes of the largest
    cosine to another (exact for a simplex; elsewhere most cosines are smaller, so that the probability is larger).
    Overlapping prototypes would ask for any scale at all: 1 - rho counts as at least 0.05.

    Args:
        bank: the prototypes.
        num_classes: C, at least 2.

    Examples:
        >>> round(default_logit_scale(PrototypeBank(100, 99), 100), 2)
        9.1
    """
    # A few hundred rows tell the mean; the cost must not grow with the square of a bank of a million.
    prototypes = bank.prototypes
    rho = 0.0 if prototypes.is_meta else float(sampled_largest_cosines(prototypes, 256).mean())
    odds = PLACED_PROBABILITY / (1.0 - PLACED_PROBABILITY)
    return math.log((num_classes - 1) * odds) / max(1.0 - rho, 0.05)
