"""Mistakes that pass silently elsewhere: each is told, once per object and cause, and sane loops hear nothing."""

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clouds import batch, make_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HyperprotoWarning,
    HypersphericalHead,
    PrototypeBank,
    convert_model,
    fit_logit_scale,
)
from hyperproto.testing import SEEDS


def told(action: Callable[[], object]) -> list[str]:
    """What the library warned of, all of it from this file's lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        action()
    assert all(each.category is HyperprotoWarning and each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


class Loop:
    """A training loop of one's own."""

    def __init__(self, model, criterion, assigner, *, optimized=None):
        self.model, self.criterion, self.assigner = model, criterion, assigner
        self.optimizer = torch.optim.SGD((model if optimized is None else optimized).parameters(), 0.05)

    def epoch(self, batches=None):
        for features, labels in batches or [batch(seed=seed) for seed in range(5)]:
            self.criterion(self.model(features), labels).backward()
            self.optimizer.step()
            self.model.zero_grad()
        return self.assigner.step()


@pytest.mark.parametrize("decorate", [lambda call: call, torch.no_grad()])
def test_warnings_point_at_the_line_that_calls_the_library(decorate):
    model, (features, labels) = make_model(), batch()
    target = 100 * nn.functional.one_hot(labels, 4).float()
    actions = [
        decorate(lambda: BalancedLoss(model)(model(features), target)),
        decorate(lambda: fit_logit_scale(model, [(features, model.eval()(features).argmax(dim=1))])),
        decorate(lambda: PrototypeBank.from_tensor([[1, 0], [1, 0], [0, 1]])),
    ]
    for action in actions:
        assert len(told(action)) == 1  # of this file's lines


# What a step tells


def never_fed():
    model = make_model()
    return Loop(model, BalancedLoss(model), DynamicAssigner(model))


def another_assigner():
    model = make_model()
    return Loop(model, BalancedLoss(DynamicAssigner(model)), DynamicAssigner(model))


def criterion_in_eval_mode():
    model = make_model()
    assigner = DynamicAssigner(model)
    return Loop(model, BalancedLoss(assigner).eval(), assigner)


def model_in_eval_mode():
    model = make_model().eval()
    assigner = DynamicAssigner(model)
    return Loop(model, BalancedLoss(assigner), assigner)


def too_many_labels():
    model = make_model(num_classes=100, dim=8)
    assigner = DynamicAssigner(model)
    return Loop(model, BalancedLoss(assigner), assigner)


def optimizer_without_the_head():
    model = make_model()
    assigner = DynamicAssigner(model)
    return Loop(model, BalancedLoss(assigner), assigner, optimized=model[0])


MISTAKES = {
    never_fed: "no batch has reached this assigner, .*BalancedLoss\\(assigner\\)",
    another_assigner: "no batch has reached this assigner, .*step the same assigner",
    criterion_in_eval_mode: "the criterion is in eval mode.*criterion.train",
    model_in_eval_mode: "the model is in eval mode.*model.train",
    too_many_labels: "96 of 100 labels were not seen.*num_classes",
    optimizer_without_the_head: "the optimizer does not have them.*after hyperproto.convert_model",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_step_names_the_mistake_once_for_each_assigner(mistake):
    # One line steps for both: Python's own filter would let the second one through unheard.
    loops = [mistake(), mistake()]
    messages = told(lambda: [loop.epoch() for loop in loops for _ in range(3)])
    assert len(messages) == 2
    for message in messages:
        assert re.search(MISTAKES[mistake], message)


def test_a_model_left_in_eval_mode_after_an_epoch_that_was_right():
    loop = model_in_eval_mode()
    loop.model.train()
    assert not told(loop.epoch)
    loop.model.eval()
    assert len(told(loop.epoch)) == 1


def test_a_validation_with_gradients_is_none():
    loop = model_in_eval_mode()

    def epochs():
        for _ in range(2):
            loop.model.train()
            loop.epoch()
            loop.model.eval()
            loop.criterion(loop.model(batch()[0]), batch()[1])

    assert not told(epochs)


def test_batch_norm_of_the_backbone_frozen_and_the_head_training_is_none():
    loop = model_in_eval_mode()
    loop.model[1].train()
    assert not told(loop.epoch)


def test_a_second_step_without_batches_is_none():
    loop = model_in_eval_mode()
    loop.model.train()
    loop.epoch()
    assert not told(loop.assigner.step)


def test_a_projection_that_is_meant_to_stay_is_none():
    loop = optimizer_without_the_head()
    loop.model[1].projection.requires_grad_(False)
    assert not told(loop.epoch)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_an_optimizer_that_warms_up_or_writes_through_data_is_none(rate):
    loop = optimizer_without_the_head()
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 0.0)
    if rate:
        loop.optimizer.step = lambda: [each.data.sub_(rate * each.grad.data) for each in loop.model.parameters()]
    assert not told(loop.epoch)


def test_an_optimizer_from_before_the_conversion():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_model(model, dim=3, classifier="2")
    assigner = DynamicAssigner(model)
    loop = Loop(model, BalancedLoss(assigner), assigner)
    loop.optimizer = optimizer
    with pytest.warns(HyperprotoWarning, match="does not have them"):
        loop.epoch()


def test_few_batches_with_gradients_are_none():
    loop = optimizer_without_the_head()
    assert not told(lambda: loop.epoch([batch()] * 3))


def test_epochs_that_a_gradient_scaler_skips_are_none():
    model = make_model()
    assigner = DynamicAssigner(model)
    loop = Loop(model, BalancedLoss(assigner), assigner)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    before = [each.detach().clone() for each in model.parameters()]

    def epoch():
        for seed in range(6):
            features, labels = batch(seed=seed)
            scaler.scale(1e4 * loop.criterion(model(features), labels)).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            model.zero_grad()
        assigner.step()

    assert told(epoch) == []
    assert all(torch.equal(*each) for each in zip(before, model.parameters(), strict=True)), "steps that were skipped"
    assert told(lambda: [epoch() for _ in range(4)]) == []


def test_nothing_that_steps_at_all_is_told_when_no_scaler_would_skip_so_often():
    model = make_model()
    assigner = DynamicAssigner(model)
    loop = Loop(model, BalancedLoss(assigner), assigner, optimized=nn.Linear(8, 8))
    assert told(lambda: [loop.epoch() for _ in range(3)]) == []
    assert len(told(lambda: [loop.epoch() for _ in range(3)])) == 1


@pytest.mark.parametrize("soft", [False, True])
def test_a_few_samples_that_are_not_finite_are_told_once(soft):
    model = make_model()
    assigner = DynamicAssigner(model)
    features, labels = batch()
    target = nn.functional.one_hot(labels, 4).float() if soft else labels

    def epoch(num_lost: int):
        output = model(features).detach()
        output[:num_lost] = float("nan")
        assigner.update(output, target)
        assigner.step()

    assert told(lambda: epoch(0)) == []
    (message,) = told(lambda: epoch(3))
    assert re.search("3 of 32 samples.*NaN or infin", message)
    assert told(lambda: epoch(5)) == []


def test_forward_passes_without_gradients_are_none():
    model = make_model()
    assigner = DynamicAssigner(model)
    for seed in range(9):
        assigner.update(model(batch(seed=seed)[0]), batch()[1])
    assert not told(assigner.step)


@given(num_classes=st.integers(2, 200), seed=SEEDS)
def test_steps_in_the_middle_of_an_epoch_tell_of_no_unseen_labels(num_classes, seed):
    head = HypersphericalHead(8, num_classes, dim=8, bank="random", projection="none")
    assigner, generator = DynamicAssigner(head), torch.Generator().manual_seed(seed)
    for _ in range(3):
        assigner.update(head(batch(64)[0]), torch.randint(num_classes, (64,), generator=generator))
        assert not told(assigner.step)


def sorted_folder(num_labels: int, each: int, num_classes: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of few labels, all labels in turn."""
    return [
        (batch(each * num_labels, seed=first)[0], (first + torch.arange(each * num_labels) % num_labels) % num_classes)
        for first in range(0, num_classes, num_labels)
    ]


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize(("projection", "number"), [("linear+bn", 1), ("linear", 0)])
def test_batches_of_one_or_two_labels(num_labels, projection, number):
    model = make_model(num_classes=8, dim=4, projection=projection)
    assigner = DynamicAssigner(model)
    loop = Loop(model, BalancedLoss(assigner), assigner)
    messages = told(lambda: [loop.epoch(sorted_folder(num_labels, 16)) for _ in range(3)])
    assert len(messages) == number
    assert all("Shuffle" in message for message in messages)


def test_batches_of_eight_labels_or_of_very_uneven_data_are_none():
    model = make_model(num_classes=8, dim=4)
    assigner = DynamicAssigner(model)
    loop = Loop(model, BalancedLoss(assigner), assigner)
    assert not told(lambda: loop.epoch(sorted_folder(8, 4)))
    uneven = torch.zeros(32, dtype=torch.int64)
    assert not told(lambda: loop.epoch([(batch()[0], uneven)] * 9 + [(batch()[0], batch()[1] * 2)]))


@given(batch_size=st.integers(1, 16), seed=SEEDS)
def test_random_batches_of_any_size_are_none(batch_size, seed):
    model = make_model(num_classes=8, dim=4)
    assigner, generator = DynamicAssigner(model), torch.Generator().manual_seed(seed)
    for _ in range(40):
        labels = torch.randint(8, (batch_size,), generator=generator)
        assigner.update(model(torch.randn(batch_size, 8, generator=generator)), labels)
    assert not told(assigner.step)


# A head that is gone


def test_a_head_replaced_by_hand():
    loop = model_in_eval_mode()
    loop.model.train()
    loop.epoch()
    before = loop.assigner.class_means.clone()
    loop.model[1] = nn.Linear(8, 4)
    with pytest.raises(HeadNotFoundError, match="another layer was put in its place"):
        loop.assigner.step()
    assert torch.equal(loop.assigner.class_means, before)


COPIES = [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("part", ["assigner", "criterion"])
def test_a_copy_of_an_assigner_without_its_model_says_so(copied, part):
    loop = model_in_eval_mode()
    loop.model.train()
    loop.epoch()
    other = copied(loop.assigner if part == "assigner" else loop.criterion)
    other = other if part == "assigner" else other.assigner
    before = loop.model[1].assignment.clone()
    with pytest.raises(HeadNotFoundError, match=r"without its model.*Copy both at once"):
        other.step()
    assert torch.equal(loop.model[1].assignment, before)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("order", [0, 1])
def test_a_model_and_its_criterion_copied_together_stay_bound(copied, order):
    model = make_model()
    both = (model, BalancedLoss(DynamicAssigner(model, momentum=None)))
    pair = copied(both if order == 0 else both[::-1])
    model, criterion = pair if order == 0 else pair[::-1]
    assert criterion.assigner.head is model[1]
    images, _ = batch()
    embeddings = model[1].embed(images)
    criterion(model(images), (embeddings @ model[1].bank.prototypes.flip(0).T).argmax(dim=1))
    assert not told(criterion.assigner.step)
    assert criterion.assigner.history[-1].changed > 0
    assert not torch.equal(model[1].assignment, torch.arange(model[1].num_classes))


def test_a_head_whose_model_is_gone_goes_on_by_itself():
    loop = model_in_eval_mode()
    loop.model.train()
    head = loop.model[1]
    assigner = DynamicAssigner(loop.model)
    assigner.update(head(batch()[0]), batch()[1])
    del loop
    gc.collect()
    assert not told(assigner.step)


class Saved(nn.Module):
    """What adapters make of a module to be trained and saved: the original, and a copy that is called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.copy = original, copy.deepcopy(original)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.copy(features)


def test_a_step_moves_the_labels_of_a_head_that_an_adapter_has_copied():
    model = make_model()
    assigner = DynamicAssigner(model, momentum=None)
    criterion = BalancedLoss(assigner)
    model[1] = Saved(model[1])
    images, _ = batch()
    used = model[1].copy
    criterion(model(images), (used.embed(images) @ used.bank.prototypes.flip(0).T).argmax(dim=1))
    assert assigner.step().changed > 0
    assert torch.equal(used.assignment, model[1].original.assignment)
    assert not torch.equal(used.assignment, torch.arange(used.num_classes))


# Heads, banks and options


@pytest.mark.parametrize("dim", [4, 8])
def test_embeddings_as_wide_as_logits_are_told_when_the_head_is_made(dim):
    assert len(told(lambda: HypersphericalHead(8, 4, dim=dim, training_output="embedding"))) == 1
    assert not told(lambda: HypersphericalHead(8, dim + 1, dim=dim, training_output="embedding"))


@given(seed=SEEDS, num_prototypes=st.integers(3, 40), dim=st.integers(2, 40), factor=st.floats(0.1, 10.0))
def test_equal_prototypes_are_told_with_their_rows(seed, num_prototypes, dim, factor):
    rows = torch.randn(num_prototypes, dim, generator=torch.Generator().manual_seed(seed))
    if dim > 3:  # in fewer dimensions random rows may come as close by chance
        assert not told(lambda: PrototypeBank.from_tensor(rows))
    first, second = seed % num_prototypes, (seed + 1 + seed % (num_prototypes - 1)) % num_prototypes
    rows[second] = factor * rows[first]
    pair = (min(first, second), max(first, second))
    [message] = told(lambda: PrototypeBank.from_tensor(rows))
    assert str(pair) in message


def test_momentum_set_afterwards_is_checked_as_at_the_start():
    assigner, plain = DynamicAssigner(make_model()), DynamicAssigner(make_model(), momentum=None)
    assigner.momentum = 0.5
    for each, wrong in ((assigner, 1.5), (assigner, None), (plain, 0.9)):
        before = each.momentum
        with pytest.raises(ArgumentError, match="momentum"):
            each.momentum = wrong
        assert each.momentum == before
    plain.momentum = None


# Documentation


def test_every_documented_loop_makes_its_optimizer_after_the_conversion():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for block in page.read_text().split("```python")[1:]:
            code = block.partition("```")[0]
            if "convert_model(" in code and "optimizer.step()" in code:
                assert -1 < code.index("convert_model(") < code.find("torch.optim."), page.name
