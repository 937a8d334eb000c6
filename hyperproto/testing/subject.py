"""A loss under test: copied, called in one way whatever it is, and fed with outputs that its head could have made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.bank import PrototypeBank
from hyperproto.functional import Reduction
from hyperproto.head import HypersphericalHead
from hyperproto.losses import PrototypeLoss
from hyperproto.testing.assignment_checks import check_assignment
from hyperproto.testing.requirements import heads_of, require, unit_rows

Loss = Callable[[Tensor, Tensor], Tensor]
Form = Literal["logits", "embedding"]

#: At least so many samples in a batch: more than a fault that looks at a part of the batch is likely to take.
SAMPLES = 131

#: Labels that occur in the batches, spread over all C.
CLASSES = 10

#: What a loss may raise of its own accord. Other errors, such as a call with wrong arguments, go through.
RAISED = (ArithmeticError, LookupError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Batch:
    """Unit embeddings (B, D) and labels (B,)."""

    embeddings: Tensor
    labels: Tensor

    def __getitem__(self, index: slice | Tensor) -> Batch:
        return Batch(self.embeddings[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Subject:
    """A loss and the head whose outputs it gets.

    Attributes:
        loss: a copy of the loss given, or itself where it is a function.
        head: a copy of its head.
        form: what the outputs are.
        training: whether loss and head are in train mode.
        reduction: "mean", "sum" or "none"; a loss that does not say is taken for what the shape of its result says.
        owns_head: whether the loss holds the head, so that what is changed in this copy, the loss sees.
        watched: what the loss must leave alone also in training: the head, and the one that it was copied from.
    """

    loss: Loss
    head: HypersphericalHead
    form: Form
    training: bool
    reduction: Reduction
    owns_head: bool
    watched: dict[str, nn.Module]

    # How it is called

    def output(self, embeddings: Tensor) -> Tensor:
        """What a model returns for these embeddings: never a leaf, so that a change in place shows in its values."""
        if self.form == "embedding":
            return embeddings.clone()
        return self.head.logit_scale * (embeddings @ self.head.class_prototypes.T)

    def call(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss itself, with what it raises and returns checked."""
        given = f"{self.form} of shape {tuple(output.shape)} and a target of shape {tuple(target.shape)}"
        try:
            value = self.loss(output, target)
        except RAISED as error:
            raise AssertionError(
                f"the loss raised {type(error).__name__} for {given}: {error} If it was made for another head, give "
                "that one: check_loss(loss, head)."
            ) from error
        require(isinstance(value, Tensor), f"the loss must return a tensor, got {type(value).__name__}")
        shape = (len(output),) if self.reduction == "none" else ()
        require(
            tuple(value.shape) == shape,
            f'the loss must have shape {shape} for {given} and reduction "{self.reduction}", got {tuple(value.shape)}',
        )
        precise = value.dtype in (torch.float32, torch.float64)
        require(precise, f"the loss must be float32, got {value.dtype}")
        return value

    def value(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """() or, for reduction "none", (B,)."""
        return self.call(self.output(embeddings), target)

    def result(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The value alone, cut off from its graph."""
        return self.value(embeddings, target).detach()

    def total(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """() float64, the sum over samples whatever the reduction is."""
        total = self.value(embeddings, target).double().sum()
        return len(target) * total if self.reduction == "mean" else total

    def total_and_gradient(self, embeddings: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The total, and its gradient (B, D) with respect to the embeddings."""
        leaf = embeddings.clone().requires_grad_()
        total = self.total(leaf, target)
        require(total.requires_grad, "the loss has no gradient: what it returns is cut off from the output")
        try:
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        except RuntimeError as error:
            raise AssertionError(f"the loss has no gradient, its backward pass fails: {error}") from error
        require(gradient is not None, "the loss has no gradient with respect to the output")
        return total.detach(), gradient

    # What it is given

    @property
    def prototypes(self) -> Tensor:
        """(C, D): row k stands for label k."""
        return self.head.class_prototypes

    @property
    def classes(self) -> Tensor:
        """(K,) labels that the batches hold."""
        num_classes = self.head.num_classes
        labels = torch.linspace(0, num_classes - 1, min(num_classes, CLASSES), device="cpu", dtype=torch.float64)
        return labels.round().long().to(self.head.assignment.device)

    def random(self, num_rows: int, seed: int = 0) -> Tensor:
        """(N, D) unit rows in random directions."""
        return unit_rows(num_rows, self.head.dim, seed).to(self.head.assignment.device)

    def balanced(self, *, towards: float = 0.0, seed: int = 0) -> Batch:
        """As many samples of each label, embeddings at random about `towards` times the own prototype."""
        places = torch.arange(len(self.classes) * math.ceil(SAMPLES / len(self.classes)), device=self.classes.device)
        return self._around(self.classes[places % len(self.classes)], towards, seed)

    def misplaced(self, *, seed: int = 0) -> Batch:
        """As many samples of each label, embeddings about the prototype of the next label."""
        labels = self.balanced().labels
        around = self._around(self.after(labels), 3.0, seed)
        return Batch(around.embeddings, labels)

    def imbalanced(self, *, seed: int = 0) -> Batch:
        """Every label, the first ones most often, in no order."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shares = (torch.randperm(SAMPLES, generator=generator, device="cpu") / SAMPLES).square()
        places = (len(self.classes) * shares).long().to(self.classes.device)
        return self._around(self.classes[places], 0.0, seed)

    def _around(self, labels: Tensor, towards: float, seed: int) -> Batch:
        return Batch(F.normalize(towards * self.prototypes[labels] + self.random(len(labels), seed)), labels)

    def after(self, labels: Tensor, by: int = 1) -> Tensor:
        """For each label the one so many places later among `classes`: samples change theirs, counts stay."""
        return self.classes[(torch.searchsorted(self.classes, labels) + by) % len(self.classes)]

    def one_hot(self, labels: Tensor) -> Tensor:
        """(B, C) float32."""
        return F.one_hot(labels, self.head.num_classes).float()

    def mixed(self, labels: Tensor, seed: int = 0) -> Tensor:
        """Soft targets (B, C) without a zero among the labels of the batch, of the same sum for each of them."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shares = (2.0 * torch.randn(len(self.classes), generator=generator, device="cpu")).softmax(dim=0).tolist()
        targets = [share * self.one_hot(self.after(labels, by)) for by, share in enumerate(shares)]
        return torch.stack(targets).sum(dim=0)

    # Its variants

    def copy(self) -> Subject:
        """One whose loss and head may be changed."""
        loss, head = copy.deepcopy((self.loss, self.head))
        return replace(self, loss=loss, head=head, watched=self.watched | {"head": head})

    def evaluating(self) -> Subject:
        """One in eval mode, where a head takes embeddings for logits if both have one width."""
        form: Form = "logits" if self.head.dim == self.head.num_classes else self.form
        return replace(self.copy(), training=False, form=form).in_mode()

    def in_mode(self) -> Subject:
        """Itself, with loss and head in the mode that `training` says."""
        for module in (self.loss, self.head):
            if isinstance(module, nn.Module):
                module.train(self.training)
        return self


def own_head(loss: Loss) -> HypersphericalHead | None:
    """The head that a loss holds as `.head`."""
    head = getattr(loss, "head", None)
    return head if isinstance(head, HypersphericalHead) else None


def default_head() -> HypersphericalHead:
    """Six labels, eight prototypes in four dimensions, and an assignment in no order."""
    head = HypersphericalHead(4, 6, bank=PrototypeBank(8, 4, seed=1), projection="none")
    head.assign_(torch.tensor([7, 2, 0, 5, 1, 4], device="cpu"))
    return head


def subjects(loss: Loss, head: nn.Module | None) -> list[Subject]:
    """The loss with each form of output that it promises to take; copies of what can be copied."""
    require(callable(loss), f"expected a loss that is called as loss(output, target), got {type(loss).__name__}")
    own = own_head(loss)
    head = own or (default_head() if head is None else next(iter(heads_of(head).values())))
    check_assignment(head)
    finite = bool(torch.isfinite(head.class_prototypes).all())
    require(finite, "the head's prototypes must be finite, or there is nothing to pull to")
    return [_subject(loss, head, form, training, own is not None) for form, training in _forms(loss, head)]


def _forms(loss: Loss, head: HypersphericalHead) -> list[tuple[Form, bool]]:
    """Forms of output, each with whether the head returns it in train mode."""
    first: Form = head.training_output
    forms = [(first, True)]
    if isinstance(loss, PrototypeLoss):
        if first == "embedding":
            forms.append(("logits", False))
        elif head.dim != head.num_classes:  # the width tells them apart
            forms.append(("embedding", True))
    return forms


def _subject(loss: Loss, head: HypersphericalHead, form: Form, training: bool, owns_head: bool) -> Subject:
    loss_copy, head_copy = copy.deepcopy((loss, head))
    watched: dict[str, nn.Module] = {"head": head_copy, "head (the one given)": head}
    subject = Subject(loss_copy, head_copy, form, training, "none", owns_head, watched).in_mode()
    return replace(subject, reduction=_reduction(subject.copy()))


def _reduction(subject: Subject) -> Reduction:
    declared = getattr(subject.loss, "reduction", None)
    if declared == "mean" or declared == "sum" or declared == "none":
        return declared
    batch = subject.balanced()
    try:
        value = subject.loss(subject.output(batch.embeddings), batch.labels)
    except RAISED:
        return "none"  # raised once more, and reported, by the first property that calls it
    return "none" if isinstance(value, Tensor) and value.dim() == 1 else "mean"
