"""fastai: its learner, its mixing of labels, its predictions, and its wrappers of timm and torchvision models."""

import pytest
import torch
from inside import NUM_CLASSES, NUM_SAMPLES, block, network, samples

import hyperproto
from hyperproto import convert_model, get_heads

learner = pytest.importorskip("fastai.learner", reason='fastai is one of the extra "frameworks"')

pytestmark = pytest.mark.filterwarnings("ignore")  # its own deprecations


def loaders():
    from fastai.data.core import DataLoaders

    pairs = list(zip(*samples(), strict=True))
    return DataLoaders.from_dsets(pairs, pairs, bs=12, device="cpu", num_workers=0)


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_mixed_labels_train(name, tmp_path):
    mixup = pytest.importorskip("fastai.callback.mixup")
    pytest.importorskip("fastai.callback.progress")  # adds no_bar
    model = convert_model(network(), classifier="fc", dim=4)
    criterion = hyperproto.BalancedLoss(hyperproto.DynamicAssigner(model))
    trained = learner.Learner(loaders(), model, loss_func=criterion, model_dir=tmp_path)
    with trained.no_bar(), trained.no_logging():
        trained.fit(1, 1e-2, cbs=getattr(mixup, name)())
    assert criterion.reduction == "mean"


@pytest.mark.parametrize("wrapper", ["create_timm_model", "create_vision_model"])
def test_its_models_are_found(wrapper):
    vision = pytest.importorskip("fastai.vision.learner")
    from torchvision.models import resnet18

    architecture = "test_resnet" if wrapper == "create_timm_model" else resnet18
    made = getattr(vision, wrapper)(architecture, NUM_CLASSES, pretrained=False)
    model = made[0] if isinstance(made, tuple) else made
    convert_model(model, dim=4)
    assert list(get_heads(model)) == ["1.8"]
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, NUM_CLASSES)


def test_the_page():
    pytest.importorskip("fastai.callback.progress")
    space = {"model": network(), "loaders": loaders()}
    exec(block("fastai"), space)
    assert torch.allclose(space["probabilities"].sum(dim=1), torch.ones(NUM_SAMPLES), atol=1e-5)
    assert space["labels"].shape == (NUM_SAMPLES,)
    assert torch.equal(space["labels"], space["probabilities"].argmax(dim=1))
    assert len(space["assigner"].history) == 2
