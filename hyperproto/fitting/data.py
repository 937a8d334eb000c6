"""All features of a loader, held in batches of one size, and the loss by which heads are fitted to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.errors import ArgumentError, LabelError
from hyperproto.fitting.features import collect
from hyperproto.fitting.lbfgs import Batches, SampleLoss, class_weights
from hyperproto.fitting.report import HeadFit, report_fit
from hyperproto.fitting.statistics import SMALLEST_VARIANCE, ClassScatter
from hyperproto.functional import scaled_cross_entropy
from hyperproto.head import HypersphericalHead
from hyperproto.ranks import ProcessGroup, add_up_ranks
from hyperproto.sphere import assigned_cosines, normalise

#: Samples of a batch. The vectors that L-BFGS keeps come to lie where the last batch's temporaries were: with large
#: ones the heap grows by about as much at each iteration.
BATCH_ROWS = 1024
#: Numbers of a batch of features, and of the cosines of one: 16 MiB.
BATCH_NUMBERS = 2**22


def check_fit_options(scale: float, iterations: int) -> None:
    """Raise ArgumentError unless L-BFGS can run with these."""
    if not (isinstance(scale, Real) and math.isfinite(scale) and scale > 0.0):
        raise ArgumentError(f"expected a finite scale > 0, got {scale!r}.")
    if not (isinstance(iterations, Integral) and iterations >= 1):
        raise ArgumentError(f"expected iterations to be a whole number, at least 1 iteration, got {iterations!r}.")


def cross_entropy_with(projection: nn.Module, vectors: Tensor, scale: float) -> SampleLoss:
    """Cross-entropy (N,) of features (N, F) over the cosines of what they project to with class vectors (C, D)."""
    everyone = torch.arange(len(vectors), device=vectors.device)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        cosines = assigned_cosines(normalise(projection(features)), normalise(vectors), everyone)
        return scaled_cross_entropy(cosines, labels, scale=scale, label_smoothing=0.0, reduction="none")

    return loss


class HeldFeatures:
    """What reaches the heads of a model from a whole loader, where the heads are.

    Attributes:
        batches: for each head, features (N, F) float32 and labels (N,) of this rank.
        scatters: for each head, of the features of all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: tuple[HypersphericalHead, ...],
        loader: Iterable[Any],
        *,
        process_group: ProcessGroup | None,
    ) -> None:
        device = heads[0].assignment.device
        samples = [_Regrouped(_batch_rows(head)) for head in heads]

        def keep(index: int, features: Tensor, target: Tensor) -> None:
            if target.dim() == 2:
                raise LabelError(
                    "expected labels (B,): a head is fitted to the training data as they are, without mixup."
                )
            samples[index].add(features, target.to(device))

        self._statistics, self._num_samples = collect(model, heads, loader, keep, process_group=process_group)
        self._process_group, self._device = process_group, device
        self.scatters = [statistics.scatter() for statistics in self._statistics]
        self.batches = [each.batches() for each in samples]

    def balanced(self, index: int) -> ClassScatter:
        """Of a head's features, with each class's own spread counting alike, and next to no shrinking.

        What `regress` makes of it is then the minimum on these samples, and does not depend on how often each came.
        """
        scatter, batches = self.scatters[index], self.batches[index]
        num_classes, device = len(self._statistics[index].counts), self._device
        weights = class_weights(batches, num_classes, device, process_group=self._process_group).cpu().double()
        balanced = torch.zeros_like(scatter.within)
        for features, labels in batches:
            offsets = features.cpu().double() - scatter.centre
            balanced.addmm_(offsets.T, weights[labels.cpu(), None] * offsets)
        add_up_ranks([balanced], device, process_group=self._process_group)
        balanced.diagonal().add_(SMALLEST_VARIANCE * float(balanced.trace()) / len(balanced))
        return dataclasses.replace(scatter, balanced=balanced)

    def report(self, head: HypersphericalHead) -> HeadFit:
        """What the first head reached."""
        return report_fit(
            head, self._statistics[0], self._num_samples, self.batches[0], process_group=self._process_group
        )


def _batch_rows(head: HypersphericalHead) -> int:
    return min(BATCH_ROWS, max(1, BATCH_NUMBERS // max(head.in_features, head.num_classes)))


class _Regrouped:
    """Samples copied into batches of one size as they come: all at once, at the end, would take the memory twice."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._full: Batches = []
        self._rest: Batches = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Features (N, F), which may be a view of all tokens or a buffer that is going to be reused; labels (N,)."""
        start = 0
        while start < len(labels):
            part = slice(start, start + self._size - sum(len(own) for _, own in self._rest))
            self._rest.append((features[part].clone(), labels[part].clone()))
            start += len(self._rest[-1][1])
            if sum(len(own) for _, own in self._rest) == self._size:
                self._full.append(_joined(self._rest))
                self._rest = []

    def batches(self) -> Batches:
        """All samples, in the order in which they came."""
        return [*self._full, _joined(self._rest)] if self._rest else self._full


def _joined(parts: Batches) -> tuple[Tensor, Tensor]:
    features, labels = zip(*parts, strict=True)
    return (features[0], labels[0]) if len(parts) == 1 else (torch.cat(features), torch.cat(labels))
