"""What labelled features say: a softmax classifier of low rank that does not follow every sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.fitting.lbfgs import SampleLoss, Samples
from hyperproto.fitting.unit_head import Coordinates
from hyperproto.precision import full_precision
from hyperproto.ranks import share_first_

#: Penalties that are tried, each from where the one before has led, until one makes the held-out samples less likely.
PENALTIES = tuple(0.1 * 0.5**k for k in range(16))

#: The one that is taken where nothing is held out.
BLIND_PENALTY = PENALTIES[2]

#: Square of the factors' first singular values, as a share of those of the class means.
START = 0.01

#: Iterations in a round, and the share of the objective that a round has to gain to be followed by another: while
#: penalties are compared, and at the end.
AT_A_TIME, SEARCH_GAIN, FINAL_GAIN = 10, 5e-3, 1e-3


@dataclass(frozen=True)
class Teacher:
    r"""A softmax classifier of rank r, $V (U \tilde x) + b$, over features in coordinates.

    Attributes:
        coordinates: of the features.
        vectors: (C, r) V.
        matrix: (r, F) U.
        bias: (C,) b.
        penalty: lambda with which it was fitted.
    """

    coordinates: Coordinates
    vectors: Tensor
    matrix: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        rows = self.coordinates.project(features, self.matrix)
        with full_precision(rows.device):
            return F.linear(rows, self.vectors, self.bias)

    def scale(self, samples: Samples) -> float:
        """What it multiplies cosines by: the length of U x times that of the label's class vector, in the mean."""
        lengths = self.vectors.norm(dim=1)

        def product(features: Tensor, labels: Tensor) -> Tensor:
            return self.coordinates.project(features, self.matrix).norm(dim=1) * lengths[labels]

        return samples.mean(product)


def find_teacher(
    start: Teacher, fit: Samples, held_out: Samples | None, log_prior: Tensor, *, iterations: int
) -> Teacher:
    r"""The classifier whose penalty makes held-out samples likeliest.

    $$
    \min_{U, V, b} \; \sum_i w_{y_i} \operatorname{CE}(V U \tilde x_i + b + \log \pi, y_i)
        + \tfrac\lambda2 \left( \lVert U \rVert^2 + \lVert V \rVert^2 + \lVert b \rVert^2 \right)
    $$

    The penalty on both factors is one on the sum of the singular values of V U, so that directions which little speaks
    for vanish.

    Args:
        start: as `first_teacher` makes it.
        fit: samples to fit to.
        held_out: others, whose labels count alike; or None: then the penalty is `BLIND_PENALTY`.
        log_prior: (C,) log pi, of labels in the training data; zeros where they count alike.
        iterations: at most so many of L-BFGS for each penalty.

    References:
        Srebro, Rennie, Jaakkola, Maximum-margin matrix factorization, 2004 (the penalty on two factors).
    """
    if held_out is None:
        return refined(replace(start, penalty=BLIND_PENALTY), fit, log_prior, iterations=iterations)
    teacher, best, lowest = start, start, math.inf
    for penalty in PENALTIES:
        teacher = refined(
            replace(teacher, penalty=penalty), fit, log_prior, iterations=iterations, smallest_gain=SEARCH_GAIN
        )
        reached = held_out.mean(_loss(teacher, torch.zeros_like(log_prior)))
        if not reached < lowest:
            break
        best, lowest = teacher, reached
    return best


def refined(
    teacher: Teacher, fit: Samples, log_prior: Tensor, *, iterations: int, smallest_gain: float = FINAL_GAIN
) -> Teacher:
    """The same fitted further, with its penalty; as it was where that leads to what is not finite."""
    parameters = [each.clone().requires_grad_(True) for each in (teacher.vectors, teacher.matrix, teacher.bias)]
    fitted = replace(teacher, vectors=parameters[0], matrix=parameters[1], bias=parameters[2])
    fit.descend(
        _loss(fitted, log_prior),
        parameters,
        iterations=iterations,
        at_a_time=AT_A_TIME,
        penalty=teacher.penalty,
        smallest_gain=smallest_gain,
    )
    if not all(bool(each.isfinite().all()) for each in parameters):
        return teacher
    vectors, matrix, bias = (each.detach() for each in parameters)
    return replace(fitted, vectors=vectors, matrix=matrix, bias=bias)


def first_teacher(coordinates: Coordinates, fit: Samples, num_classes: int, rank: int) -> Teacher:
    """Where the search begins: the leading components of the class means, short."""
    device = fit.weights.device
    sums = torch.zeros(num_classes, len(coordinates.centre), device=device)
    counts = torch.zeros(num_classes, device=device)
    for features, labels in fit.batches:
        sums.index_add_(0, labels, coordinates.of(features))
        counts += labels.bincount(minlength=num_classes)
    fit.add_up([sums, counts])
    seen = counts > 0
    means = sums / counts.clamp_min(1.0)[:, None]
    means = torch.where(seen[:, None], means - means[seen].mean(dim=0), 0.0).cpu().double()
    left, lengths, right = torch.linalg.svd(means, full_matrices=False)
    rank = min(rank, len(lengths))
    roots = (START * lengths[:rank]).sqrt()
    vectors, matrix = left[:, :rank] * roots, roots[:, None] * right[:rank]
    vectors, matrix = (each.float().contiguous().to(device) for each in (vectors, matrix))
    for factor in (vectors, matrix):
        share_first_(factor, process_group=fit.process_group)
    return Teacher(coordinates, vectors, matrix, torch.zeros(num_classes, device=device), math.inf)


def _loss(teacher: Teacher, log_prior: Tensor) -> SampleLoss:
    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(teacher.logits(features) + log_prior, labels, reduction="none")

    return loss
