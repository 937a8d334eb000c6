"""Which samples a fit does not see, so that there is something to judge it by."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.ranks import ProcessGroup, gather_rows

#: One sample of so many of each class is held out, the middle one first: none of classes of fewer than six.
ONE_OF = 10


def sample_keys(features: Tensor) -> Tensor:
    """(N,) float64 on the CPU: a number for each row (N, F), the same for equal rows in whatever batch."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    direction = torch.randn(features.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    # The order of a sum may depend on the batch: rounded off, it does not show.
    return (features.cpu().double() * direction).sum(dim=1).float().double()


def held_out(
    keys: Tensor, labels: Tensor, device: torch.device, *, process_group: ProcessGroup | None = None
) -> Tensor:
    """Which samples to hold out: a tenth of each class, at even distances along a direction.

    Equal samples of a class stay together, so that none is on both sides. Neither the order of the samples nor the
    ranks that have them matter.

    Args:
        keys: (N,) float64 on the CPU, of `sample_keys`.
        labels: (N,) int64 on the CPU.
        device: where ranks talk to each other.
        process_group: the ranks that share out the samples.

    Returns:
        (N,) bool on the CPU.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        >>> held_out(torch.arange(8).double(), labels, torch.device("cpu")).nonzero().flatten()
        tensor([5])
    """
    own = torch.stack([labels.double(), keys], dim=1)
    everyone = torch.cat([gather_rows(own, device, process_group=process_group), own])
    distinct, place = torch.unique(everyone, dim=0, return_inverse=True)  # by label, then by key
    sizes = torch.unique_consecutive(distinct[:, 0], return_counts=True)[1]
    starts = (sizes.cumsum(dim=0) - sizes).repeat_interleave(sizes)
    place_in_class = torch.arange(len(distinct), device="cpu") - starts
    return (place_in_class % ONE_OF == ONE_OF // 2)[place[len(place) - len(own) :]]
