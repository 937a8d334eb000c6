"""All features of a loader, held in batches of one size: those that heads are fitted to, and those held out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperproto.arguments import positive_number, whole_number
from hyperproto.errors import LabelError
from hyperproto.fitting.features import collect
from hyperproto.fitting.held_out import held_out, sample_keys
from hyperproto.fitting.lbfgs import Batches, Samples
from hyperproto.fitting.report import HeadFit, HeldOut, report_fit
from hyperproto.functional import squared_class_lengths
from hyperproto.head import HypersphericalHead
from hyperproto.ranks import ProcessGroup, add_up_ranks

#: Samples of a batch. The vectors that L-BFGS keeps come to lie where the last batch's temporaries were: with large
#: ones the heap grows by about as much at each iteration.
BATCH_ROWS = 1024
#: Numbers of a batch of features, and of the cosines of one: 16 MiB.
BATCH_NUMBERS = 2**22


class FitOptions(NamedTuple):
    """What a user says of a fit; None: it is chosen, or labels count alike."""

    scale: float | None
    iterations: int
    log_prior: Tensor | None

    @classmethod
    def checked(cls, scale: Any, iterations: Any, class_counts: Any, num_classes: int) -> FitOptions:
        """Options as people write them.

        Raises:
            ArgumentError: one that cannot be meant.
        """
        return cls(
            scale=None if scale is None else positive_number(scale, "scale"),
            iterations=whole_number(iterations, "iterations", smallest=1),
            log_prior=None if class_counts is None else -squared_class_lengths(class_counts, num_classes).log(),
        )


class HeldFeatures:
    """What reaches the heads of a model from a whole loader, where the heads are.

    Attributes:
        scatters: for each head, of the features of all ranks.
        process_group: the ranks.
        device: where the heads are.
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
        self.process_group, self.device = process_group, device
        self.scatters = [statistics.scatter() for statistics in self._statistics]
        self._fitted_to, self._held_out = zip(*(self._parted(each.batches()) for each in samples), strict=True)

    def fitted_to(self, index: int, *, classes_alike: bool) -> Samples:
        """What a head is fitted to while there is something to choose."""
        return self._weighed(self._fitted_to[index], index, alike=classes_alike)

    def held_out(self, index: int) -> Samples | None:
        """What it is judged by, classes counting alike; None where all classes are too small to hold any out."""
        samples = self._weighed(self._held_out[index], index, alike=True)
        return samples if bool(samples.weights.isfinite().any()) else None

    def all(self, index: int, *, classes_alike: bool) -> Samples:
        """Both together."""
        return self._weighed(self._fitted_to[index] + self._held_out[index], index, alike=classes_alike)

    def num_held_out(self, index: int) -> int:
        """On all ranks."""
        count = torch.tensor([sum(len(labels) for _, labels in self._held_out[index])], device="cpu")
        add_up_ranks([count], self.device, process_group=self.process_group)
        return int(count)

    def _weighed(self, batches: Batches, index: int, *, alike: bool) -> Samples:
        num_classes = len(self._statistics[index].counts)
        return Samples.weighed(batches, num_classes, self.device, alike=alike, process_group=self.process_group)

    def _parted(self, batches: Batches) -> tuple[Batches, Batches]:
        """Batches of what is fitted to, and of what is held out; the given ones go one by one, to save memory."""
        labels = torch.cat([own.cpu() for _, own in batches] or [torch.zeros(0, dtype=torch.int64, device="cpu")])
        keys = torch.cat([sample_keys(rows) for rows, _ in batches] or [labels.double()])
        is_held_out = held_out(keys, labels, self.device, process_group=self.process_group)
        parts: tuple[Batches, Batches] = ([], [])
        for mask in torch.split(is_held_out, [len(own) for _, own in batches]):
            rows, own = batches.pop(0)
            for part, chosen in zip(parts, (~mask, mask), strict=True):
                chosen = chosen.to(self.device)
                if bool(chosen.any()):
                    part.append((rows[chosen], own[chosen]))
        return parts

    def report(self, head: HypersphericalHead, held_out: HeldOut | None) -> HeadFit:
        """What the first head reached."""
        batches = self._fitted_to[0] + self._held_out[0]
        return report_fit(
            head,
            self._statistics[0],
            self._num_samples,
            batches,
            held_out=held_out,
            process_group=self.process_group,
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
