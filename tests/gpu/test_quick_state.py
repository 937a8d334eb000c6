"""What moves between CPU and GPU: models before and after their conversion, checkpoints, and what the fits reach."""

import copy

import pytest
import timm
import torch
from cases import NUM_CLASSES, assigner_of, batch, make_head
from torch import nn

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    LongTailLoss,
    compress_head,
    convert_model,
    fit_head,
    fit_logit_scale,
    get_heads,
    refit_head,
    restore_model,
    to_linear,
)

CPU = torch.device("cpu")


def small_model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES)


def devices_of(*modules: nn.Module) -> set[str]:
    return {tensor.device.type for module in modules for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_model_on_the_gpu_gets_its_head_there(device, warm_start):
    model = convert_model(small_model().to(device), dim=8, warm_start=warm_start)
    assert devices_of(model) == {device.type}
    images = torch.randn(4, 3, 32, 32, device=device)
    assert model(images).shape == (4, NUM_CLASSES)
    linear = to_linear(copy.deepcopy(model).eval())
    torch.testing.assert_close(linear(images).argmax(dim=1), model.eval()(images).argmax(dim=1))
    assert devices_of(restore_model(model)) == {device.type}


def test_a_model_moved_after_its_conversion_takes_all_with_it(device):
    model = convert_model(small_model(), dim=8)
    assigner = DynamicAssigner(model)
    criterion = LongTailLoss(assigner, class_counts=torch.arange(1, NUM_CLASSES + 1))
    assert devices_of(model, assigner, criterion) == {"cpu"}
    model.to(device)
    images, labels = torch.randn(4, 3, 32, 32, device=device), torch.arange(4, device=device)
    criterion(model(images), labels).backward()
    assert devices_of(model, assigner, criterion) == {device.type}
    assert assigner.step().changed > 0
    model.to(CPU)
    criterion(model(images.cpu()), labels.cpu()).backward()
    assert devices_of(model, assigner, criterion) == {"cpu"}
    assert float(assigner.class_counts.sum()) == 8


@pytest.mark.parametrize("to_gpu", [True, False], ids=["CPU to GPU", "GPU to CPU"])
def test_checkpoints_load_on_the_other_side(device, to_gpu, tmp_path):
    source, target = (CPU, device) if to_gpu else (device, CPU)
    head = make_head().to(source)
    batches = [batch(source, seed=seed) for seed in range(3)]
    assigner = assigner_of(head, batches)
    assigner.step()
    assigner.update(head(batches[0][0]).detach(), batches[0][1])
    head.eval()
    path = tmp_path / "checkpoint.pt"
    torch.save({"head": head.state_dict(), "assigner": assigner.state_dict()}, path)
    state = torch.load(path, map_location=target)
    loaded = make_head().to(target)
    other = DynamicAssigner(loaded)
    loaded.load_state_dict(state["head"])
    other.load_state_dict(state["assigner"])
    assert devices_of(loaded, other) == {target.type}
    assert torch.equal(loaded.assignment.cpu(), head.assignment.cpu())
    features = batches[0][0]
    torch.testing.assert_close(loaded.eval()(features.to(target)).cpu(), head(features).cpu(), atol=1e-4, rtol=1e-4)
    assert torch.equal(other.class_means.cpu(), assigner.class_means.cpu())
    assert other.step().moved_labels == assigner.step().moved_labels


FITS = {
    "fit_head": lambda head, loader: fit_head(head, loader).accuracy,
    "refit_head": lambda head, loader: refit_head(head, loader, iterations=20).accuracy,
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_fits_reach_on_the_gpu_what_they_reach_on_the_cpu(device, fit, projection):
    reached = []
    for place in (CPU, device):
        head = make_head(projection=projection).to(place)
        loader = [batch(place, seed=seed) for seed in range(8)]
        reached.append(FITS[fit](head, loader))
        assert devices_of(head) == {place.type}
        assert BalancedLoss(head)(head(loader[0][0]), loader[0][1]).isfinite()
    assert reached[0] > 0.9
    assert reached[1] == pytest.approx(reached[0], abs=0.02)


def test_compress_head_reaches_on_the_gpu_what_it_reaches_on_the_cpu(device):
    reached = []
    for place in (CPU, device):
        model = nn.Sequential(nn.Identity(), make_head()).to(place)
        loader = [batch(place, seed=seed) for seed in range(8)]
        fit_head(model, loader)
        reached.append(compress_head(model, loader, dim=8, iterations=20).accuracy)
        assert devices_of(model) == {place.type}
        assert get_heads(model)["1"].dim == 8
    assert reached[0] > 0.9
    assert reached[1] == pytest.approx(reached[0], abs=0.02)


def test_fit_logit_scale_finds_on_the_gpu_what_it_finds_on_the_cpu(device):
    scales = []
    for place in (CPU, device):
        head = make_head().to(place)
        fit_head(head, [batch(place, seed=seed) for seed in range(8)])
        scales.append(fit_logit_scale(head, [batch(place, seed=50)]))
        assert head.logit_scale.device.type == place.type
    assert scales[1] == pytest.approx(scales[0], rel=1e-2)


@pytest.mark.parametrize("fit", FITS)
def test_fits_take_batches_of_the_cpu(device, fit):
    head = make_head().to(device)
    assert FITS[fit](head, [batch(CPU, seed=seed) for seed in range(8)]) > 0.9
    assert devices_of(head) == {device.type}
