"""What every loss and the assigner ask of the targets of a batch."""

import pytest
import torch

from hyperproto import BalancedLoss, DynamicAssigner, HypersphericalHead, LabelError, LongTailLoss, ShapeError

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
