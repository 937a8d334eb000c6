"""What every loss and the assigner ask of the targets of a batch."""

from functools import partial
from itertools import product

import pytest
import torch
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HyperprotoWarning,
    HypersphericalHead,
    LabelError,
    LongTailLoss,
    PrototypeCrossEntropyLoss,
    ShapeError,
    functional,
)

NUM_CLASSES = 5


@pytest.fixture(params=["balanced", "long tail", "assigner"])
def consumer(request):
    head = HypersphericalHead(4, NUM_CLASSES, dim=4, projection="none", training_output="embedding")
    if request.param == "assigner":
        return DynamicAssigner(head).update
    return {"balanced": BalancedLoss, "long tail": LongTailLoss}[request.param](head)


def embeddings(num: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(num, 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_soft_targets_must_be_floating(consumer, dtype):
    with pytest.raises(LabelError, match=f"floating point, got {dtype}"):
        consumer(embeddings(3), torch.eye(3, NUM_CLASSES).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_labels_must_be_int64(consumer, dtype):
    with pytest.raises(LabelError, match=rf"int64, got {dtype}.*target\.long\(\)"):
        consumer(embeddings(3), torch.tensor([0, 1, 1]).to(dtype))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("num_targets", [2, 4])
def test_as_many_targets_as_outputs(consumer, soft, num_targets):
    target = torch.full((num_targets, NUM_CLASSES), 0.2) if soft else torch.zeros(num_targets, dtype=torch.int64)
    with pytest.raises(ShapeError, match=f"each of the 3 samples of the output, got {num_targets}"):
        consumer(embeddings(3), target)


def test_labels_may_be_a_view_with_gaps(consumer):
    labels = torch.tensor([0, 9, 4, 9, 4, 9])
    consumer(embeddings(3), labels[::2])  # torch warns of searches in such views, and warnings are errors here


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), -0.1])
def test_soft_targets_weigh_by_finite_numbers_from_zero(consumer, wrong):
    target = torch.full((3, NUM_CLASSES), 0.2)
    target[1, 2] = wrong
    with pytest.raises(LabelError, match="finite and not negative"):
        consumer(embeddings(3), target)


# Targets as people write them


LOSSES = {
    "balanced": BalancedLoss,
    "long tail": LongTailLoss,
    "long tail, global": partial(LongTailLoss, class_counts=[8, 4, 2, 1, 1]),
    "cross-entropy": PrototypeCrossEntropyLoss,
    "cross-entropy, smoothed": partial(PrototypeCrossEntropyLoss, label_smoothing=0.1),
    "cross-entropy, weighed": partial(PrototypeCrossEntropyLoss, weight=[1.0, 2.0, 0.5, 0.0, 3.0]),
}
every_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
every_output = pytest.mark.parametrize("training_output", ["logits", "embedding"])


def make_head(training_output: str = "embedding") -> HypersphericalHead:
    return HypersphericalHead(4, NUM_CLASSES, dim=4, projection="none", training_output=training_output)


@pytest.mark.parametrize("write", [torch.Tensor.tolist, torch.Tensor.numpy, lambda labels: labels.int().numpy()])
@every_loss
def test_labels_may_be_lists_and_arrays(make_loss, write):
    labels, output = torch.tensor([0, 4, 2]), embeddings(3)
    loss = make_loss(make_head())
    assert torch.equal(loss(output, write(labels)), loss(output, labels))
    assigner, other = DynamicAssigner(make_head()), DynamicAssigner(make_head())
    assigner.update(output, write(labels))
    other.update(output, labels)
    assert torch.equal(assigner.class_means, other.class_means)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, "target to be a tensor.*got None"),
        ("cat", "target to be a tensor"),
        (["cat", "dog", "cow"], "target to be a tensor"),
        ([0, None, 1], "target to be a tensor"),
        ([[0], [0, 1], [1]], "target to be a tensor"),
        (torch.zeros(3, 1, dtype=torch.int64), r"target\.squeeze\(1\)"),
        (torch.eye(3, NUM_CLASSES) > 0, r"target\.float\(\)"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "device of the output, cpu, got one on meta"),
        (torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]] * 3), "multi-label"),
        (torch.eye(3, NUM_CLASSES) - 0.5, "not negative"),
        (torch.eye(3, NUM_CLASSES) * float("nan"), "finite"),
        (torch.tensor([0, -1, 2]), "ignore_index is -100"),
        (torch.zeros(3, NUM_CLASSES, dtype=torch.complex64), "floating point"),
    ],
)
def test_wrong_targets_are_refused_and_feed_nothing(target, words):
    assigner = DynamicAssigner(make_head())
    for call in (*(make(assigner) for make in LOSSES.values()), assigner.update):
        with pytest.raises(LabelError, match=words):
            call(embeddings(3), target)
    assert not assigner.class_counts.any()


@every_loss
def test_targets_in_per_cent_are_told_once_for_each_criterion(make_loss):
    target = 100.0 * torch.eye(3, NUM_CLASSES)
    for _ in range(2):
        loss = make_loss(make_head())
        with pytest.warns(HyperprotoWarning, match="adds up to 100") as caught:
            loss(embeddings(3), target)
        assert len(caught) == 1
        loss(embeddings(3), target)  # a warning would be an error


# Ignored samples


@given(
    data=st.data(),
    labels=st.lists(st.integers(0, NUM_CLASSES - 1), max_size=8),
    name=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(["mean", "sum"]),
    training_output=st.sampled_from(["logits", "embedding"]),
    momentum=st.sampled_from([0.9, 0.0, None]),
    ignore_index=st.sampled_from([-100, 0, 3, 255]),
)
def test_ignored_samples_are_as_if_they_were_not_there(
    data, labels, name, reduction, training_output, momentum, ignore_index
):
    with_ignored, without = (DynamicAssigner(make_head(training_output), momentum=momentum) for _ in range(2))
    labels = torch.tensor([label for label in labels if label != ignore_index], dtype=torch.int64)
    rows = with_ignored.head(embeddings(len(labels) + 3)).detach()
    for assigner in (with_ignored, without):  # means, of which none may be lost
        assigner.update(assigner.head(embeddings(NUM_CLASSES)), torch.arange(NUM_CLASSES))
        assigner.class_means.copy_(torch.nn.functional.normalize(torch.ones(NUM_CLASSES, 4)))
        assigner.step()
    without.load_state_dict(with_ignored.state_dict())
    without.head.assign_(with_ignored.head.assignment)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))), dtype=torch.int64)
    ignored = torch.cat([labels, torch.full((3,), ignore_index)])[order]
    shuffled, kept = rows[order].requires_grad_(), rows[order][ignored != ignore_index].requires_grad_()
    options = {"reduction": reduction, "ignore_index": ignore_index}
    value = LOSSES[name](with_ignored, **options)(shuffled, ignored)
    expected = LOSSES[name](without, **options)(kept, ignored[ignored != ignore_index])
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    assert not shuffled.grad[ignored == ignore_index].any()
    torch.testing.assert_close(shuffled.grad[ignored != ignore_index], kept.grad, atol=1e-5, rtol=1e-4)
    for key, state in without.state_dict().items():
        torch.testing.assert_close(with_ignored.state_dict()[key], state, msg=key)


@every_output
@every_loss
def test_a_batch_of_ignored_samples_is_zero_with_a_gradient(make_loss, training_output):
    assigner = DynamicAssigner(make_head(training_output))
    output = assigner.head(embeddings(3)).detach().requires_grad_()
    loss = make_loss(assigner)(output, torch.full((3,), -100))
    loss.backward()
    assert loss == 0.0
    assert output.grad is not None
    assert not output.grad.any()
    assert not assigner.class_means.any()
    assert not assigner.class_counts.any()


@pytest.mark.parametrize("make_loss", [BalancedLoss, LongTailLoss], ids=["balanced", "long tail"])
def test_nan_of_an_ignored_sample_stays_where_it_is(make_loss):
    assigner = DynamicAssigner(make_head())
    output = embeddings(3)
    output[1] = float("nan")
    output.requires_grad_()
    loss = make_loss(assigner)(output, torch.tensor([0, -100, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(output.grad).all()
    assert assigner.step().unseen == (2, 3, 4)


# Class weights


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_class_weights_are_those_of_torch(reduction, soft, label_smoothing):
    weight, options = (
        torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]),
        {"reduction": reduction, "label_smoothing": label_smoothing},
    )
    cosines = 2 * torch.rand(7, NUM_CLASSES) - 1
    labels = torch.tensor([0, 4, 1, 2, 1, 0, 4]) if soft else torch.tensor([0, 4, -100, 2, 3, 0, 4])
    target = torch.nn.functional.one_hot(labels, NUM_CLASSES).float() if soft else labels
    head = make_head("logits")
    expected = torch.nn.CrossEntropyLoss(weight, **options)(16.0 * cosines, target)
    pure = functional.prototype_cross_entropy(cosines, target, scale=16.0, weight=weight, **options)
    torch.testing.assert_close(pure, expected)
    loss = PrototypeCrossEntropyLoss(head, scale=16.0, weight=weight.numpy(), **options)
    torch.testing.assert_close(loss(cosines * head.logit_scale, target), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [[1.0, -1.0, 1, 1, 1], [0] * 5, [float("nan")] * 5, [1, 2], "12345", {0: 1.0}])
def test_wrong_class_weights_are_refused(weight):
    with pytest.raises(ArgumentError, match="weight"):
        PrototypeCrossEntropyLoss(make_head(), weight=weight)


# torch.func


@every_output
@every_loss
def test_gradients_of_each_sample_by_torch_func(make_loss, training_output):
    head = HypersphericalHead(6, NUM_CLASSES, dim=4, projection="linear", training_output=training_output)
    features, labels = torch.randn(3, 6), torch.tensor([0, 4, 2])
    loss, parameters = make_loss(head, reduction="sum"), dict(head.named_parameters())

    def of_one(parameters, feature, label):
        return loss(torch.func.functional_call(head, parameters, (feature[None],)), label[None])

    [found] = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))(parameters, features, labels).values()
    for i in range(3):
        [weight] = head.parameters()
        [expected] = torch.autograd.grad(loss(head(features[i : i + 1]), labels[i : i + 1]), weight)
        torch.testing.assert_close(found[i], expected)


def test_an_assigner_is_not_fed_within_torch_func():
    head = HypersphericalHead(6, NUM_CLASSES, dim=4, projection="linear")
    assigner, parameters = DynamicAssigner(head), dict(head.named_parameters())
    loss, features, labels = BalancedLoss(assigner), torch.randn(3, 6), torch.tensor([0, 4, 2])

    def total(parameters):
        return loss(torch.func.functional_call(head, parameters, (features,)), labels)

    with pytest.raises(ArgumentError, match=r"feed the assigner outside.*criterion from the model"):
        torch.func.grad(total)(parameters)
    assert not assigner.class_counts.any()


# One graph


@pytest.mark.parametrize(
    ("name", "training_output"),
    in_front(product(LOSSES, ["logits", "embedding"]), ("balanced", "embedding"), ("cross-entropy, weighed", "logits")),
)
def test_a_step_with_ignored_samples_is_one_graph(name, training_output):
    torch.compiler.reset()
    make_loss = LOSSES[name]
    assigner, other = (DynamicAssigner(make_head(training_output)) for _ in range(2))
    loss = torch.compile(make_loss(assigner), fullgraph=True, backend="eager")
    output, labels = assigner.head(embeddings(4)).detach().requires_grad_(), torch.tensor([0, -100, 4, 2])
    torch.testing.assert_close(loss(output, labels), make_loss(other)(output, labels))
    torch.testing.assert_close(assigner.class_means, other.class_means)


def test_the_pure_forms_are_one_graph():
    torch.compiler.reset()
    cosines, labels = 2 * torch.rand(4, NUM_CLASSES) - 1, torch.tensor([0, -100, 4, 2])
    for function in (functional.balanced_loss, functional.long_tail_loss, functional.prototype_cross_entropy):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(cosines, labels), function(cosines, labels))
