"""timm and torchvision: converted models by name, in folders, in unedited scripts, and under timm's own surgery."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from compatible import needs
from inside import block
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.optim import param_groups_layer_decay
from timm.utils import freeze, unfreeze

import hyperproto
import hyperproto.timm
from hyperproto import convert_model, get_heads, restore_model, to_linear

NUM_CLASSES, DIM = 6, 4

has_folders = needs("save_for_hf and local-dir:", timm="1.0.31")
every_projection = pytest.mark.parametrize("projection", ["none", "linear", "linear+bn"])


def images(num: int = 4) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32)


def converted(**options: object) -> torch.nn.Module:
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    return convert_model(model, **({"dim": DIM} | options))


def head_of(model: torch.nn.Module) -> hyperproto.HypersphericalHead:
    [head] = get_heads(model).values()
    return head


# Names


def test_every_name_of_timm_is_known_and_listed_by_its_prefix_alone():
    names = timm.list_models()
    assert timm.list_models("hp_*") == [f"hp_{name}" for name in names]
    assert not any(name.startswith("hp_") for name in [*names, *timm.list_models("*")])
    assert timm.is_model("hp_resnet50")
    assert not timm.is_model("hp_resnet5000")
    assert not timm.is_model("hp_hp_resnet50")
    assert timm.list_models(["test_resnet", "hp_test_r*"], exclude_filters="*2*") == ["test_resnet", "hp_test_resnet"]
    assert "hp_resnet18.a1_in1k" in timm.list_models("hp_resnet18", pretrained=True)
    others = timm.list_models("hp_resnet18*", pretrained=True, exclude_filters=["hp_resnet18.*"])
    assert others
    assert not any(name.startswith("hp_resnet18.") for name in others)


def test_a_name_takes_the_options_of_a_conversion():
    model = timm.create_model(
        "hp_test_resnet", num_classes=NUM_CLASSES, hp_dim=3, hp_bank="random", hp_projection="linear", hp_logit_scale=7
    )
    head = head_of(model)
    assert (head.num_classes, head.dim, head.bank.method) == (NUM_CLASSES, 3, "random")
    assert isinstance(head.projection, torch.nn.Linear)
    assert float(head.logit_scale) == head.initial_logit_scale == 7.0
    assert "never fitted" in hyperproto.describe(model)
    assert restore_model(model).pretrained_cfg["architecture"] == "test_resnet"


def test_models_registered_later_have_their_name_too(monkeypatch):
    def small_test_model(pretrained=False, **options):
        return timm.create_model("test_resnet", pretrained=pretrained, **options)

    small_test_model.__module__ = __name__
    monkeypatch.setitem(sys.modules[__name__].__dict__, "__all__", [])
    timm.models.register_model(small_test_model)
    assert head_of(timm.create_model("hp_small_test_model", num_classes=5)).num_classes == 5
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("hp_no_such_model")


@pytest.mark.parametrize("options", [{"features_only": True}, {"num_classes": 0}])
def test_backbones_are_plain(options):
    model = timm.create_model("hp_test_resnet", hp_dim=DIM, **options)
    assert not get_heads(model)
    assert type(model) is type(timm.create_model("test_resnet", **options))


def test_torchvision_has_the_same_names():
    model = torchvision.models.get_model("hp_resnet18", num_classes=NUM_CLASSES, hp_dim=DIM, hp_logit_scale=3)
    assert float(model.fc.logit_scale) == 3.0
    assert torchvision.models.get_model_weights("hp_resnet18") is torchvision.models.ResNet18_Weights
    assert torchvision.models.list_models(include="hp_resnet*") == [
        f"hp_{name}" for name in torchvision.models.list_models(include="resnet*")
    ]
    assert not any(name.startswith("hp_") for name in torchvision.models.list_models())


# Folders


@has_folders
@every_projection
def test_a_folder_brings_the_converted_model_back(tmp_path, projection):
    bank = hyperproto.PrototypeBank(9, 96 if projection == "none" else DIM, method="random", seed=5)
    model = converted(dim=None, bank=bank, projection=projection, seed=3).eval()
    head_of(model).assign_(torch.tensor([8, 1, 3, 0, 7, 2]))
    head_of(model).logit_scale.fill_(5.0)
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    batch = images()
    assert torch.equal(loaded(batch), model(batch))
    timm.models.save_for_hf(loaded, tmp_path / "again")  # what came from a folder is saved like any other
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(again(batch), model(batch))


@has_folders
@pytest.mark.parametrize(
    "options", [{"num_classes": 3, "hp_dim": 2}, {"num_classes": 0}, {"features_only": True}], ids=str
)
def test_a_folder_gives_its_backbone_to_another_task(tmp_path, options):
    model = converted()
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, expected[name]), name
    assert [head.dim for head in get_heads(loaded).values()] == ([2] if "hp_dim" in options else [])


@has_folders
def test_folders_without_a_head_are_what_their_configuration_says(tmp_path):
    plain = to_linear(converted()).eval()
    timm.models.save_for_hf(plain, tmp_path)
    batch = images()
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(batch), plain(batch))
    timm.models.save_for_hf(converted(), tmp_path)
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(hyperproto.CheckpointError, match="without a head"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


# Scripts


SCRIPT = """
import argparse, sys, timm
parser = argparse.ArgumentParser()
parser.add_argument("--model")
if __name__ == "__main__":
    model = timm.create_model(parser.parse_args().model, num_classes=6, pretrained=True)
    print(type(model.get_classifier()).__name__, sys.path[0])
"""


@has_folders
def test_a_script_runs_as_it_is_in_a_process_of_its_own(tmp_path):
    timm.models.save_for_hf(converted(), tmp_path / "folder")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "hyperproto.timm", str(script), "--model", f"local-dir:{tmp_path / 'folder'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["HypersphericalHead", str(tmp_path.resolve())]


def test_without_a_script_it_says_how_it_is_called():
    from hyperproto.timm.__main__ import main

    with pytest.raises(SystemExit, match="SCRIPT"):
        main([])


# What timm does to models


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_adaptive_clipping_leaves_the_projection_out_and_nothing_else(projection):
    model = converted(projection=projection)
    spared = {id(parameter) for parameter in head_of(model).parameters()}
    clipped = {id(parameter) for parameter in timm.models.model_parameters(model, exclude_head=True)}
    assert clipped == {id(parameter) for parameter in model.parameters()} - spared
    assert len(list(timm.models.model_parameters(model))) == len(list(model.parameters()))
    hyperproto.BalancedLoss(model)(model(images()), torch.arange(4)).backward()
    timm.utils.adaptive_clip_grad(timm.models.model_parameters(model, exclude_head=True))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    plain = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    assert len(timm.models.model_parameters(plain, exclude_head=True)) == len(list(plain.parameters())) - 2


def test_adaptive_clipping_of_a_task_leaves_the_projection_out():
    task = pytest.importorskip("timm.task", reason="timm's scripts train tasks since 1.0.23").ClassificationTask
    model = converted()
    spared = {id(parameter) for parameter in head_of(model).parameters()}
    found = task(model, torch.nn.CrossEntropyLoss()).get_clip_parameters(exclude_head=True)
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in model.parameters()} - spared


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_layer_decay_groups_the_projection_as_the_classifier(projection):
    plain = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    model = converted(projection=projection)

    def scales(model, prefix):
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        own = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(prefix)}
        return {group["lr_scale"] for group in groups for each in group["params"] if id(each) in own}

    for prefix in ("conv1", "layer1", "layer4", "fc."):
        assert scales(model, prefix) == scales(plain, prefix)


def test_split_batch_norm_trains_and_evaluates_as_before():
    model = converted()
    model(images(16))
    batch, expected = images(), copy.deepcopy(model).eval()
    split = convert_splitbn_model(model, 2)
    assert torch.allclose(split.eval()(batch), expected(batch), atol=1e-5)
    split.train()
    split(batch).sum().backward()
    assert all(norm.num_batches_tracked > 1 for norm in (split.fc.projection[1], split.fc.projection[1].aux_bn[0]))


def test_frozen_batch_norm_stays_and_serves():
    model = converted()
    model(images(16))
    batch = images()
    expected = copy.deepcopy(model).eval()(batch)
    frozen = convert_sync_batchnorm(model)
    freeze(frozen)
    assert torch.allclose(frozen.eval()(batch), expected, atol=1e-5)
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(frozen)).train()(batch), frozen.train()(batch))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    folded = to_linear(copy.deepcopy(frozen).eval())
    assert torch.equal(folded(batch).argmax(dim=1), expected.argmax(dim=1))
    unfreeze(frozen)
    assert torch.allclose(frozen.eval()(batch), expected, atol=1e-5)
    frozen.train()(batch)
    assert not torch.equal(frozen.fc.projection[1].running_mean, before["fc.projection.1.running_mean"])


# The page


@pytest.mark.parametrize("heading", [pytest.param("timm", marks=has_folders), "torchvision"])
def test_the_page(heading, tmp_path):
    space = {"folder": str(tmp_path), "images": images()}
    exec(block(heading), space)
    assert get_heads(space["model"])
