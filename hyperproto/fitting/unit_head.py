"""A head as the fits see it: tensors in coordinates in which lengths mean something, and how it does on samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.affine import affine, affine_state
from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.statistics import ClassScatter
from hyperproto.fitting.temperature import ScaleCurves
from hyperproto.precision import full_precision
from hyperproto.ranks import decided_by_first, share_first_
from hyperproto.sphere import normalise


@dataclass(frozen=True)
class Coordinates:
    """Features about a centre, with a mean squared length of F.

    Attributes:
        centre: (F,) float32, the mean of the class means, or zero.
        inverse_spread: what offsets from it are multiplied by.
    """

    centre: Tensor
    inverse_spread: float

    @classmethod
    def of_samples(cls, scatter: ClassScatter, samples: Samples, *, centred: bool) -> Coordinates:
        """Those of samples as they count; not centred where a projection has no intercept to make up for it.

        Args:
            scatter: of the samples.
            samples: they themselves.
            centred: whether the centre is the mean of the class means, or zero.
        """
        mean = scatter.centre
        centre = (mean if centred else torch.zeros_like(mean)).float().to(samples.weights.device)
        share_first_(centre, process_group=samples.process_group)
        # Of about this size, so that no square leaves the range of float32.
        moment = float(scatter.balanced.trace()) + (0.0 if centred else float(mean.square().sum()))
        rough = cls(centre, math.sqrt(len(mean) / moment))
        mean_square = samples.mean(lambda features, labels: rough.of(features).square().mean(dim=1))
        inverse_spread = rough.inverse_spread / math.sqrt(mean_square) if mean_square > 0.0 else rough.inverse_spread
        return cls(centre, decided_by_first(lambda: inverse_spread, centre.device, process_group=samples.process_group))

    def of(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, F)."""
        return (features - self.centre) * self.inverse_spread

    def project(self, features: Tensor, matrix: Tensor) -> Tensor:
        """(N, F), (D, F) -> (N, D), the products of a matrix with features in these coordinates."""
        with full_precision(features.device):
            return F.linear(features - self.centre, matrix * self.inverse_spread)


@dataclass(frozen=True)
class UnitHead:
    """A projection and class vectors, of which directions count.

    Attributes:
        coordinates: of the features.
        matrix: (D, F) float32.
        offset: (D,) float32; zero where the projection has no intercept.
        vectors: (C, D) float32.
    """

    coordinates: Coordinates
    matrix: Tensor
    offset: Tensor
    vectors: Tensor

    @classmethod
    def of_projection(cls, projection: nn.Module, class_prototypes: Tensor, coordinates: Coordinates) -> UnitHead:
        """What a head computes in eval mode.

        Raises:
            ArgumentError: its projection is not affine.
        """
        matrix, shift = affine(projection, len(coordinates.centre))
        offset = shift + matrix @ coordinates.centre.cpu().double()
        device = class_prototypes.device
        matrix, offset = (matrix / coordinates.inverse_spread).float().to(device), offset.float().to(device)
        return cls(coordinates, matrix, offset, class_prototypes)

    def cosines(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        embeddings = normalise(self.coordinates.project(features, self.matrix) + self.offset)
        with full_precision(embeddings.device):
            return F.linear(embeddings, normalise(self.vectors))

    def state_of(self, projection: nn.Module, scatter: ClassScatter, *, keep_statistics: bool) -> dict[str, Tensor]:
        """The `state_dict` with which a projection computes this one's, up to its length; see `affine_state`."""
        return affine_state(
            projection,
            self.coordinates.inverse_spread * self.matrix.cpu().double(),
            self.offset.cpu().double(),
            centre=self.coordinates.centre.cpu().double(),
            mean=scatter.sample_mean,
            covariance=scatter.sample_covariance,
            keep_statistics=keep_statistics,
        )


@dataclass(frozen=True)
class Score:
    """How cosines do on samples.

    Attributes:
        accuracy: weighted share of the samples with the right answer.
        log_loss: weighted mean of the negative log-likelihood, at the scale where it is smallest; infinity where the
            cosines are not finite.
        logit_scale: the one at which mean confidence is accuracy; a bound where there is none.
    """

    accuracy: float
    log_loss: float
    logit_scale: float

    def is_better_than(self, other: Score, *, num_samples: int) -> bool:
        """Whether samples are likelier, and not fewer right by more than a standard error of so many."""
        chance = standard_error(other.accuracy, num_samples)
        return self.log_loss < other.log_loss and self.accuracy >= other.accuracy - chance


def standard_error(accuracy: float, num_samples: int) -> float:
    """Of an accuracy over so many samples."""
    return math.sqrt(max(0.0, accuracy * (1.0 - accuracy)) / num_samples)  # rounded, 1 may be more


@torch.no_grad()
def score(head: UnitHead, samples: Samples) -> Score:
    """How a head does on all ranks' samples."""
    curves = ScaleCurves()
    for features, labels in samples.batches:
        curves.add(head.cosines(features), labels, samples.weights[labels])
    samples.add_up(curves.tensors())
    if not curves.are_finite():
        return Score(float(curves.correct), math.inf, 1.0)
    scale = curves.best_scale("likelihood")

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * head.cosines(features), labels, reduction="none")

    return Score(float(curves.correct), samples.mean(loss), curves.best_scale("confidence"))


@torch.no_grad()
def difference(first: UnitHead, second: UnitHead, samples: Samples) -> float:
    """Mean square of the differences between two heads' cosines on all ranks' samples."""

    def square(features: Tensor, labels: Tensor) -> Tensor:
        return (first.cosines(features) - second.cosines(features)).square().mean(dim=1)

    return samples.mean(square)
