"""The losses: values and gradients against NumPy, linearity in the targets, and one contract for all of them."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st
from losses import COUNTS, LOSSES
from torch import nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LabelError,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    ShapeError,
    functional,
)
from hyperproto.losses import PrototypeLoss
from hyperproto.readout import Readout
from hyperproto.targets import Target, to_look_up
from hyperproto.testing import SEEDS, check_loss, heads

every_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES.keys())


def test_the_registry_holds_every_loss():
    assert {type(make(make_head())) for make in LOSSES.values()} == set(PrototypeLoss.__subclasses__())


def make_head(training_output: str = "logits") -> HypersphericalHead:
    head = HypersphericalHead(4, 6, bank=PrototypeBank(8, 4), projection="none", training_output=training_output)
    head.assign_(torch.tensor([7, 2, 0, 5, 1, 4]))
    return head


def batch(num: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, generator=generator), torch.randint(6, (num,), generator=generator)


def soft_targets(num: int, num_classes: int, seed: int) -> torch.Tensor:
    return torch.rand(num, num_classes, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


# Values and gradients against NumPy


def oracle(name: str, x: np.ndarray, labels: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Per-sample losses of features x (B, D), straight from the formulas, a loop per sample."""
    counts = COUNTS.numpy().astype(float)
    losses = []
    for features, label in zip(x, labels, strict=True):
        cosines = w @ (features / np.linalg.norm(features))
        if name == "balanced":
            losses.append((1 - cosines[label]) ** 2)
        elif name.startswith("long tail"):
            if name.endswith("global"):
                squared_length = counts.sum() / len(counts) / counts[label]
            else:
                squared_length = len(labels) / len(set(labels.tolist())) / (labels == label).sum()
            losses.append(0.5 * squared_length * (1 - cosines[label]) ** 2)
        else:
            log_probability = 16 * cosines - np.log(np.exp(16 * cosines).sum())
            smoothing = 0.1 if name.endswith("smoothed") else 0.0
            losses.append(-(1 - smoothing) * log_probability[label] - smoothing * log_probability.mean())
    return np.array(losses)


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_formulas(name, reduction, training_output):
    head = make_head(training_output)
    features, labels = batch()
    features.requires_grad_()
    loss = LOSSES[name](head, reduction=reduction)(head(features), labels)
    x, w = features.detach().double().numpy(), head.class_prototypes.double().numpy()
    reduce = {"none": lambda v: v, "sum": np.sum, "mean": np.mean}[reduction]
    np.testing.assert_allclose(loss.detach().numpy(), reduce(oracle(name, x, labels.numpy(), w)), rtol=2e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    expected = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        change = oracle(name, x + step, labels.numpy(), w) - oracle(name, x - step, labels.numpy(), w)
        expected[index] = (change.mean() if reduction == "mean" else change.sum()) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-3, atol=1e-4)


@every_loss
def test_modules_agree_with_their_pure_forms(make_loss):
    head = make_head()
    features, labels = batch()
    loss = make_loss(head)
    pure = {
        BalancedLoss: functional.balanced_loss,
        LongTailLoss: lambda cosines, target: functional.long_tail_loss(
            cosines, target, class_counts=None if loss.squared_lengths is None else COUNTS
        ),
        PrototypeCrossEntropyLoss: lambda cosines, target: functional.prototype_cross_entropy(
            cosines, target, scale=16.0, label_smoothing=loss.label_smoothing
        ),
    }[type(loss)]
    for target in (labels, soft_targets(9, 6, 1)):
        expected = pure(head(features) / head.logit_scale, target)
        torch.testing.assert_close(loss(head(features), target), expected)


# Soft targets


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "long tail, per batch"])
@given(seed=SEEDS, share=st.floats(0, 1))
def test_losses_are_linear_in_soft_targets(name, seed, share):
    head = make_head()
    loss = LOSSES[name](head, reduction="none")
    logits = head(batch(seed=seed)[0])
    first, second = soft_targets(9, 6, seed), soft_targets(9, 6, seed + 1)
    mixed = loss(logits, share * first + (1 - share) * second)
    expected = share * loss(logits, first) + (1 - share) * loss(logits, second)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)


@every_loss
def test_soft_and_hard_targets_agree(make_loss):
    head = make_head()
    features, labels = batch()
    loss = make_loss(head, reduction="none")
    one_hot = nn.functional.one_hot(labels, 6).float()
    torch.testing.assert_close(loss(head(features), one_hot), loss(head(features), labels))


def test_mixup_within_a_batch_mixes_the_per_batch_long_tail_losses():
    head = make_head()
    features, labels = batch()
    partner = torch.randperm(9)
    one_hot = nn.functional.one_hot(labels, 6).float()
    mixed = 0.3 * one_hot + 0.7 * one_hot[partner]
    loss = LongTailLoss(head, reduction="none")
    logits = head(features)
    # Soft counts equal the hard ones, so that the lengths agree and the loss is linear here too.
    expected = 0.3 * loss(logits, one_hot) + 0.7 * loss(logits, one_hot[partner])
    torch.testing.assert_close(loss(logits, mixed), expected)


@every_loss
def test_soft_targets_with_embeddings_agree_with_logits(make_loss):
    head, twin = make_head(), make_head("embedding")
    features, target = batch()[0], soft_targets(9, 6, 2)
    torch.testing.assert_close(make_loss(twin)(twin(features), target), make_loss(head)(head(features), target))


@given(head=heads(), seed=SEEDS)
def test_relabelling_classes_changes_no_loss(head, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(head.num_classes, generator=generator)
    features = torch.randn(8, head.dim, generator=generator)
    labels = torch.randint(head.num_classes, (8,), generator=generator)
    relabelled = copy.deepcopy(head)
    relabelled.assign_(head.assignment[order.argsort()].clone())
    for loss in (BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss):
        before, after = loss(head)(head(features), labels), loss(relabelled)(relabelled(features), order[labels])
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


# The contract of all losses: test_testing.py holds each of them to it


class Careless(BalancedLoss):
    def _loss(self, readout: Readout, target: Target) -> torch.Tensor:
        loss = super()._loss(readout, target)
        target.values.zero_()
        return loss


class Detached(BalancedLoss):
    def _loss(self, readout: Readout, target: Target) -> torch.Tensor:
        return super()._loss(readout, target) if len(target.values) else torch.zeros(())


def test_the_contract_asks_for_a_gradient_of_an_empty_batch():
    with pytest.raises(AssertionError, match="empty batch must have a gradient"):
        check_loss(Detached(make_head()))


def test_the_contract_forbids_changing_the_target():
    with pytest.raises(AssertionError, match="changed the labels"):
        check_loss(Careless(make_head()))


@pytest.mark.parametrize(
    ("name", "backend", "training_output"),
    in_front(
        [
            *product(LOSSES, ["eager"], ["logits", "embedding"]),
            *product(["balanced", "cross-entropy"], ["inductor"], ["logits", "embedding"]),
        ],
        *((name, "eager", "logits") for name in LOSSES),
        ("balanced", "eager", "embedding"),
    ),
)
def test_a_compiled_loss_takes_no_label_from_the_end(name, backend, training_output):
    """Compiled code leaves the check of the labels' range to what looks them up."""
    torch.compiler.reset()
    head = make_head(training_output)
    features, labels = batch()
    output = head(features).detach()
    loss = torch.compile(LOSSES[name](head), backend=backend)
    assert torch.isfinite(loss(output, labels))
    with pytest.raises((RuntimeError, IndexError)):
        loss(output, labels - labels.max() - 1)
    ignoring = torch.where(labels == labels[0], -100, labels)
    torch.testing.assert_close(loss(output, ignoring), LOSSES[name](head)(output, ignoring))


def test_compiled_code_looks_up_no_negative_label():
    # For the inductor of torch 2.11 and before, whatever the backend.
    compiled = torch.compile(to_look_up, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([-1, 2, 0, -100]), 3).tolist() == [3, 2, 0, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_lengths_stay_float32_in_a_model_that_is_cast(dtype):
    criterion = LongTailLoss(make_head(), class_counts=torch.tensor([1_000_000, 37, 1, 9, 9, 9]))
    before = criterion.squared_lengths.clone()
    cast = nn.ModuleList([criterion]).to(dtype)[0]
    assert torch.equal(cast.squared_lengths, before)


@every_loss
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("num", [0, 1, 5])
def test_small_batches(make_loss, training_output, num):
    head = make_head(training_output)
    features, labels = batch(num)
    features.requires_grad_()
    loss = make_loss(DynamicAssigner(head))(head(features), labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


@every_loss
def test_a_batch_with_one_class(make_loss):
    head = make_head()
    loss = make_loss(head)(head(batch()[0]), torch.full((9,), 3))
    assert torch.isfinite(loss)


@every_loss
def test_half_precision_outputs_give_a_float32_loss(make_loss):
    head = make_head()
    features, labels = batch()
    logits = head(features)
    exact = make_loss(head)(logits, labels)
    for dtype in (torch.bfloat16, torch.float16):
        loss = make_loss(head)(logits.to(dtype), labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make_loss(head)(logits, labels), exact)


@pytest.mark.parametrize(
    ("name", "training_output"),
    in_front(product(LOSSES, ["logits", "embedding"]), ("balanced", "embedding"), ("cross-entropy", "logits")),
)
def test_compiles_as_one_graph_with_its_assigner(name, training_output):
    torch.compiler.reset()
    eager, compiled = (LOSSES[name](DynamicAssigner(make_head(training_output))) for _ in range(2))
    run = torch.compile(lambda features, target: compiled(compiled.head(features), target), fullgraph=True,
                        backend="aot_eager")  # fmt: skip
    for seed in range(2):
        features, labels = batch(seed=seed)
        torch.testing.assert_close(run(features, labels), eager(eager.head(features), labels))
    torch.testing.assert_close(compiled.assigner.class_means, eager.assigner.class_means)


@every_loss
def test_copies_keep_the_loss(make_loss):
    head = make_head()
    features, labels = batch()
    loss = make_loss(DynamicAssigner(head))
    expected = loss(head(features), labels)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(head(features), labels), expected)


# Feeding the assigner


def test_the_assigner_is_fed_in_training_only():
    head = make_head()
    assigner = DynamicAssigner(head)
    loss = BalancedLoss(assigner)
    features, labels = batch()
    with torch.no_grad():
        loss(head(features), labels)
    head.eval()
    loss(head(features), labels)
    head.train()
    loss.eval()(head(features), labels)
    assert not assigner.class_counts.any()
    loss.train()(head(features), labels)
    assert assigner.class_counts.sum() == 9


def test_the_loss_follows_a_change_of_assignment():
    head = make_head()
    features, labels = batch()
    loss = BalancedLoss(head)
    before = loss(head(features), labels)
    head.assign_(torch.tensor([0, 1, 2, 3, 4, 5]))
    expected = oracle("balanced", features.double().numpy(), labels.numpy(), head.class_prototypes.double().numpy())
    assert float(loss(head(features), labels)) == pytest.approx(expected.mean(), abs=1e-5)
    assert not torch.isclose(loss(head(features), labels), before)


# What torch 2.11 says whenever it profiles.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_embedding_losses_need_nothing_as_wide_as_the_classes():
    head = HypersphericalHead(
        8, 5000, bank=PrototypeBank(5000, 8, method="random"), projection="none", training_output="embedding"
    )
    criterion = BalancedLoss(DynamicAssigner(head))
    features, labels = torch.randn(4, 8, requires_grad=True), torch.randint(5000, (4,))
    with torch.profiler.profile(profile_memory=True) as profile:
        criterion(head(features), labels).backward()
    largest = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert largest < 5000 * 4  # bytes: less than one float per class


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"weight": [1.0, 2.0]}, "^weight must be 6 numbers"),
    ],
)
def test_wrong_options_of_the_cross_entropy_are_refused(kwargs, words):
    with pytest.raises(ArgumentError, match=words):
        PrototypeCrossEntropyLoss(make_head(), **kwargs)


@every_loss
def test_unknown_reductions_are_refused(make_loss):
    with pytest.raises(ArgumentError, match="'mean', 'sum', 'none'"):
        make_loss(make_head(), reduction="average")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (torch.tensor([1, 2, 3]), r"\(6,\)"),
        (torch.tensor([1, 2, 0, 4, 5, 6]), r"labels \[2\]"),
        (torch.tensor([1, 2, 3, 4, 5, float("nan")]), r"labels \[5\]"),
    ],
)
def test_wrong_class_counts_are_refused(counts, words):
    with pytest.raises(ArgumentError, match=words):
        LongTailLoss(make_head(), class_counts=counts)
    with pytest.raises(ArgumentError, match=words):
        functional.long_tail_loss(torch.zeros(2, 6), torch.tensor([0, 1]), class_counts=counts)


@pytest.mark.parametrize("loss", [functional.balanced_loss, functional.long_tail_loss,
                                  functional.prototype_cross_entropy])  # fmt: skip
def test_pure_losses_check_their_input(loss):
    with pytest.raises(ShapeError, match=r"\(B, C\)"):
        loss(torch.zeros(3), torch.tensor([0, 1, 2]))
    with pytest.raises(LabelError, match="from 0 to 7"):
        loss(torch.zeros(2, 6), torch.tensor([0, 7]))
    with pytest.raises(ArgumentError, match="'none'"):
        loss(torch.zeros(2, 6), torch.tensor([0, 1]), reduction="max")


def test_the_whole_target_may_be_smoothed():
    head, (features, labels) = make_head(), batch()
    loss = PrototypeCrossEntropyLoss(head, label_smoothing=1.0)(head(features), labels)
    torch.testing.assert_close(loss, -head(features).log_softmax(dim=1).mean())


@pytest.mark.parametrize("bank", ["auto", "simplex", "orthoplex", "separated", "random"])
def test_by_default_it_is_the_cross_entropy_of_the_logits(bank):
    head = HypersphericalHead(4, 6, dim={"simplex": 5, "orthoplex": 3}.get(bank, 2), bank=bank)
    features, labels = batch()
    logits = head(features)
    loss = PrototypeCrossEntropyLoss(head)(logits, labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))


def test_the_default_scale_is_that_of_the_bank_whatever_the_logits_have():
    head, expected = make_head(), float(make_head().logit_scale)
    head.logit_scale.fill_(3.0)
    assert PrototypeCrossEntropyLoss(head).scale == pytest.approx(expected)
    given = HypersphericalHead(4, 6, bank=PrototypeBank(8, 4), logit_scale=40.0)
    assert PrototypeCrossEntropyLoss(given).scale == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [1, 2, 100])
def test_the_pure_loss_takes_prototypes_that_favour_no_direction(num_classes):
    cosines, labels = 2 * torch.rand(5, num_classes) - 1, torch.arange(5) % num_classes
    scale = PrototypeCrossEntropyLoss(HypersphericalHead(8, max(num_classes, 2), dim=99, bank="simplex")).scale
    expected = functional.prototype_cross_entropy(cosines, labels, scale=scale)
    torch.testing.assert_close(functional.prototype_cross_entropy(cosines, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_criterion_adds_nothing_to_a_checkpoint(name):
    assert list(LOSSES[name](make_head()).state_dict()) == []
    assigner = DynamicAssigner(make_head())
    expected = [f"assigner.{key}" for key in assigner.state_dict()]
    assert list(LOSSES[name](assigner).state_dict()) == expected


@pytest.mark.filterwarnings("ignore:training_output:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("training", [False, True])
def test_where_embeddings_are_as_wide_as_logits_the_mode_tells_them_apart(training):
    head = HypersphericalHead(8, 8, dim=8, projection="none", training_output="embedding").train(training)
    features, labels = torch.randn(5, 8), torch.tensor([0, 3, 3, 7, 1])
    own = (nn.functional.normalize(features) * head.class_prototypes[labels]).sum(dim=1)
    torch.testing.assert_close(BalancedLoss(head)(head(features), labels), (1 - own).square().mean())
    one_hot = nn.functional.one_hot(labels, 8).float()
    torch.testing.assert_close(BalancedLoss(head)(head(features), one_hot), (1 - own).square().mean())


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 100.0])
def test_any_positive_scale_will_do(scale):
    head, (features, labels) = make_head(), batch()
    loss = PrototypeCrossEntropyLoss(head, scale=scale)(head(features), labels)
    log_probabilities = (scale * head(features) / head.logit_scale).log_softmax(dim=1)
    torch.testing.assert_close(loss, -log_probabilities.gather(1, labels[:, None]).mean())


def test_a_criterion_takes_its_assigner_along():
    criterion = LongTailLoss(DynamicAssigner(make_head()), class_counts=COUNTS).to("meta")
    assert all(buffer.is_meta for buffer in criterion.buffers())
    assert len(list(criterion.buffers())) > 1
