"""What a loss is worth: signs, limits, targets, and the prototype that it pulls to."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.testing.requirements import is_close, require
from hyperproto.testing.subject import Subject


def is_zero_under_an_empty_batch(subject: Subject) -> None:
    """No samples: loss 0, and a gradient for the backward pass, also 0."""
    labels = subject.classes[:0]
    embeddings = subject.random(0)
    for target in (labels, subject.one_hot(labels)):
        leaf = embeddings.clone().requires_grad_()
        value = subject.value(leaf, target)
        require(bool((value == 0).all()), f"an empty batch must have loss 0, got {value.detach().sum():g}")
        require(value.requires_grad, "an empty batch must have a gradient")
        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        require(gradient is not None, "an empty batch must have a gradient")


def is_finite_and_not_negative(subject: Subject) -> None:
    """Loss and gradient, on a prototype, opposite to it, at zero and anywhere."""
    own = subject.prototypes[subject.classes]
    places = {
        "on the prototypes": own,
        "opposite to the prototypes": -own,
        "for zero embeddings": torch.zeros_like(own),
        "in random directions": subject.random(len(own)),
    }
    for where, embeddings in places.items():
        for labels in (subject.classes, subject.classes.roll(1)):
            for target in (labels, subject.one_hot(labels)):
                total, gradient = subject.total_and_gradient(embeddings, target)
                require(bool(torch.isfinite(total)), f"the loss is not finite {where}")
                require(bool(torch.isfinite(gradient).all()), f"the gradient is not finite {where}")
                smallest = float(subject.value(embeddings, target).detach().min())
                require(smallest >= -1e-6, f"the loss is negative {where}: {smallest:.6f}")


def takes_one_hot_labels_as_labels(subject: Subject) -> None:
    """Labels (B,) and their one-hot form (B, C) are the same, values and gradients."""
    for batch in (subject.imbalanced(), subject.balanced()):
        hard = subject.total_and_gradient(batch.embeddings, batch.labels)
        soft = subject.total_and_gradient(batch.embeddings, subject.one_hot(batch.labels))
        agree = is_close(hard[0], soft[0]) and is_close(hard[1], soft[1])
        require(agree, "hard labels and their one-hot form disagree")


def is_linear_in_soft_targets(subject: Subject) -> None:
    """Between two targets the loss and its gradient lie on a straight line.

    All of these targets have the same sum for each label, so that class lengths are no part of it.
    """
    batch = subject.balanced(towards=1.0)
    own, other = (subject.one_hot(labels) for labels in (batch.labels, subject.after(batch.labels)))
    mixed, another = (subject.mixed(batch.labels, seed=seed) for seed in (0, 1))
    for first, second in ((own, other), (own, mixed), (mixed, another), (other, mixed)):
        ends = [subject.total_and_gradient(batch.embeddings, target) for target in (first, second)]
        for share in (0.3, 0.5, 0.9, 0.999):
            between = subject.total_and_gradient(batch.embeddings, share * first + (1 - share) * second)
            line = [share * start + (1 - share) * end for start, end in zip(*ends, strict=True)]
            straight = is_close(between[0], line[0]) and is_close(between[1], line[1])
            require(straight, f"the loss is not linear in soft targets: {share} of one and {1 - share:.3g} of another")


def is_continuous_in_soft_targets(subject: Subject) -> None:
    """A vanishing weight of a label that no sample of the batch has makes a vanishing difference."""
    batch = subject.imbalanced()
    absent = subject.classes[-1]
    batch = batch[batch.labels != absent]
    target = subject.one_hot(batch.labels)
    sliver = target.clone()
    sliver[:, absent] = 1e-6
    before = subject.total_and_gradient(batch.embeddings, target)
    after = subject.total_and_gradient(batch.embeddings, sliver)
    agree = is_close(before[0], after[0]) and is_close(before[1], after[1])
    require(agree, "the loss jumps where a label that the batch does not have gets a weight of 1e-6")


def pulls_to_the_own_prototype(subject: Subject) -> None:
    """An embedding on a prototype costs least under the label of that prototype."""
    labels = subject.classes
    costs = torch.stack([_costs_on_prototype(subject, label) for label in labels])  # (K, K): prototypes, labels
    own = costs.diagonal()[:, None]
    slack = 1e-5 * costs.abs().max()
    for row, column in torch.nonzero(own > costs + slack).tolist():
        raise AssertionError(
            f"an embedding on the prototype of label {labels[row]} costs more under that label "
            f"({costs[row, row]:.4g}) than under label {labels[column]} ({costs[row, column]:.4g}): the loss does not "
            "pull to its label"
        )
    require(bool((costs - own).mean() > slack), "the loss is the same under every label: the label is ignored")
    opposite = torch.stack([subject.total(-subject.prototypes[label][None], label[None]).detach() for label in labels])
    farther = bool((opposite - costs.diagonal()).mean() > slack)
    require(farther, "an embedding opposite to its prototype costs no more than one on it")


def follows_the_assignment(subject: Subject) -> None:
    """Once every label has another prototype, the loss pulls to that one."""
    if not subject.owns_head:
        return
    moved = subject.copy()
    moved.head.assign_((moved.head.assignment + 1) % moved.head.bank.num_prototypes)
    try:
        pulls_to_the_own_prototype(moved)
    except AssertionError as error:
        raise AssertionError(f"the loss does not follow a change of the assignment: {error}") from error


def _costs_on_prototype(subject: Subject, label: Tensor) -> Tensor:
    """(K,) losses of an embedding on the prototype of this label, under each of the labels."""
    embedding = subject.prototypes[label][None]
    return torch.stack([subject.total(embedding, other[None]).detach() for other in subject.classes])
