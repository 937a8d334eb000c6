"""What a loss makes of its head: geometry, scale and forms of output."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hyperproto import functional
from hyperproto.functional import Reduction
from hyperproto.losses import BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss, PrototypeLoss
from hyperproto.testing.requirements import is_close, require
from hyperproto.testing.subject import Loss, Subject


def is_turned_with_the_head(subject: Subject) -> None:
    """Rotating embeddings and prototypes together turns the gradient along, and changes no loss."""
    if not subject.owns_head:
        return
    batch = subject.balanced()
    turned = subject.copy()
    prototypes = turned.head.bank.prototypes
    rotation = torch.linalg.qr(subject.random(subject.head.dim, seed=1).double())[0].to(prototypes)
    with torch.no_grad():
        prototypes.copy_(prototypes @ rotation)
    turned.head.assign_(turned.head.assignment.clone())
    total, gradient = subject.total_and_gradient(batch.embeddings, batch.labels)
    after, gradient_after = turned.total_and_gradient(batch.embeddings @ rotation, batch.labels)
    agree = is_close(after, total) and is_close(gradient_after, gradient @ rotation)
    require(agree, "rotating embeddings and prototypes together changes the loss")


def depends_on_no_logit_scale(subject: Subject) -> None:
    """A loss of this library takes the head's scale out of the logits: cosines are what it reads."""
    if not isinstance(subject.loss, PrototypeLoss):
        return  # a loss of the user's own may be one of the logits as they are
    batch = subject.balanced()
    scaled = subject.copy()
    with torch.no_grad():
        scaled.head.logit_scale.mul_(2.0)
    before = subject.total_and_gradient(batch.embeddings, batch.labels)
    after = scaled.total_and_gradient(batch.embeddings, batch.labels)
    agree = is_close(before[0], after[0]) and is_close(before[1], after[1])
    require(agree, "another logit_scale of the head, and logits to it, change the loss")


def follows_its_formula(subject: Subject) -> None:
    """A loss of this library is the function of the same name, in train and eval mode."""
    formula = _formula(subject.loss, subject.reduction)
    if formula is None:
        return
    for trial in (subject, subject.evaluating()):
        expected_of = replace(trial, loss=partial(_of_cosines, trial, formula))
        batch, even = trial.imbalanced(), trial.balanced()
        for embeddings, target in (
            (batch.embeddings, batch.labels),
            (batch.embeddings, trial.one_hot(batch.labels)),
            (even.embeddings, trial.mixed(even.labels)),
        ):
            value, gradient = trial.total_and_gradient(embeddings, target)
            expected, expected_gradient = expected_of.total_and_gradient(embeddings, target)
            require(
                is_close(value, expected),
                f"the loss is not its formula in hyperproto.functional: a mean of {float(value) / len(target):.6g} "
                f"where that gives {float(expected) / len(target):.6g}",
            )
            require(is_close(gradient, expected_gradient), "the gradient is not that of hyperproto.functional")


def logits_and_embeddings_agree(first: Subject, second: Subject) -> None:
    """Both forms of one output give one loss."""
    batch = first.imbalanced()
    one, two = (subject.total_and_gradient(batch.embeddings, batch.labels) for subject in (first, second))
    agree = is_close(one[0], two[0]) and is_close(one[1], two[1])
    require(agree, f"{first.form} and {second.form} of the same samples give different losses")


def _of_cosines(subject: Subject, formula: Loss, output: Tensor, target: Tensor) -> Tensor:
    is_logits = subject.form == "logits"
    return formula(output / subject.head.logit_scale if is_logits else output @ subject.prototypes.T, target)


def _formula(loss: Loss, reduction: Reduction) -> Loss | None:
    """The pure form of a loss of this library; None for any other loss."""
    if isinstance(loss, BalancedLoss):
        return partial(functional.balanced_loss, reduction=reduction)
    if isinstance(loss, LongTailLoss):
        counts = None if loss.squared_lengths is None else loss.squared_lengths.double().reciprocal()
        return partial(functional.long_tail_loss, class_counts=counts, reduction=reduction)
    if isinstance(loss, PrototypeCrossEntropyLoss):
        return partial(
            functional.prototype_cross_entropy,
            scale=loss.scale,
            label_smoothing=loss.label_smoothing,
            weight=loss.weight,
            reduction=reduction,
        )
    return None
