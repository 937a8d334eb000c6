"""What all losses of this library promise: one check that asks for all of it, property by property."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hyperproto.arguments import module
from hyperproto.testing.properties.batches import (
    is_reduced_as_it_says,
    reductions_belong_together,
    treats_samples_apart,
    treats_samples_in_any_order,
)
from hyperproto.testing.properties.gradients import (
    computes_in_float32,
    counts_every_sample,
    has_the_gradient_of_its_value,
)
from hyperproto.testing.properties.heads import (
    depends_on_no_logit_scale,
    follows_its_formula,
    is_turned_with_the_head,
    logits_and_embeddings_agree,
)
from hyperproto.testing.properties.side_effects import (
    evaluating_changes_nothing,
    feeds_its_assigner_once,
    leaves_its_arguments_alone,
    leaves_the_head_alone,
    leaves_what_is_global_alone,
)
from hyperproto.testing.properties.values import (
    follows_the_assignment,
    is_continuous_in_soft_targets,
    is_finite_and_not_negative,
    is_linear_in_soft_targets,
    is_zero_under_an_empty_batch,
    pulls_to_the_own_prototype,
    takes_one_hot_labels_as_labels,
)
from hyperproto.testing.state import everything_kept
from hyperproto.testing.subject import Loss, Subject, subjects

#: Those first whose message says most: a fault may break several.
PROPERTIES: tuple[Callable[[Subject], None], ...] = (
    leaves_its_arguments_alone,
    leaves_what_is_global_alone,
    leaves_the_head_alone,
    evaluating_changes_nothing,
    is_zero_under_an_empty_batch,
    is_finite_and_not_negative,
    takes_one_hot_labels_as_labels,
    reductions_belong_together,
    is_reduced_as_it_says,
    treats_samples_in_any_order,
    counts_every_sample,
    has_the_gradient_of_its_value,
    computes_in_float32,
    treats_samples_apart,
    pulls_to_the_own_prototype,
    follows_the_assignment,
    is_linear_in_soft_targets,
    is_continuous_in_soft_targets,
    is_turned_with_the_head,
    depends_on_no_logit_scale,
    feeds_its_assigner_once,
    follows_its_formula,
)


def check_loss(loss: Loss, head: nn.Module | None = None) -> None:
    r"""Raise AssertionError unless the loss keeps what all losses of this library promise.

    It is called as `loss(output, target)` with outputs that the head could have returned, logits or embeddings, and
    with labels (B,) and soft targets (B, C). Then

    - the loss is finite and not negative, and the gradient is finite, also on a prototype, opposite to it, for zero
      embeddings, and under an empty batch, where both are zero;
    - hard labels and their one-hot form agree, and the loss is linear in soft targets that share their counts;
    - each embedding on a prototype costs least under the label of that prototype, also after `assign_`; the gradient
      is that of the value, in float32, and every sample has one;
    - neither the order of the samples nor doubling the batch changes the loss, and the loss of a sample depends on no
      other one (but for the class lengths of dot regression, B / (labels present * samples of the label));
    - "none", "sum" and "mean" belong together, and logits and embeddings give one loss;
    - rotating embeddings and prototypes together changes nothing;
    - output, targets, head, modes and what is global to the process are left alone, in training and in evaluation,
      where the state of the loss is too; an assigner is fed once in training;
    - a loss of this library, subclasses included, does not depend on `logit_scale`, and returns what its formula in
      `hyperproto.functional` says.

    Each property is a function of its own in `hyperproto.testing.properties`, and is shown copies of loss and head.

    Args:
        loss: any callable. One without an attribute `reduction` that returns a single number promises a mean.
        head: for a loss that does not hold one as `.head`: the head, or the model of it, whose outputs it gets. By
            default a small one of six labels, which returns logits.

    Examples:
        >>> from hyperproto import HypersphericalHead, LongTailLoss
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> check_loss(LongTailLoss(head))
        >>> check_loss(lambda output, target: LongTailLoss(head)(-output, target), head)
        Traceback (most recent call last):
        AssertionError: an embedding on the prototype of label 0 costs more under that label (2) than under label 1
        (0.2222): the loss does not pull to its label
    """
    given = {"loss": loss} if isinstance(loss, nn.Module) else {}
    if head is not None:
        given["head"] = module(head, "head")
    with everything_kept(given):
        tried = subjects(loss, head)
    for subject in tried:
        for holds in PROPERTIES:
            # Each property has a copy: what a faulty loss has done to the last one would hide what it does to the next.
            with everything_kept(given):
                holds(subject.copy())
    if len(tried) == 2:
        with everything_kept(given):
            logits_and_embeddings_agree(*tried)
