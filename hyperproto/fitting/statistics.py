"""What one pass over labelled features leaves: sums that no later step needs more than, and a sample to check it by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.errors import ArgumentError
from hyperproto.targets import evidence, is_seen

#: Class means nearer to each other than this share of the features' squared length are one point and its rounding.
SMALLEST_SPREAD = 1e-12

#: No less than the variance of rounding to float32, as a share of the squared number.
ROUNDING = torch.finfo(torch.float32).eps ** 2 / 2

#: Least variance that any direction is taken to have, as a share of the mean one: it keeps constant features, and
#: classes without any spread, from dividing by zero.
SMALLEST_VARIANCE = 1e-8

#: Samples for each feature from which on a covariance does without shrinking.
SAMPLES_A_FEATURE = 10


class FeatureStatistics:
    """Counts, sums and second moments of labelled features, batch by batch: O(F^2 + C F) however many there are.

    In float64 on the CPU, where the scatter about the means can be had from moments about zero.

    Attributes:
        counts: (C,) samples of each label, or sums of weights.
        sums: (C, F) sums of the features of each label.
        moment: (F, F) sum of the outer products of all features with themselves.

    Examples:
        >>> statistics = FeatureStatistics(num_classes=2, width=3)
        >>> statistics.add(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> statistics.counts.tolist(), statistics.sums[1].tolist()
        ([1.0, 2.0], [0.0, 1.0, 1.0])
    """

    def __init__(self, num_classes: int, width: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device="cpu")
        self.sums = torch.zeros(num_classes, width, dtype=torch.float64, device="cpu")
        self.moment = torch.zeros(width, width, dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor, target: Tensor) -> None:
        """Count features (N, F) of labels (N,) or soft targets (N, C), by the `evidence` in them; both on the CPU."""
        rows = rows.double()
        if target.dim() == 1:
            self.counts += torch.bincount(target, minlength=len(self.counts))
            self.sums.index_add_(0, target, rows)
            self.moment.addmm_(rows.T, rows)
        else:
            weights = evidence(target).double()
            self.counts += weights.sum(dim=0)
            self.sums.addmm_(weights.T, rows)
            self.moment.addmm_(rows.T, weights.sum(dim=1, keepdim=True) * rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that adding up the statistics of several processes means adding up."""
        return self.counts, self.sums, self.moment

    def shrinking_hides_most(self) -> bool:
        """Whether a few directions hold so much that shrinking hides most others, of samples enough to do without."""
        raw, shrunk = (self.scatter(shrunk=shrunk).within for shrunk in (False, True))
        is_enough = float(self.counts.sum()) >= SAMPLES_A_FEATURE * len(raw)
        # Half of all directions have less spread than this.
        return is_enough and bool(torch.linalg.eigvalsh(shrunk).median() > 2.0 * torch.linalg.eigvalsh(raw).median())

    def scatter(self, *, shrunk: bool = True) -> ClassScatter:
        """The labels seen, where they lie and how they spread.

        Args:
            shrunk: whether the covariance within classes is, or is taken as the samples have it.

        Raises:
            ArgumentError: features that are not finite, or that do not tell any label from another.
        """
        if not bool(torch.isfinite(self.moment).all()):
            raise ArgumentError(
                "the features that reach the head are not all finite; the head is unchanged. "
                "Find the cause (weights, half precision) first."
            )
        labels = torch.nonzero(is_seen(self.counts)).flatten()
        num_samples = self.counts.sum()
        means = self.sums[labels] / self.counts[labels, None]  # (S, F)
        sample_mean, moment = self.sums.sum(dim=0) / num_samples, self.moment / num_samples
        total = moment - torch.outer(sample_mean, sample_mean)
        between = _spread(means, sample_mean, self.counts[labels] / num_samples)
        if float(between.trace()) <= SMALLEST_SPREAD * float(moment.trace()):
            raise ArgumentError(
                f"the features have the same mean for all labels seen ({len(labels)}): there is nothing to fit, and "
                "the head is unchanged. Check that the loader gives several labels and the model tells inputs apart."
            )
        within = total - between
        if shrunk:
            within = shrunk_covariance(within, float(num_samples) - len(labels))
        least = max(SMALLEST_VARIANCE * float(total.trace()), ROUNDING * float(moment.trace()))
        within.diagonal().add_(least / len(total))
        centre = means.mean(dim=0)
        balanced = within + _spread(means, centre, torch.full_like(means[:, 0], 1.0 / len(labels)))
        return ClassScatter(labels, means, centre, within, balanced, sample_mean, total)


@dataclass(frozen=True)
class ClassScatter:
    """Labels as Gaussian clouds of one covariance, each as likely as any other; all float64 on the CPU.

    Attributes:
        labels: (S,) int64, those seen, ascending.
        means: (S, F) of each label.
        centre: (F,) mean of the means.
        within: (F, F) covariance about the means, shrunk and therefore positive definite.
        balanced: (F, F) covariance about the centre of all clouds together.
        sample_mean: (F,) of the samples as they came.
        sample_covariance: (F, F) likewise.
    """

    labels: Tensor
    means: Tensor
    centre: Tensor
    within: Tensor
    balanced: Tensor
    sample_mean: Tensor
    sample_covariance: Tensor


def _spread(points: Tensor, centre: Tensor, weights: Tensor) -> Tensor:
    offsets = points - centre
    return offsets.T @ (weights[:, None] * offsets)


class FeatureSample:
    """Rows drawn at random from a stream of unknown length, each as likely as any other; all of a short one.

    Args:
        limit: rows kept; up to twice as many are held.
        width: F.

    Examples:
        >>> sample = FeatureSample(limit=4, width=1)
        >>> for batch in torch.arange(20.0)[:, None].split(3):
        ...     sample.add(batch, batch[:, 0].long())
        >>> rows, labels = sample.draw()
        >>> len(rows), torch.equal(rows[:, 0].long(), labels)
        (4, True)
    """

    def __init__(self, limit: int, width: int) -> None:
        self.limit = limit
        self._generator = torch.Generator(device="cpu").manual_seed(0)
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.add(torch.zeros(0, width, device="cpu"), torch.zeros(0, dtype=torch.int64, device="cpu"))

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Rows (N, F) and their labels (N,), views of all tokens perhaps, or buffers that are going to be reused."""
        # The rows of the smallest keys are kept.
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64, device="cpu")
        self._held.append((keys, rows.clone(), labels.clone()))
        if sum(len(keys) for keys, _, _ in self._held) > 2 * self.limit:
            self._shorten()

    def draw(self) -> tuple[Tensor, Tensor]:
        """(K, F) rows and (K,) labels, K <= limit."""
        self._shorten()
        _, rows, labels = self._held[0]
        return rows, labels

    def _shorten(self) -> None:
        keys, rows, labels = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        kept = keys.argsort()[: self.limit]
        self._held = [(keys[kept], rows[kept], labels[kept])]


def shrunk_covariance(covariance: Tensor, num_samples: float) -> Tensor:
    r"""A covariance mixed with a multiple of the identity, by as much as so few samples ask for.

    $$
    (1 - \rho) S + \rho \frac{\operatorname{tr} S}{F} I, \qquad
        \rho = \min\left(1, \frac{(1 - 2/F) \operatorname{tr} S^2 + \operatorname{tr}^2 S}
                                 {(n + 1 - 2/F) (\operatorname{tr} S^2 - \operatorname{tr}^2 S / F)}\right)
    $$

    Args:
        covariance: (F, F) float64, empirical.
        num_samples: n, degrees of freedom that it was estimated with; below 1 it counts for nothing.

    Returns:
        (F, F), a new tensor.

    Examples:
        >>> shrunk_covariance(torch.diag(torch.tensor([3.0, 1.0])), num_samples=0.0)
        tensor([[2., 0.],
                [0., 2.]])

    References:
        Chen, Wiesel, Eldar, Hero, Shrinkage algorithms for MMSE covariance estimation, 2010 (equation 23).
    """
    width = len(covariance)
    trace, squared = float(covariance.trace()), float(covariance.square().sum())
    anisotropy = (num_samples + 1.0 - 2.0 / width) * (squared - trace**2 / width)
    share = 1.0
    if num_samples >= 1.0 and anisotropy > 0.0:
        share = min(1.0, ((1.0 - 2.0 / width) * squared + trace**2) / anisotropy)
    shrunk = (1.0 - share) * covariance
    shrunk.diagonal().add_(share * trace / width)
    return shrunk
