"""The gradient is that of the value, in float32 and for every sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.testing.requirements import require
from hyperproto.testing.subject import Subject


def has_the_gradient_of_its_value(subject: Subject) -> None:
    """A step along the sphere changes the loss as the gradient says: it reaches the output, and points downhill."""
    batch = subject.balanced()
    _, gradient = subject.total_and_gradient(batch.embeddings, batch.labels)
    for seed in (1, 2, 3):
        direction = _tangent(batch.embeddings, subject.random(len(batch), seed))
        said = float((gradient.double() * direction).sum())
        # One of the steps suits the curvature, which grows with the inverse temperature.
        slopes = [_slope(subject, batch.embeddings, direction, batch.labels, step) for step in (1e-2, 1e-3, 1e-4)]
        if any(abs(slope - said) <= 0.03 * max(abs(slope), abs(said)) for slope in slopes):
            continue
        if said * slopes[0] < 0:
            fault = "the gradient points away from the label"
        else:
            fault = "a wrong gradient, or a value that is not computed in float32"
        raise AssertionError(f"{fault}: the gradient says a slope of {said:.4g} where the value has {slopes[0]:.4g}")


def computes_in_float32(subject: Subject) -> None:
    """A step of 1e-4 changes the loss of a sample by what the gradient says; half precision cannot tell."""
    step, batch = 1e-4, subject.misplaced()
    samples = [batch[row : row + 1] for row in range(8)]
    gradients = [subject.total_and_gradient(sample.embeddings, sample.labels)[1] for sample in samples]
    steepest = max(float(gradient.norm()) for gradient in gradients)
    for sample, gradient in zip(samples, gradients, strict=True):
        direction = F.normalize(_tangent(sample.embeddings, gradient))
        said = float((gradient.double() * direction).sum())
        got = _difference(subject, sample.embeddings, direction, sample.labels, step) / (2 * step)
        require(
            abs(got - said) <= 0.2 * abs(said) + 0.01 * steepest,
            f"the loss is not computed in float32: a step of {step} changes it by {step * got:.3g}, not "
            f"{step * said:.3g}",
        )


def counts_every_sample(subject: Subject) -> None:
    """Each sample that is not at its prototype has a gradient."""
    batch = subject.misplaced()
    for target in (batch.labels, subject.one_hot(batch.labels)):
        _, gradient = subject.total_and_gradient(batch.embeddings, target)
        left_out = torch.nonzero(~gradient.any(dim=1)).flatten().tolist()
        require(len(left_out) < len(batch), "no gradient reaches the output")
        some = f"{len(left_out)} of {len(batch)} samples, the first at {left_out[:5]}"
        require(not left_out, f"only a part of the batch counts: no gradient for {some}")


def _tangent(embeddings: Tensor, direction: Tensor) -> Tensor:
    return direction - (direction * embeddings).sum(dim=1, keepdim=True) * embeddings


def _difference(subject: Subject, embeddings: Tensor, direction: Tensor, target: Tensor, step: float) -> float:
    """Change of the total from one step backward to one step forward along the sphere."""
    ahead, behind = (F.normalize(embeddings.double() + way * step * direction).float() for way in (1, -1))
    return float((subject.total(ahead, target) - subject.total(behind, target)).detach())


def _slope(subject: Subject, embeddings: Tensor, direction: Tensor, target: Tensor, step: float) -> float:
    """Fourth-order difference quotient of the total."""
    near, far = (_difference(subject, embeddings, direction, target, times * step) for times in (1, 2))
    return (8 * near - far) / (12 * step)
