"""The checks against planted faults: each is caught and named, and nothing that is right is."""

import copy
import importlib
import random
import re
import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compatible import in_front
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import LOSSES as ALL
from torch import nn

import hyperproto
from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    functional,
)
from hyperproto import testing as public
from hyperproto.testing import banks, check_assignment, check_bank, check_loss, check_optimal, heads

LOSSES = ALL | {
    "cross-entropy, very steep": lambda source, **options: PrototypeCrossEntropyLoss(source, scale=200.0, **options),
}


def make_head(training_output: str = "logits", dim: int = 4) -> HypersphericalHead:
    """Six labels, spare prototypes, an assignment in no order."""
    bank = PrototypeBank(9, dim, method="random", seed=3)
    head = HypersphericalHead(dim, 6, bank=bank, projection="none", training_output=training_output)
    head.assign_(torch.tensor([7, 2, 0, 5, 1, 4]))
    return head


# What is right passes


@pytest.mark.filterwarnings("ignore:training_output:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize(
    ("name", "training_output", "reduction", "dim"),
    in_front(
        product(LOSSES, ["logits", "embedding"], ["mean", "sum", "none"], [4, 6]),
        # Each reduction over the losses, each loss with either output; six dimensions are as many as labels.
        *((name, "logits", "mean", 4) for name in LOSSES),
        *((name, "embedding", "none", 4) for name in LOSSES),
        ("balanced", "logits", "sum", 4),
        ("cross-entropy", "embedding", "sum", 6),
        ("balanced", "embedding", "mean", 6),
        ("long tail, per batch", "logits", "none", 6),
    ),
)
def test_every_loss_of_the_library_passes(name, training_output, reduction, dim):
    assigner = DynamicAssigner(make_head(training_output, dim))
    check_loss(LOSSES[name](assigner, reduction=reduction))
    assert not assigner.class_counts.any()


@settings(max_examples=12)
@given(head=heads(), loss=st.sampled_from([BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss]))
def test_losses_pass_on_every_head(head, loss):
    check_bank(head.bank)
    check_assignment(head)
    check_loss(loss(head))


SIZES = {
    "two labels": lambda: HypersphericalHead(8, 2, dim=2),
    "wide": lambda: HypersphericalHead(64, 40, dim=64, training_output="embedding"),
    "embedding": lambda: HypersphericalHead(64, 40, dim=32, training_output="embedding"),
    "many labels": lambda: HypersphericalHead(8, 300, dim=6, bank="random"),
}


@pytest.mark.parametrize(
    ("loss", "size"),
    in_front(
        product([BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss], SIZES),
        *((LongTailLoss, size) for size in SIZES),
        (BalancedLoss, "two labels"),
        (PrototypeCrossEntropyLoss, "embedding"),
    ),
)
@pytest.mark.filterwarnings("ignore:training_output:hyperproto.HyperprotoWarning")
def test_losses_pass_on_heads_of_other_sizes(loss, size):
    check_loss(loss(DynamicAssigner(SIZES[size]())))


class Own(nn.Module):
    """A loss of the user's own: nothing of the library but the head."""

    def __init__(self, head: HypersphericalHead, reduction: str = "mean") -> None:
        super().__init__()
        self.head, self.reduction = head, reduction

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        soft = F.one_hot(target, self.head.num_classes) if target.dim() == 1 else target
        losses = (soft * (1 - self.head.cosines_from_output(output))).sum(dim=1)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(len(losses), 1)}[self.reduction]


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_ones_own_passes(reduction, training_output):
    check_loss(Own(make_head(training_output), reduction))


def mean_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, reduction="sum") / max(len(logits), 1)


def test_a_function_is_given_a_head():
    head = make_head(dim=5)
    check_loss(mean_cross_entropy)
    check_loss(mean_cross_entropy, head)
    check_loss(mean_cross_entropy, nn.Sequential(nn.Linear(3, 5), head))
    check_loss(nn.CrossEntropyLoss(reduction="none"), head)
    check_loss(lambda output, target: functional.balanced_loss(head.cosines_from_output(output), target), head)
    embedding = make_head("embedding")
    check_loss(
        lambda output, target: functional.balanced_loss(output @ embedding.class_prototypes.T, target), embedding
    )


def test_the_mean_of_torch_has_no_value_for_an_empty_batch():
    with pytest.raises(AssertionError, match="empty batch must have loss 0, got nan"):
        check_loss(nn.CrossEntropyLoss())


def test_a_reduction_read_when_the_loss_is_made_is_left_at_that():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction, self.inner = "sum", nn.CrossEntropyLoss(reduction="sum")

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.inner(output, target)

    check_loss(Fixed())


# Wrong losses


def soft_only(change):
    """A fault in soft targets alone."""
    return lambda loss, output, target, right: right(output, target if target.dim() == 1 else change(target))


def top(target: torch.Tensor, k: int) -> torch.Tensor:
    kept = torch.zeros_like(target).scatter(1, target.topk(k, dim=1).indices, 1.0) * target
    return kept / kept.sum(dim=1, keepdim=True)


def clipped(target: torch.Tensor, smallest: float = 0.0, largest: float = 1.0) -> torch.Tensor:
    return torch.where(target < smallest, 0.0, target).clamp(max=largest)


def by_labels(target: torch.Tensor) -> torch.Tensor:
    """A number that depends on which labels a batch has."""
    labels = target if target.dim() == 1 else target.argmax(dim=1)
    return 1.0 + 0.1 * labels.float().mean() if len(labels) else torch.tensor(1.0)


def having(effect):
    """A loss that does something else on the way."""

    def fault(loss, output, target, right):
        value = right(output, target)
        effect(loss, output, target)
        return value

    return fault


def while_evaluating(effect):
    def fault(loss, output, target):
        if not (loss.training and torch.is_grad_enabled()):
            effect(loss, output, target)

    return having(fault)


def empty_is(value):
    return lambda loss, output, target, right: right(output, target) if len(output) else value(output)


def in_bank_order(loss, output, target, right):
    head = loss.head
    embeddings = output if head.is_embedding(output) else head.recover_embeddings(output)
    return right(head.logit_scale * (embeddings @ head.bank.prototypes[: head.num_classes].T), target)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.5 * gradient


def some_rows(choose):
    return lambda loss, output, target, right: right(output[choose(output)], target[choose(output)])


def weighed(weights):
    """A mean with weights for the samples; faults only where there are as many weights as samples."""

    def fault(loss, output, target, right):
        reduction, loss.reduction = loss.reduction, "none"
        losses = right(output, target)
        loss.reduction = reduction
        losses = losses * weights(output, target)
        return losses if reduction == "none" else losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)

    return fault


#: A fault, and a word of the message that it must get.
FAULTS = {
    # not linear in soft targets
    "squared weights": (soft_only(lambda t: t.square()), "not linear"),
    "square roots, normalised": (soft_only(lambda t: t.sqrt() / t.sqrt().sum(dim=1, keepdim=True)), "not linear"),
    "sharpened": (soft_only(lambda t: (5 * t).softmax(dim=1)), "one-hot"),
    "largest label": (soft_only(lambda t: t.argmax(dim=1)), "not linear"),
    "largest weight kept": (soft_only(lambda t: t * (t == t.amax(dim=1, keepdim=True))), "not linear"),
    "top 2": (soft_only(lambda t: top(t, 2)), "not linear"),
    "top 3": (soft_only(lambda t: top(t, 3)), "not linear"),
    "clipped below": (soft_only(lambda t: clipped(t, smallest=0.02)), "not linear"),
    "clipped above": (soft_only(lambda t: clipped(t, largest=0.95)), "one-hot"),
    "rounded": (soft_only(lambda t: (10 * t).round() / 10), "not linear"),
    "smoothed if soft": (soft_only(lambda t: 0.9 * t + 0.1 / t.shape[1]), "one-hot"),
    "ignored if soft": (soft_only(lambda t: torch.full_like(t, 1 / t.shape[1])), "one-hot"),
    # no pull to the label
    "detached": (lambda loss, output, target, right: right(output, target).detach(), "gradient"),
    "no gradient": (lambda loss, output, target, right: right(output, target).detach() + 0.0 * output.sum(),
                    "no gradient reaches"),
    "gradient away": (lambda loss, output, target, right: 2.0 * right(output, target).detach() - right(output, target),
                      "points away"),
    "negated": (lambda loss, output, target, right: -right(output, target), "negative"),
    "gradient too long": (lambda loss, output, target, right: Rounded.apply(right(output, target)), "wrong gradient"),
    "gradient clipped": (
        lambda loss, output, target, right: (
            output.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3)) if output.requires_grad else None,
            right(output, target))[1],
        "wrong gradient"),
    "half of the batch detached": (
        lambda loss, output, target, right: right(
            torch.cat([output[: len(output) // 2].detach(), output[len(output) // 2 :]]), target),
        "order"),
    "label ignored": (lambda loss, output, target, right: right(output, torch.zeros(len(output), dtype=torch.int64)),
                      "pull to its label|is ignored"),
    "next label": (lambda loss, output, target, right: right(output.roll(1, 1), target), "pull to its label"),
    "columns reversed": (lambda loss, output, target, right: right(output.flip(1), target), "pull to its label"),
    "constant": (lambda loss, output, target, right: right(torch.zeros_like(output), target), "gradient"),
    "absolute values": (lambda loss, output, target, right: right(output.abs(), target), "opposite"),
    # values
    "sum in the place of the mean": (
        lambda loss, output, target, right: right(output, target) * (len(output) if loss.reduction == "mean" else 1),
        '"mean"'),
    "mean by one too few": (
        lambda loss, output, target, right: right(output, target) * (1 + 1 / max(len(output), 2)), "twice"),
    "float16 output": (lambda loss, output, target, right: right(output.half().float(), target), "float32"),
    "bfloat16 output": (lambda loss, output, target, right: right(output.bfloat16().float(), target), "float32"),
    "float16 loss": (lambda loss, output, target, right: right(output, target).half().float(), "float32"),
    "float16 returned": (lambda loss, output, target, right: right(output, target).half(), "float32"),
    "not a number at zero": (
        lambda loss, output, target, right: right(output * (output.norm(dim=1, keepdim=True) /
                                                            output.norm(dim=1, keepdim=True)), target), "not finite"),
    "infinite gradient at zero": (
        lambda loss, output, target, right: right(output, target) + 0 * output.square().sum(dim=1).sqrt().mean(),
        "empty batch|not finite"),
    "a constant on top": (lambda loss, output, target, right: right(output, target) + 1.0, "empty batch"),
    # samples and batches
    "first sample": (some_rows(lambda output: slice(0, 1)), "part of the batch|shape|twice|mean"),
    "first eight": (some_rows(lambda output: slice(0, 8)), "part of the batch|shape|twice|mean"),
    "first hundred": (some_rows(lambda output: slice(0, 100)), "part of the batch|shape|twice|mean"),
    "all but the last": (some_rows(lambda output: slice(0, max(len(output) - 1, 1))), "part of the batch|shape|twice"),
    "every other sample": (some_rows(lambda output: slice(0, None, 2)), "part of the batch|shape|order"),
    "by position": (weighed(lambda output, target: torch.linspace(0.5, 1.5, len(output))), "order"),
    "hardest half": (weighed(lambda output, target: (output[:, 0] >= output[:, 0].median()) if len(output) else 1.0),
                     "part of the batch"),
    "centred": (
        lambda loss, output, target, right: right(0.5 * (output - output.sum(dim=0) / max(len(output), 1)), target),
        "other samples"),
    "scaled by the batch": (
        lambda loss, output, target, right: right(output / output.std() if len(output) else output, target),
        "other samples|not finite|loss|gradient"),
    "temperature by the size": (lambda loss, output, target, right: right(output / (1 + 0.01 * len(output)), target),
                                "twice"),
    "factor by the size": (lambda loss, output, target, right: right(output, target) * (1 + 0.01 * len(output)),
                           "twice"),
    "factor by the labels": (lambda loss, output, target, right: right(output, target) * by_labels(target),
                             "other samples|pull"),
    "factor by the outputs": (
        lambda loss, output, target, right: right(output, target) * (1 + output[:, 0].detach().square().sum()
                                                                     / max(len(output), 1)),
        "slope|other samples|gradient"),
    "labels of others": (lambda loss, output, target, right: right(output, target.roll(1, 0)), "order|pull"),
    "labels sorted": (lambda loss, output, target, right: right(output, target.sort(dim=0).values if target.dim() == 1
                                                                    else target), "order|one-hot"),
    "another loss for one sample": (
        lambda loss, output, target, right: right(output, target) * (1.1 if len(output) == 1 else 1.0),
        "other samples"),
    "another loss for odd batches": (
        lambda loss, output, target, right: right(output, target) * (1.1 if len(output) % 2 else 1.0), "twice"),
    "batch energy": (
        lambda loss, output, target, right: right(output, target)
        + 0.1 * output.sum(dim=0).square().sum() / max(len(output), 1) ** 2, '"sum"'),
    # what it is given
    "output changed": (having(lambda loss, output, target: output.detach().mul_(0.5)), "changed the output"),
    "labels changed": (having(lambda loss, output, target: target.zero_()), "changed the labels"),
    "soft targets changed": (
        having(lambda loss, output, target: target.mul_(0.5) if target.dim() == 2 else None),
        "changed the soft targets"),
    "assignment changed": (having(lambda loss, output, target: loss.head.assign_(loss.head.assignment.roll(1))),
                           "head.assignment"),
    "assignment changed in eval": (
        while_evaluating(lambda loss, output, target: loss.head.assign_(loss.head.assignment.roll(1))),
        "head.assignment"),
    "bank changed": (having(lambda loss, output, target: loss.head.bank.prototypes.neg_()), "head.bank.prototypes"),
    "bank changed in eval": (while_evaluating(lambda loss, output, target: loss.head.bank.prototypes.neg_()),
                             "head.bank.prototypes"),
    "scale changed": (having(lambda loss, output, target: loss.head.logit_scale.mul_(1.001)), "head.logit_scale"),
    "scale changed in eval": (while_evaluating(lambda loss, output, target: loss.head.logit_scale.mul_(1.001)),
                              "head.logit_scale"),
    "bank made to train": (having(lambda loss, output, target: loss.head.bank.prototypes.requires_grad_()),
                           "head.bank.prototypes.requires_grad"),
    "draws": (having(lambda loss, output, target: torch.rand(())), "torch's global random state"),
    "seeds": (having(lambda loss, output, target: torch.manual_seed(0)), "torch's global random state"),
    "draws from NumPy": (having(lambda loss, output, target: np.random.random()), "NumPy's global"),
    "draws from Python": (having(lambda loss, output, target: random.random()), "Python's global"),
    "default dtype": (having(lambda loss, output, target: torch.set_default_dtype(torch.float64)), "default dtype"),
    "gradients off": (having(lambda loss, output, target: torch.set_grad_enabled(False)), "gradients are on"),
    "head to eval mode": (having(lambda loss, output, target: loss.head.eval()), "head.training"),
    "loss to eval mode": (having(lambda loss, output, target: loss.eval()), "train or eval mode"),
    "to train mode when evaluating": (while_evaluating(lambda loss, output, target: loss.train()), "loss.training"),
    "counts calls when evaluating": (
        while_evaluating(lambda loss, output, target: setattr(loss, "calls", getattr(loss, "calls", 0) + 1)),
        "loss.calls"),
    # an empty batch
    "not a number if empty": (empty_is(lambda output: output.sum() / len(output)), "empty batch"),
    "one if empty": (empty_is(lambda output: output.sum() + 1.0), "empty batch"),
    "cut off if empty": (empty_is(lambda output: torch.zeros(())), "empty batch"),
    "raises if empty": (empty_is(lambda output: output.max()), "raised"),
    # the head
    "bank order": (in_bank_order, "pull to its label"),
    "a factor of the scale": (
        lambda loss, output, target, right: right(output, target) * loss.head.logit_scale, "logit_scale"),
    "logits taken for cosines": (
        lambda loss, output, target, right: right(output / loss.head.logit_scale, target), "logit_scale|formula"),
    "coordinates of one sign": (
        lambda loss, output, target, right: right(output.clamp(min=-0.5), target), "part of the batch"),
}  # fmt: skip


#: What is no fault in a loss of the user's own, which may have any scale.
LIBRARY_FAULTS = ("a factor of the scale", "logits taken for cosines")


def planted(base, change, *arguments):
    """A loss with a fault: `change(loss, output, target, right)` in the place of its forward."""

    class Planted(base):
        def forward(self, output, target):
            return change(self, output, target, super().forward)

    return Planted(*arguments)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(name):
    change, words = FAULTS[name]
    with pytest.raises(AssertionError, match=words):
        check_loss(planted(BalancedLoss, change, make_head()))


@pytest.mark.parametrize("name", in_front(FAULTS, *list(FAULTS)[::8], *LIBRARY_FAULTS[:1]))
def test_a_planted_fault_is_caught_in_a_loss_of_ones_own(name):
    loss = planted(Own, FAULTS[name][0], make_head())
    if name in LIBRARY_FAULTS:
        check_loss(loss)
    else:
        with pytest.raises(AssertionError):
            check_loss(loss)


@pytest.mark.slow
@pytest.mark.parametrize("base", [Own, BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss])
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_in_any_loss(name, training_output, base):
    if base is Own and name in LIBRARY_FAULTS:
        pytest.skip("no fault in a loss of one's own, which may have any scale")
    loss = planted(base, FAULTS[name][0], make_head(training_output))
    with pytest.raises(AssertionError):
        check_loss(loss)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_under_any_reduction(name, reduction):
    if name == "sum in the place of the mean":
        reduction = "mean"

    class Reduced(BalancedLoss):
        def __init__(self) -> None:
            super().__init__(make_head(), reduction=reduction)

    with pytest.raises(AssertionError, match=r"."):
        check_loss(planted(Reduced, FAULTS[name][0]))


def wrong_reduction(right_of):
    class Wrong(BalancedLoss):
        def forward(self, output, target):
            return right_of(self.reduction, functional.balanced_loss(
                self.head.cosines_from_output(output), target, reduction="none"))  # fmt: skip

    return Wrong(make_head())


@pytest.mark.parametrize(
    ("right_of", "words"),
    [
        (lambda reduction, losses: losses.sum() / max(len(losses), 1), r"shape \(131,\)"),
        (lambda reduction, losses: losses if reduction == "none" else losses.sum() / max(len(losses), 1), '"sum"'),
        (lambda reduction, losses: losses if reduction == "none" else losses.sum(), '"mean"'),
        (lambda reduction, losses: losses / max(len(losses), 1) if reduction == "none" else losses.sum(), '"sum"'),
    ],
    ids=["always the mean", "no sum", "no mean", "none divided"],
)
def test_reductions_that_do_not_belong_together_are_caught(right_of, words):
    with pytest.raises(AssertionError, match=words):
        check_loss(wrong_reduction(right_of))


def feeding(change):
    """A loss that writes to the assigner that it feeds."""
    return planted(BalancedLoss, change, DynamicAssigner(make_head()))


def test_feeding_an_assigner_while_evaluating_is_caught():
    def fault(loss, output, target, right):
        if not loss.training and len(output):
            loss.assigner.update(output.detach(), target)
        return right(output, target)

    with pytest.raises(AssertionError, match=r"loss\.assigner\.class_means.*eval mode"):
        check_loss(feeding(fault))


def test_feeding_an_assigner_under_no_grad_is_caught():
    def fault(loss, output, target, right):
        if not torch.is_grad_enabled():
            loss.assigner.class_means.mul_(0.9).add_(0.1)
        return right(output, target)

    with pytest.raises(AssertionError, match=r"loss\.assigner\.class_means.*no_grad"):
        check_loss(feeding(fault))


def test_feeding_an_assigner_twice_or_never_is_caught():
    with pytest.raises(AssertionError, match="fed 262 samples of a batch of 131"):
        check_loss(feeding(lambda loss, output, target, right: 0.5 * (right(output, target) + right(output, target))))
    with pytest.raises(AssertionError, match="fed 0 samples"):
        check_loss(feeding(lambda loss, output, target, right: functional.balanced_loss(
            loss.head.cosines_from_output(output), target, reduction=loss.reduction)))  # fmt: skip


def test_what_embeddings_alone_show():
    for change, words in (
        (
            lambda loss, output, target, right: right(output * torch.tensor([1.0, 1.0, 1.0, 0.2]), target),
            "rotating|costs",
        ),
        (lambda loss, output, target, right: right(0.9 * output + 0.05, target), "rotating"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_loss(planted(Own, change, make_head("embedding")))


def test_prototypes_taken_once_are_caught():
    class Stale(Own):
        def __init__(self, head: HypersphericalHead) -> None:
            super().__init__(head)
            self.register_buffer("kept", head.class_prototypes.clone())

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return functional.balanced_loss(output @ self.kept.T, target)

    with pytest.raises(AssertionError, match="does not follow a change of the assignment"):
        check_loss(Stale(make_head("embedding")))


def test_logits_and_embeddings_that_give_two_losses_are_caught():
    def fault(loss, output, target, right):
        return right(output, target) if output.shape[1] == loss.head.num_classes else right(0.9 * output, target)

    for base in (BalancedLoss, LongTailLoss):
        with pytest.raises(AssertionError, match=r"formula|different losses"):
            check_loss(planted(base, fault, make_head()))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_fault_in_one_mode_is_caught(mode):
    def fault(loss, output, target, right):
        return right(output, target) * (1.5 if loss.training == (mode == "train") else 1.0)

    with pytest.raises(AssertionError, match="formula"):
        check_loss(planted(BalancedLoss, fault, make_head()))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, target: F.cross_entropy(output, target, reduction="sum"), "twice"),
        (lambda output, target: 0.5, "must return a tensor, got float"),
        (lambda output, target: -output.gather(1, target[:, None]).mean(), "negative|raised"),
        (nn.CrossEntropyLoss(reduction="none", weight=torch.tensor([1.0, 2.0])), r"check_loss\(loss, head\)"),
        ("balanced", "expected a loss"),
    ],
    ids=["sum", "number", "labels only", "another head's", "no loss"],
)
def test_wrong_losses_of_ones_own_are_caught(loss, words):
    with pytest.raises(AssertionError, match=words):
        check_loss(loss)


def test_a_model_without_a_head_is_refused():
    for call in (lambda: check_loss(mean_cross_entropy, nn.Linear(3, 3)), lambda: check_assignment(nn.Linear(3, 3))):
        with pytest.raises(HeadNotFoundError, match="convert_model"):
            call()


def test_everything_is_left_as_it_was():
    head = make_head()
    assigner = DynamicAssigner(head)
    assigner.update(head(torch.randn(12, 4)), torch.arange(12) % 6)
    loss = BalancedLoss(assigner)
    head.eval()
    state = copy.deepcopy((head.state_dict(), assigner.state_dict()))
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def careless(output, target):
        torch.rand(()), np.random.random(), random.random()
        head.assign_(head.assignment.roll(1))
        head.train()
        return mean_cross_entropy(output, target)

    with torch.no_grad():
        check_loss(loss)
        check_bank(head.bank)
        check_assignment(head)
        with pytest.raises(AssertionError, match="random state"):
            check_loss(careless, head)
    for before, after in zip(state, (head.state_dict(), assigner.state_dict()), strict=True):
        assert all(torch.equal(before[name], value) for name, value in after.items())
    assert (head.training, loss.training, assigner.history) == (False, True, ())
    assert torch.equal(generators[0], torch.get_rng_state())
    assert np.array_equal(generators[1], np.random.get_state()[1])
    assert generators[2] == random.getstate()


# Banks


@given(bank=banks())
def test_every_drawn_bank_passes(bank):
    check_bank(bank)
    check_bank(bank.prototypes)


@pytest.mark.parametrize("method", ["simplex", "orthoplex", "separated", "uniform", "energy", "hpn", "random"])
def test_every_construction_passes(method):
    num_prototypes, dim = {"simplex": (5, 4), "orthoplex": (8, 4)}.get(method, (12, 4))
    check_bank(PrototypeBank(num_prototypes, dim, method=method))


def changed_bank(change):
    bank = PrototypeBank(6, 4, seed=1)
    change(bank)
    return bank


def write(row, value):
    return lambda bank: bank.prototypes[row].copy_(value(bank.prototypes))


def parameter(bank):
    prototypes = bank.prototypes
    del bank.prototypes
    bank.prototypes = nn.Parameter(prototypes)


def attribute(bank):
    prototypes = bank.prototypes
    del bank.prototypes
    bank.prototypes = prototypes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write(4, lambda rows: rows[1]), "rows 1 and 4 are equal"),
        (write(4, lambda rows: F.normalize(rows[1] + 1e-4 * rows[0], dim=0)), "rows 1 and 4 are only .*apart"),
        (write(4, lambda rows: F.normalize(rows[1] + 5e-4 * rows[0], dim=0)), "rows 1 and 4"),
        (write(2, lambda rows: 1.001 * rows[2]), "length 1, row 2"),
        (write(2, lambda rows: torch.zeros(4)), "length 1, row 2"),
        (write(2, lambda rows: torch.full((4,), float("nan"))), r"finite; rows \[2\]"),
        (write(2, lambda rows: torch.full((4,), float("inf"))), r"finite; rows \[2\]"),
        (lambda bank: bank.prototypes.requires_grad_(), "must not train"),
        (parameter, "must not train"),
        (lambda bank: bank.register_parameter("gain", nn.Parameter(torch.ones(1))), "must not train.*gain"),
        (attribute, "must be a buffer"),
        (lambda bank: setattr(bank, "prototypes", bank.prototypes.double()), "float32, got torch.float64"),
        (lambda bank: setattr(bank, "prototypes", bank.prototypes.half()), "float32, got torch.float16"),
        (lambda bank: setattr(bank, "prototypes", bank.prototypes[0]), "shape"),
        (lambda bank: setattr(bank, "prototypes", bank.prototypes[:1]), "shape"),
        (lambda bank: setattr(bank, "prototypes", bank.prototypes[None]), "shape"),
        (lambda bank: bank.to_empty(device="cpu"), "finite"),
        (lambda bank: bank.to("meta"), "meta"),
    ],
)  # fmt: skip
def test_a_wrong_bank_is_caught_and_named(change, words):
    with torch.no_grad():
        bank = changed_bank(change)
    with pytest.raises(AssertionError, match=words):
        check_bank(bank)


def test_a_bank_that_says_another_size_is_caught():
    class Boastful(PrototypeBank):
        @property
        def num_prototypes(self) -> int:
            return 7

    with pytest.raises(AssertionError, match=r"the bank says \(7, 4\)"):
        check_bank(Boastful(6, 4))


@pytest.mark.parametrize(
    "prototypes",
    [torch.ones(3, 3), torch.eye(3).int(), torch.eye(3).double(), F.normalize(torch.ones(3, 3)), torch.eye(2)[:, :1],
     np.eye(3), [[1.0, 0.0], [0.0, 1.0]], None, nn.Linear(2, 2)],
)  # fmt: skip
def test_wrong_prototypes_are_caught(prototypes):
    check_bank(torch.eye(3))
    with pytest.raises(AssertionError, match="prototypes"):
        check_bank(prototypes)


def test_equal_rows_among_thousands_are_found():
    bank = PrototypeBank(3000, 64, method="code")
    check_bank(bank)
    bank.prototypes[2999] = bank.prototypes[17]
    with pytest.raises(AssertionError, match="rows 17 and 2999"):
        check_bank(bank)


# Assignments and solvers


def assigned(assignment):
    head = make_head()
    head.assignment = torch.as_tensor(assignment)
    return head


WRONG_ASSIGNMENTS = [
    ([0, 1, 2, 3, 3, 5], r"more than once: \[3\]"),
    ([0, 1, 2, 3, 4, 9], "values from 0 to 9"),
    ([0, 1, 2, 3, 4, -1], "values from -1 to 4"),
    ([0, 1, 2, 3, 4], r"shape \(6,\)"),
    ([[0, 1, 2, 3, 4, 5]], r"shape \(6,\)"),
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "int64, got"),
    (torch.arange(6, dtype=torch.int32), "int64, got"),
    (torch.arange(6, device="meta"), "meta"),
]


@pytest.mark.parametrize(("assignment", "words"), WRONG_ASSIGNMENTS)
def test_a_wrong_assignment_is_caught_and_named(assignment, words):
    head = assigned(assignment)
    for source in (head, nn.Sequential(nn.Linear(3, 4), make_head(), head)):
        with pytest.raises(AssertionError, match=words):
            check_assignment(source)
    with pytest.raises(AssertionError, match=words):
        check_optimal(dict(head.named_buffers())["assignment"], torch.eye(9)[:6], torch.eye(9))


def test_assignments_as_tensors():
    check_assignment(torch.tensor([2, 0, 1]))
    check_assignment(torch.tensor([2, 0, 1]), num_prototypes=3)
    for assignment, words in (
        (torch.tensor([3, 0, 1]), "values from 0 to 3"),
        (torch.tensor([0, 0, 1]), "more than once"),
        (torch.tensor([0, -1, 1]), "values from -1"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.tensor([[0, 1]]), r"shape \(C,\)"),
        (np.arange(3), "got ndarray"),
        ([0, 1, 2], "got list"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_assignment(assignment, num_prototypes=3)


def unit(num: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)))


def greedy(means: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Each label takes the nearest prototype that is left."""
    cosines, chosen = means @ prototypes.T, []
    for row in cosines:
        row[chosen] = -2.0
        chosen.append(int(row.argmax()))
    return torch.tensor(chosen)


WRONG_SOLVERS = {
    "identity": (lambda means, prototypes: torch.arange(len(means)), "not optimal"),
    "greedy": (greedy, "not optimal"),
    "nearest": (lambda means, prototypes: (means @ prototypes.T).argmax(dim=1), "more than once"),
    "largest cost": (
        lambda means, prototypes: functional.solve_assignment(-means, prototypes).assignment, "not optimal"),
    "the other way": (
        lambda means, prototypes: functional.solve_assignment(means, prototypes[: len(means)]).assignment.argsort(),
        "not optimal"),
    "first prototypes only": (
        lambda means, prototypes: functional.solve_assignment(means, prototypes[: len(means)]).assignment,
        "not optimal"),
    "float": (lambda means, prototypes: functional.solve_assignment(means, prototypes).assignment.float(), "int64"),
    "counted from one": (lambda means, prototypes: torch.arange(len(prototypes), 0, -1)[: len(means)], "there are"),
    "two labels swapped": (
        lambda means, prototypes: functional.solve_assignment(means, prototypes).assignment[
            torch.tensor([1, 0, *range(2, len(means))])], "not optimal"),
}  # fmt: skip


@pytest.mark.parametrize(("num_classes", "num_prototypes"), [(5, 7), (40, 50)])
@pytest.mark.parametrize("name", WRONG_SOLVERS)
def test_a_wrong_solver_is_caught_and_named(name, num_classes, num_prototypes):
    solver, words = WRONG_SOLVERS[name]
    means, prototypes = unit(num_classes, 6, 0), unit(num_prototypes, 6, 1)
    check_optimal(functional.solve_assignment(means, prototypes).assignment, means, prototypes)
    with pytest.raises(AssertionError, match=words):
        check_optimal(solver(means, prototypes), means, prototypes)


@pytest.mark.parametrize(
    ("means", "prototypes", "words"),
    [
        (torch.eye(3)[:2], torch.eye(2), "1 <= C <= P"),
        (torch.eye(3), torch.eye(3)[:2], "1 <= C <= P"),
        (torch.eye(3)[0], torch.eye(3), "matrix"),
        (torch.full((2, 3), float("nan")), torch.eye(3), "class means must be finite"),
        (np.eye(3), torch.eye(3), "got ndarray"),
    ],
)
def test_a_problem_that_is_none_is_named(means, prototypes, words):
    with pytest.raises(AssertionError, match=words):
        check_optimal(torch.arange(2), means, prototypes)


# hypothesis


def test_checks_work_without_hypothesis_and_strategies_name_it():
    head = HypersphericalHead(8, 4, dim=3)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(sys.modules):
            if name.startswith(("hypothesis.", "hyperproto.testing")):
                patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "hypothesis", None)
        patch.setattr(hyperproto, "testing", public)  # puts back what the import below replaces
        testing = importlib.import_module("hyperproto.testing")
        assert testing is not public
        testing.check_bank(head.bank)
        testing.check_assignment(head)
        testing.check_loss(BalancedLoss(head))
        with pytest.raises(ImportError, match=re.escape('pip install "hyperproto[test]"')):
            testing.heads()
    assert hyperproto.testing is sys.modules["hyperproto.testing"] is public


def test_every_public_name_is_there():
    assert public.__all__ == sorted(public.__all__)
    assert all(getattr(public, name) is not None for name in public.__all__)
    with pytest.raises(AttributeError, match="no attribute 'strategy'"):
        _ = public.strategy
