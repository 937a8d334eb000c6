"""Criteria for a training loop: `loss(output, target)`, with the prototypes taken from the head at each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyperproto.arguments import SMALLEST_INT, as_tensor, numbers_by_label, positive_number, share, shown, whole_number
from hyperproto.assigner import DynamicAssigner
from hyperproto.errors import ArgumentError, ShapeError
from hyperproto.functional import (
    Reduction,
    batch_squared_lengths,
    check_reduction,
    class_weights,
    pull_loss,
    scaled_cross_entropy,
    squared_class_lengths,
)
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads
from hyperproto.precision import keeping_dtype
from hyperproto.readout import Readout
from hyperproto.separation import default_logit_scale
from hyperproto.targets import IGNORE_INDEX, Target, is_seen, largest_total
from hyperproto.telling import tell

#: Soft targets of a sample may add up to this: sums of a thousand shares in bfloat16 are off 1 by less.
LARGEST_TOTAL = 1.05


class PrototypeLoss(nn.Module):
    """What the criteria share: a source of prototypes, checked input, and feeding the assigner.

    Args:
        source: a `DynamicAssigner` (it is then fed with every training batch), a converted model, or a head.
        ignore_index: label of samples that do not count, in no class mean either; the mean is over the others.
        reduction: "mean", "sum" (as in the papers' code) or "none".
    """

    #: For fastai: labels are whole numbers, of which MixUp weighs the losses, not the labels.
    y_int = True

    def __init__(self, source: nn.Module, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_index = whole_number(ignore_index, "ignore_index", smallest=SMALLEST_INT)
        self.reduction: Reduction = reduction
        self._total_told = False
        self.assigner = source if isinstance(source, DynamicAssigner) else None
        # In a tuple, so that the model does not become a submodule of the criterion.
        self._heads = (source.head,) if isinstance(source, DynamicAssigner) else require_heads(source)

    @property
    def head(self) -> HypersphericalHead:
        """The head whose prototypes the loss pulls towards."""
        return self._heads[0]

    def forward(self, output: Tensor, target: Tensor, indices_tuple: object = None) -> Tensor:
        """Loss of what the model returned; feeds the assigner when training.

        The assigner is fed where gradients are on and both criterion and head are in train mode, so that validation
        with the same criterion leaves it alone.

        Each position of a feature map, or of a sequence of tokens, is a sample where the head returns an output for
        it: the loss is that over all positions, as if they were a batch of rows.

        Args:
            output: (B, C) logits, not probabilities, or (B, D) embeddings. Of positions what the head returns:
                (B, ..., C), or (B, C, H, W) from a head over feature maps.
            target: labels (B,) int64 or soft targets (B, C) whose rows add up to 1. Of positions labels (B, ...), and
                soft targets with C where the output has it.
            indices_tuple: the pairs that pytorch-metric-learning hands to every loss; of no use here.

        Returns:
            () or, for reduction "none", a float32 number for each sample or position, (B,) or (B, ...).

        Raises:
            ShapeError, ArgumentError, LabelError: output or target do not fit; nothing has changed then.
        """
        if indices_tuple is not None and not isinstance(indices_tuple, tuple):
            raise ArgumentError(
                "expected no third argument, or the tuple of indices that pytorch-metric-learning hands on, got "
                f"{shown(indices_tuple)}. Weights of classes are an option, PrototypeCrossEntropyLoss(..., weight=...)."
            )
        readout = self.head.read(output)
        checked = readout.read_target(target, ignore_index=self.ignore_index)
        self._check_total(checked)
        loss = self._loss(readout, checked)
        if self.assigner is not None and torch.is_grad_enabled():
            if self.training and self.head.training:
                self.assigner.feed(readout, checked)
            else:
                self.assigner.leave_out(criterion_trains=self.training)
        return loss.reshape(readout.shape) if self.reduction == "none" else loss

    def activation(self, logits: Tensor) -> Tensor:
        """Probabilities of logits, for fastai's `get_preds`."""
        return self._of_all_labels(logits).softmax(dim=self.head.class_dim)

    def decodes(self, logits: Tensor) -> Tensor:
        """Labels of logits or probabilities, for fastai's `predict` and `get_preds`."""
        return self._of_all_labels(logits).argmax(dim=self.head.class_dim)

    def _of_all_labels(self, logits: object) -> Tensor:
        values, num_classes, class_dim = as_tensor(logits, "logits"), self.head.num_classes, self.head.class_dim
        if values.dim() < 2 or values.shape[class_dim] != num_classes or not values.is_floating_point():
            raise ShapeError(
                f"expected logits or probabilities of {num_classes} labels in dimension {class_dim}, in a floating "
                f"dtype, got {tuple(values.shape)} and {values.dtype}."
            )
        return values

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"reduction={self.reduction!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrototypeLoss:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _check_total(self, target: Target) -> None:
        """Tell, once, of soft targets that are no shares: the loss would be as many times too large."""
        if self._total_told or target.kept is not None:
            return
        total = largest_total(target)
        if total > LARGEST_TOTAL:
            self._total_told = True
            tell(
                f"expected soft targets whose rows add up to 1, got a row that adds up to {total:g}: the loss is as "
                "many times too large. Divide them: target / target.sum(dim=1, keepdim=True)."
            )

    def _loss(self, readout: Readout, target: Target) -> Tensor:
        raise NotImplementedError


def _selected_cosines(readout: Readout, target: Target) -> Tensor:
    """(B, 1) with the own label's prototype, or (B, C) with all for soft targets."""
    return readout.cosines() if target.kept is None else readout.own_cosines(target.places())


def _check_evidence(class_counts: Tensor) -> None:
    """Tell of a label that next to no sample has, beside others that have some; shares of all samples are below 1."""
    if class_counts.max() >= 1.0 and not bool(is_seen(class_counts).all()):
        tell(
            f"expected class_counts of samples, or shares of all samples, got values from {class_counts.min():g} to "
            f"{class_counts.max():g}: a label with less than half a sample weighs {class_counts.max():g} / "
            f"{class_counts.min():g} times as much as others. Leave classes without training samples out of the head."
        )


class BalancedLoss(PrototypeLoss):
    r"""Squared pull to the own prototype: $\ell = (1 - \langle z, w_{\sigma(y)} \rangle)^2$.

    For balanced training sets. See `functional.balanced_loss`.

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        ignore_index: label of samples that do not count, in no class mean either; the mean is over the others.
        reduction: "mean", "sum" (as in the papers) or "none".

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=2)
        >>> criterion = BalancedLoss(DynamicAssigner(head))
        >>> criterion(head(torch.randn(3, 8)), torch.tensor([0, 2, 2])).shape
        torch.Size([])

    References:
        Mettes et al., NeurIPS 2019, eq. 5; Saadabadi et al., CVPR 2024.
    """

    def _loss(self, readout: Readout, target: Target) -> Tensor:
        return pull_loss(_selected_cosines(readout, target), target, reduction=self.reduction)


class LongTailLoss(PrototypeLoss):
    r"""Dot regression: $\ell = \frac12 E_y^2 (1 - \langle z, w_{\sigma(y)} \rangle)^2$, rare classes longer.

    For long-tailed training sets. See `functional.long_tail_loss`.

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        class_counts: (C,) training samples of each class, all positive, or a dictionary or Counter of them by label;
            None takes the counts of each batch.
        ignore_index: label of samples that do not count, in no class mean either; the mean is over the others.
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

    def __init__(
        self,
        source: nn.Module,
        *,
        class_counts: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(source, ignore_index=ignore_index, reduction=reduction)
        lengths = None
        if class_counts is not None:
            counts = numbers_by_label(class_counts, "class_counts", self.head.num_classes)
            lengths = squared_class_lengths(counts, len(counts))
            _check_evidence(counts)
        self.register_buffer("squared_lengths", lengths, persistent=False)

    def _loss(self, readout: Readout, target: Target) -> Tensor:
        weights = 0.5 * self._squared_lengths_for(target, readout.output.device)
        return pull_loss(_selected_cosines(readout, target), target, weights, reduction=self.reduction)

    def _squared_lengths_for(self, target: Target, device: torch.device) -> Tensor:
        if self.squared_lengths is None:
            return batch_squared_lengths(target.values, ignore_index=target.ignore_index)
        if self.squared_lengths.device != device:
            self.to(device)
        lengths = self.squared_lengths
        return lengths[None] if target.kept is None else lengths.gather(0, target.places())[:, None]


class PrototypeCrossEntropyLoss(PrototypeLoss, nn.CrossEntropyLoss):  # type: ignore[misc] # reduction is a Literal
    r"""Cross-entropy over scaled cosines with the prototypes fixed ("ETF + CE").

    See `functional.prototype_cross_entropy`. Needs all C cosines: from embeddings it costs O(B C D). A kind of
    `torch.nn.CrossEntropyLoss`, by which libraries such as skorch know that probabilities are a softmax.

    Args:
        source: a `DynamicAssigner` (fed by the loss), a converted model, or a head.
        scale: inverse temperature s > 0 of the loss; by default that which a head on this bank starts with
            (`separation.default_logit_scale`), whatever `logit_scale` is now. Probabilities are those of the latter:
            `fit_logit_scale` afterwards. The gradient grows with the scale: for SGD a learning rate of about 2 / scale
            is a start (docs/training.md); to Adam it is all one.
        label_smoothing: in [0, 1].
        weight: (C,) weights of the labels, or a dictionary of them by label; the mean is then that of
            `torch.nn.CrossEntropyLoss`.
        ignore_index: label of samples that do not count, in no class mean either; the mean is over the others.
        reduction: "mean", "sum" or "none".

    Raises:
        ArgumentError: an option out of range.

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> criterion = PrototypeCrossEntropyLoss(head)
        >>> criterion(head(torch.randn(3, 8)), torch.tensor([0, 2, 2])).shape
        torch.Size([])

    References:
        Shen et al., arXiv 2303.11637.
    """

    weight: Tensor | None

    def __init__(
        self,
        source: nn.Module,
        *,
        scale: float | None = None,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(source, ignore_index=ignore_index, reduction=reduction)
        if scale is None:
            scale = default_logit_scale(self.head.bank.prototypes, self.head.num_classes)
        self.scale = positive_number(scale, "scale")
        self.label_smoothing = share(label_smoothing, "label_smoothing")
        weights = None if weight is None else class_weights(weight, self.head.num_classes)
        self.register_buffer("weight", weights, persistent=False)

    def _loss(self, readout: Readout, target: Target) -> Tensor:
        if self.weight is not None and self.weight.device != readout.output.device:
            self.to(readout.output.device)
        return scaled_cross_entropy(
            readout.cosines(),
            target.values,
            scale=self.scale,
            label_smoothing=self.label_smoothing,
            weight=self.weight,
            kept=target.kept,
            reduction=self.reduction,
        )
