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
    """

    similarity: float
    accuracy: float
    num_samples: int
    unseen: tuple[int, ...]

    def __str__(self) -> str:
        text = (
            f"fitted to {self.num_samples} samples: training accuracy {100 * self.accuracy:.1f} %, "
            f"similarity {self.similarity:.4f}"
        )
        return f"{text}; {len(self.unseen)} labels not seen" if self.unseen else text


@torch.no_grad()
def report_fit(
    head: HypersphericalHead,
    statistics: FeatureStatistics,
    num_samples: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    process_group: ProcessGroup | None,
) -> HeadFit:
    """Measure a head on features that it was fitted to.

    Args:
        head: as it is now.
        statistics: of all features, on all ranks.
        num_samples: likewise.
        batches: features (B, F) and labels (B,) of this rank, to measure the accuracy by.
        process_group: the ranks that share out the data.
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
    )
