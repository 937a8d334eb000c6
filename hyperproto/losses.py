"""Criteria for a training loop: `loss(output, target)`, with the prototypes taken from the head at each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import ArgumentError
from hyperproto.functional import (
    Reduction,
    batch_squared_lengths,
    check_reduction,
    pull_loss,
    scaled_cross_entropy,
    squared_class_lengths,
)
from hyperproto.head import HypersphericalHead, require_heads
from hyperproto.precision import keeping_dtype
from hyperproto.readout import Readout
from hyperproto.targets import check_target


class PrototypeLoss(nn.Module):
    """What the criteria share: a source of prototypes, checked input, and feeding the assigner.

    Args:
        source: a `DynamicAssigner` (it is then fed with every training batch), a converted model, or a head.
        reduction: "mean", "sum" (as in the papers' code) or "none".
    """

    def __init__(self, source: nn.Module, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction
        self.assigner = source if isinstance(source, DynamicAssigner) else None
        # In a tuple, so that the model does not become a submodule of the criterion.
        self._heads = (source.head,) if isinstance(source, DynamicAssigner) else require_heads(source)

    @property
    def head(self) -> HypersphericalHead:
        """The head whose prototypes the loss pulls towards."""
        return self._heads[0]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of what the model returned; feeds the assigner when training.

        The assigner is fed where gradients are on and both criterion and head are in train mode, so that validation
        with the same criterion leaves it alone.

        Args:
            output: (B, C) logits, not probabilities, or (B, D) embeddings.
            target: labels (B,) int64 or soft targets (B, C).

        Returns:
            () or, for reduction "none", (B,) float32.

        Raises:
            ShapeError, ArgumentError, LabelError: output or target do not fit; nothing has changed then.
        """
        readout = self.head.read(output)
        check_target(target, len(output), self.head.num_classes)
        loss = self._loss(readout, target)
        if self.assigner is not None and torch.is_grad_enabled():
            if self.training and self.head.training:
                self.assigner.feed(readout, target)
            else:
                self.assigner.leave_out(criterion_trains=self.training)
        return loss

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"reduction={self.reduction!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrototypeLoss:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _loss(self, readout: Readout, target: Tensor) -> Tensor:
        raise NotImplementedError


def _selected_cosines(readout: Readout, target: Tensor) -> Tensor:
    """(B, 1) with the own label's prototype, or (B, C) with all for soft targets."""
    return readout.own_cosines(target) if target.dim() == 1 else readout.cosines()


class BalancedLoss(PrototypeLoss):
    r"""Squared pull to the own prototype: $\ell = (1 - \langle z, w_{\sigma(y)} \rangle)^2$.

    For balanced training sets. See `functional.balanced_loss`.

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        reduction: "mean", "sum" (as in the papers) or "none".

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=2)
        >>> criterion = BalancedLoss(DynamicAssigner(head))
        >>> criterion(head(torch.randn(3, 8)), torch.tensor([0, 2, 2])).shape
        torch.Size([])

    References:
        Mettes et al., NeurIPS 2019, eq. 5; Saadabadi et al., CVPR 2024.
    """

    def _loss(self, readout: Readout, target: Tensor) -> Tensor:
        return pull_loss(_selected_cosines(readout, target), target, reduction=self.reduction)


class LongTailLoss(PrototypeLoss):
    r"""Dot regression: $\ell = \frac12 E_y^2 (1 - \langle z, w_{\sigma(y)} \rangle)^2$, rare classes longer.

    For long-tailed training sets. See `functional.long_tail_loss`.

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        class_counts: (C,) training samples of each class, all positive; None takes the counts of each batch.
        reduction: "mean" (as in the papers), "sum" or "none".

    Raises:
        ArgumentError: class_counts are not C positive numbers.

    Examples:
        >>> head = HypersphericalHead(8, 3, dim=2)
        >>> criterion = LongTailLoss(DynamicAssigner(head), class_counts=torch.tensor([500, 50, 5]))
        >>> criterion(head(torch.randn(3, 8)), torch.tensor([0, 2, 2])).shape
        torch.Size([])

    References:
        Yang et al., NeurIPS 2022, eq. 9 (dot regression); Saadabadi et al., CVPR 2024.
    """

    squared_lengths: Tensor | None

    def __init__(self, source: nn.Module, *, class_counts: Tensor | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(source, reduction=reduction)
        lengths = None if class_counts is None else squared_class_lengths(class_counts, self.head.num_classes)
        self.register_buffer("squared_lengths", lengths, persistent=False)

    def _loss(self, readout: Readout, target: Tensor) -> Tensor:
        weights = 0.5 * self._squared_lengths_for(target, readout.output.device)
        return pull_loss(_selected_cosines(readout, target), target, weights, reduction=self.reduction)

    def _squared_lengths_for(self, target: Tensor, device: torch.device) -> Tensor:
        if self.squared_lengths is None:
            return batch_squared_lengths(target)
        if self.squared_lengths.device != device:
            self.to(device)
        return self.squared_lengths.gather(0, target)[:, None] if target.dim() == 1 else self.squared_lengths[None]


class PrototypeCrossEntropyLoss(PrototypeLoss):
    r"""Cross-entropy over scaled cosines with the prototypes fixed ("ETF + CE").

    See `functional.prototype_cross_entropy`. Needs all C cosines: from embeddings it costs O(B C D).

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        scale: inverse temperature s > 0 of the loss; independent of the head's `logit_scale`. Probabilities are
            those of the latter: `fit_logit_scale` afterwards.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".

    Raises:
        ArgumentError: scale or label_smoothing out of range.

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> criterion = PrototypeCrossEntropyLoss(head)
        >>> criterion(head(torch.randn(3, 8)), torch.tensor([0, 2, 2])).shape
        torch.Size([])

    References:
        Shen et al., arXiv 2303.11637.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        scale: float = 16.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(source, reduction=reduction)
        if not 0.0 < scale < float("inf"):
            raise ArgumentError(f"scale must be finite and positive, got {scale}.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ArgumentError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")
        self.scale = scale
        self.label_smoothing = label_smoothing

    def _loss(self, readout: Readout, target: Tensor) -> Tensor:
        return scaled_cross_entropy(
            readout.cosines(),
            target,
            scale=self.scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
