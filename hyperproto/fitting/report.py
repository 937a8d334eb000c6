"""What fitting a head has reached, measured on the features that it was fitted to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.fitting.statistics import FeatureStatistics
from hyperproto.head import HypersphericalHead
from hyperproto.modes import eval_mode
from hyperproto.ranks import ProcessGroup, add_up_ranks
from hyperproto.targets import is_seen


@dataclass(frozen=True)
class HeldOut:
    """What samples say of a fit that it has not seen, classes counting alike.

    Attributes:
        num_samples: on all ranks.
        accuracy_before: share in [0, 1] of the right answers of what there was before, or of least squares in closed
            form in its place: for a head that was fitted to these samples, so that they say nothing of it, and for
            `compress_head`, their principal components.
        accuracy: of the fit.
        log_loss_before: mean of the negative log-likelihood, at the scale that suits it best.
        log_loss: likewise.
        penalty: of lengths, chosen for the classifier whose answers were handed on.
        was_seen: whether closed form stands in for what there was.
        is_better: whether the fit is; it was then made once more with these samples, and taken.
    """

    num_samples: int
    accuracy_before: float
    accuracy: float
    log_loss_before: float
    log_loss: float
    penalty: float
    was_seen: bool
    is_better: bool

    def __str__(self) -> str:
        before = "in closed form" if self.was_seen else "before"
        return (
            f"on {self.num_samples} samples held out: accuracy {100 * self.accuracy_before:.1f} % {before}, "
            f"{100 * self.accuracy:.1f} % fitted, log-loss {self.log_loss_before:.3f} {before}, "
            f"{self.log_loss:.3f} fitted{'' if self.is_better else '; what there was stays'}"
        )


@dataclass(frozen=True)
class HeadFit:
    """What `fit_head`, `refit_head` or `compress_head` reached, measured on the features that they fitted a head to.

    Attributes:
        similarity: mean over the labels seen of the cosine between the label's embedded mean feature and its
            prototype, in [-1, 1].
        accuracy: share in [0, 1] of the samples to which the fitted head (the first, where a model has several) gives
            their own label, or that of their largest soft target. Training accuracy; `fit_head` measures that of many
            samples on a random draw.
        num_samples: samples seen, on all ranks.
        unseen: labels without a sample, ascending.
        held_out: what samples say that were held out; None for `fit_head`, and where classes were too small for that.
    """

    similarity: float
    accuracy: float
    num_samples: int
    unseen: tuple[int, ...]
    held_out: HeldOut | None = None

    def __str__(self) -> str:
        text = (
            f"fitted to {self.num_samples} samples: training accuracy {100 * self.accuracy:.1f} %, "
            f"similarity {self.similarity:.4f}"
        )
        text = f"{text}; {self.held_out}" if self.held_out is not None else text
        return f"{text}; {len(self.unseen)} labels not seen" if self.unseen else text


@torch.no_grad()
def report_fit(
    head: HypersphericalHead,
    statistics: FeatureStatistics,
    num_samples: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    process_group: ProcessGroup | None,
    held_out: HeldOut | None = None,
) -> HeadFit:
    """Measure a head on features that it was fitted to.

    Args:
        head: as it is now.
        statistics: of all features, on all ranks.
        num_samples: likewise.
        batches: features (B, F) and labels (B,) of this rank, to measure the accuracy by.
        process_group: the ranks that share out the data.
        held_out: what others say of it.
    """
    device = head.assignment.device
    is_measured = is_seen(statistics.counts)
    seen = torch.nonzero(is_measured).flatten()
    means = statistics.sums[seen] / statistics.counts[seen, None]
    correct = torch.zeros(2, dtype=torch.float64, device="cpu")  # and all
    with eval_mode(head):
        embedded = head.embed(means.float().to(device)).cpu()
        for rows, labels in batches:
            nearest = head.topk(head.embed(rows.to(device)), k=1)[1][:, 0]
            correct += torch.tensor([float((nearest.cpu() == labels.cpu()).sum()), len(labels)], device="cpu")
    add_up_ranks([correct], device, process_group=process_group)
    return HeadFit(
        similarity=float((embedded * head.class_prototypes.cpu()[seen]).sum(dim=1).mean()),
        accuracy=float(correct[0] / correct[1]),
        num_samples=num_samples,
        unseen=tuple(torch.nonzero(~is_measured).flatten().tolist()),
        held_out=held_out,
    )
