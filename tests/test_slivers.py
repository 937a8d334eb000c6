"""Slivers: the small weights that smoothing and mixup give to labels which no sample has.

A label's squared length is gamma / max(n, 1), where n is its summed weight, and gamma = B / (number of labels with at
least half a sample). Below half a sample a label is not seen and starts no mean.
"""

import numpy as np
import pytest
import torch
from clouds import batched, clouds, make_head, normal
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize, one_hot

from hyperproto import BalancedLoss, DynamicAssigner, HypersphericalHead, LongTailLoss, PrototypeBank, fit_head
from hyperproto.functional import batch_squared_lengths, long_tail_loss
from hyperproto.losses import PrototypeLoss
from hyperproto.testing import SEEDS

# Small heads of as many dimensions as labels: the library tells that embeddings save nothing there.
pytestmark = pytest.mark.filterwarnings("ignore:training_output=.embedding. saves nothing:hyperproto.HyperprotoWarning")


def smoothed(labels: torch.Tensor, num_classes: int, share: float) -> torch.Tensor:
    return (1.0 - share) * one_hot(labels, num_classes).float() + share / num_classes


def embedding_head(num_classes: int, dim: int, **options: object) -> HypersphericalHead:
    bank = PrototypeBank(num_classes, dim, method="random")
    return HypersphericalHead(dim, num_classes, bank=bank, projection="none", training_output="embedding", **options)


def gradient(loss: PrototypeLoss, embeddings: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    embeddings = embeddings.clone().requires_grad_()
    loss(embeddings, target).backward()
    return embeddings.grad


# Lengths


@given(
    seed=SEEDS,
    num=st.integers(1, 12),
    num_classes=st.integers(2, 9),
    share=st.sampled_from([0.0, 1e-12, 1e-3, 0.1, 0.5]),
)
def test_lengths_are_those_of_the_rule(seed, num, num_classes, share):
    generator = torch.Generator().manual_seed(seed)
    target = smoothed(torch.randint(num_classes, (num,), generator=generator), num_classes, share)
    partner, mixed = torch.randperm(num, generator=generator), torch.rand(num, 1, generator=generator)
    target = mixed * target + (1.0 - mixed) * target[partner]
    counts = target.double().numpy().sum(axis=0)
    if np.abs(counts - 0.5).min() < 1e-5 or counts.max() < 0.5:
        return  # by rounding on either side, or nothing is seen
    expected = num / (counts >= 0.5).sum() / np.maximum(counts, 1.0)
    given_weight = counts > 0
    lengths = batch_squared_lengths(target).flatten().numpy()
    np.testing.assert_allclose(lengths[given_weight], expected[given_weight], rtol=1e-5)


def test_a_batch_that_no_label_has_half_a_sample_of_has_a_finite_loss():
    target = torch.full((1, 10), 0.1)
    losses = long_tail_loss(torch.zeros(1, 10, requires_grad=True), target, reduction="none")
    assert torch.isfinite(losses).all()
    assert torch.isfinite(batch_squared_lengths(target)).all()


# Continuity


@pytest.mark.parametrize("share", [1e-12, 1e-7])
@pytest.mark.parametrize(("num_classes", "num"), [(1000, 16), (100, 128), (5, 9)])
@pytest.mark.parametrize("make_loss", [LongTailLoss, BalancedLoss])
def test_the_least_smoothing_gives_the_gradient_of_hard_labels(make_loss, num_classes, num, share):
    head = embedding_head(num_classes, 16)
    embeddings, labels = normalize(normal(num, 16)), torch.randint(num_classes, (num,))
    expected = gradient(make_loss(head), embeddings, labels)
    found = gradient(make_loss(head), embeddings, smoothed(labels, num_classes, share))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("num_classes", "num"), [(1000, 16), (100, 128)])
def test_smoothing_takes_no_more_of_the_long_tail_loss_than_of_the_balanced_one(num_classes, num):
    head = embedding_head(num_classes, 64)
    embeddings, labels = normalize(normal(num, 64)), torch.randint(num_classes, (num,))
    hard = gradient(LongTailLoss(head), embeddings, labels)
    soft = gradient(LongTailLoss(head), embeddings, smoothed(labels, num_classes, 0.1))
    assert 0.8 < float(soft.norm() / hard.norm()) < 1.2


@given(seed=SEEDS, momentum=st.sampled_from([0.9, None]))
def test_the_least_smoothing_gives_the_means_of_hard_labels(seed, momentum):
    generator = torch.Generator().manual_seed(seed)
    hard, soft = (DynamicAssigner(embedding_head(8, 4), momentum=momentum) for _ in range(2))
    for _ in range(3):
        embeddings = normalize(torch.randn(6, 4, generator=generator))
        labels = torch.randint(8, (6,), generator=generator)
        hard.update(embeddings, labels)
        soft.update(embeddings, smoothed(labels, 8, 1e-12))
    torch.testing.assert_close(soft.class_means, hard.class_means, atol=1e-5, rtol=0)
    assert soft.step().unseen == hard.step().unseen
    assert torch.equal(soft.head.assignment, hard.head.assignment)


# Labels without a sample


@pytest.mark.parametrize("momentum", [0.9, None])
def test_smoothing_shows_no_label_to_the_assigner(momentum):
    head = embedding_head(20, 8)
    assigner = DynamicAssigner(head, momentum=momentum)
    labels = torch.arange(16) % 5
    assigner.update(normalize(normal(16, 8)), smoothed(labels, 20, 0.1))
    assert not assigner.class_means[5:].any()
    torch.testing.assert_close(assigner.class_means[:5].norm(dim=1), torch.ones(5))
    step = assigner.step()
    assert step.unseen == tuple(range(5, 20))
    # A label without a sample leaves its prototype only for one that has some.
    displaced = [label for label in step.moved_labels if label >= 5]
    taken = set(head.assignment[:5].tolist()) & set(range(5, 20))
    assert set(displaced) <= taken


def test_a_sliver_moves_a_mean_that_is_there_by_a_sliver():
    assigner = DynamicAssigner(embedding_head(4, 4), momentum=0.5)
    assigner.update(torch.eye(4)[:1], torch.tensor([0]))
    assigner.update(torch.eye(4)[1:2], torch.tensor([[0.2, 0.8, 0.0, 0.0]]))
    # 0.5 of the old mean and a fifth of the other half.
    expected = normalize(torch.tensor([[0.5, 0.1, 0.0, 0.0]]))[0]
    torch.testing.assert_close(assigner.class_means[0], expected)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_mixup_shows_the_labels_that_have_half_a_sample(share):
    assigner = DynamicAssigner(embedding_head(6, 4))
    target = share * one_hot(torch.tensor([0, 2]), 6) + (1.0 - share) * one_hot(torch.tensor([1, 3]), 6)
    assigner.update(torch.eye(4)[:2], target)
    seen = {0, 2} if share > 0.5 else {1, 3}
    assert assigner.step().unseen == tuple(label for label in range(6) if label not in seen)


@pytest.mark.parametrize("projection", ["linear", "linear+bn", "none"])
def test_smoothing_shows_no_label_to_a_fit(projection):
    features, labels = clouds(4, 8, per_class=5)
    hard, soft = (make_head(12, 8, 8 if projection == "none" else 3, projection=projection) for _ in range(2))
    expected = fit_head(hard, batched(features, labels))
    fit = fit_head(soft, batched(features, smoothed(labels, 12, 0.1)))  # a sixth of a sample for each label
    assert fit.unseen == expected.unseen == tuple(range(4, 12))
    assert torch.equal(soft.assignment[4:], hard.assignment[4:])
    assert fit.accuracy == pytest.approx(expected.accuracy, abs=0.1)
