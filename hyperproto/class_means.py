r"""Running mean embeddings of labels, as functions on the tensors that hold them.

$$ m_c \leftarrow \operatorname{normalise}(\mu \, m_c + (1 - \mu) \, \bar z_c) $$

A label's first batch sets its mean outright, since the old one is zero. With `momentum=None` the mean is that of all
embeddings that have been summed. What a batch holds of a label below half a sample starts no mean (`targets.is_seen`);
below one sample it moves a mean that exists by that fraction of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import AssignmentError
from hyperproto.sphere import normalise
from hyperproto.targets import group_by_label, is_seen


def update_by_labels_(
    means: Tensor,
    sums: Tensor | None,
    embeddings: Tensor,
    labels: Tensor,
    counting: Tensor,
    *,
    momentum: float | None,
) -> None:
    """Take a batch into the class means, in place; costs O(B D), whatever C is.

    Args:
        means: (C, D) unit or zero rows.
        sums: (C, D) of all embeddings since the last assignment step; for `momentum=None` only.
        embeddings: (B, D), zero where a sample does not count.
        labels: (B,) int64 in [0, C).
        counting: (B,) float32, 1 for each sample and 0 for one that does not count.
        momentum: weight of the old mean, or None.
    """
    ordered, first = group_by_label(labels)
    batch_counts = torch.zeros_like(counting).index_add_(0, first, counting)  # (B,), zero but for first places
    old = means.index_select(0, ordered)
    if sums is None:
        batch_sums = torch.zeros_like(embeddings).index_add_(0, first, embeddings)  # (B, D)
        new = _mixed(old.clone(), batch_sums, batch_counts, momentum)
    else:
        sums.index_add_(0, labels, embeddings)
        new = normalise(sums.index_select(0, ordered))
    new = torch.where((batch_counts > 0)[:, None], new, old)
    # Samples of one label write equal rows.
    means.index_copy_(0, labels, new.index_select(0, first))


def update_by_weights_(
    means: Tensor,
    sums: Tensor | None,
    counts: Tensor,
    embeddings: Tensor,
    weights: Tensor,
    *,
    momentum: float | None,
) -> None:
    """The same with a weight of each sample for each label; costs O(B C D).

    Args:
        means: (C, D) unit or zero rows.
        sums: (C, D) of all embeddings since the last assignment step; for `momentum=None` only.
        counts: (C,) summed weights that are in the sums.
        embeddings: (B, D), zero where a sample does not count.
        weights: (B, C), not negative; see `targets.evidence`.
        momentum: weight of the old mean, or None.
    """
    batch_sums, batch_counts = weights.T @ embeddings, weights.sum(dim=0)  # (C, D), (C,)
    if sums is None:
        new = _mixed(means.clone(), batch_sums, batch_counts, momentum)
        begun = is_seen(batch_counts) | means.any(dim=1)
    else:
        new = normalise(sums.add_(batch_sums))
        begun = is_seen(counts + batch_counts)
    means.copy_(torch.where((begun & (batch_counts > 0))[:, None], new, means))


def _mixed(means: Tensor, sums: Tensor, counts: Tensor, momentum: float | None) -> Tensor:
    """New means (N, D) from old ones, which are overwritten, and what was added up for them, N times."""
    momentum = 0.0 if momentum is None else momentum
    share = (1.0 - momentum) / counts.clamp_min(1.0)
    return normalise(means.mul_(momentum).addcmul_(sums, share[:, None]))


def check_finite(means: Tensor, counts: Tensor, lost: Tensor) -> None:
    """Raise unless the means are finite, and more samples are in them than were left out for not being so.

    A few are left out where a gradient scaler looks for its scale; where most are, the model has diverged.

    Args:
        means: (C, D), or sums that they follow from.
        counts: (C,) samples since the last step.
        lost: (C,) samples since the last step whose embeddings were not finite.

    Raises:
        AssignmentError: with the labels.
    """
    wrong = ~(torch.isfinite(means).all(dim=1) & torch.isfinite(counts)) | ((lost > 0) & (lost.sum() >= counts.sum()))
    if bool(wrong.any()):
        labels = torch.nonzero(wrong).flatten().tolist()
        raise AssignmentError(
            f"the class means of {len(labels)} labels are not finite: {labels[:10]}. The model returned NaN or "
            "infinite values for them; the assignment is unchanged. Find the cause (learning rate, half "
            "precision), then let the assigner forget them: assigner.forget(labels)."
        )
