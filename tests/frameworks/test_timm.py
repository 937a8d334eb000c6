"""timm and torchvision: converted models by name, in folders, in unedited scripts, and under timm's own surgery."""

import copy
import pickle
import subprocess
import sys
from importlib.util import find_spec

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


@needs("tasks that clip", timm="1.0.27")
def test_adaptive_clipping_of_a_task_leaves_the_projection_out():
    from timm.task import ClassificationTask

    model = converted()
    spared = {id(parameter) for parameter in head_of(model).parameters()}
    found = ClassificationTask(model, torch.nn.CrossEntropyLoss()).get_clip_parameters(exclude_head=True)
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


# Tasks


has_tasks = needs("tasks", timm="1.0.23")
has_task_checkpoints = needs("checkpoints of tasks", timm="1.0.27")


def separate(num: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of images whose brightness tells their labels, twice as bright in each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % NUM_CLASSES
    pictures = torch.randn(num, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
    return list(zip(pictures.chunk(2), labels.chunk(2), strict=True))


def task_of(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    return hyperproto.timm.PrototypeTask(model, torch.nn.CrossEntropyLoss(), verbose=False, **options)


def train_epochs(task: torch.nn.Module, optimizer: torch.optim.Optimizer, num: int = 1) -> None:
    for _ in range(num):
        for batch, labels in separate():
            task(batch, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()


@has_tasks
def test_a_task_feeds_its_assigner_and_steps():
    model = converted()
    twin, task = copy.deepcopy(model), task_of(model, step_every=2)
    train_epochs(task, torch.optim.SGD(model.parameters(), lr=0.0), 2)
    assert len(task.assigner.history) == 2
    assert task.assigner.history[0].changed
    assert task.assigner.head is head_of(model)
    by_hand = hyperproto.DynamicAssigner(twin)
    for batches in [separate()] * 2:
        for batch, labels in batches:
            by_hand.update(twin(batch), labels)
        by_hand.step()
    assert torch.equal(task.assigner.class_means, by_hand.class_means)
    assert task.assigner.class_counts.tolist() == [8.0] * NUM_CLASSES
    assert torch.equal(head_of(model).assignment, head_of(twin).assignment)


@has_tasks
def test_a_task_is_as_timms_own_but_for_the_assigner():
    from timm.task import ClassificationTask

    model = converted()
    own, plain = task_of(copy.deepcopy(model)), ClassificationTask(model, torch.nn.CrossEntropyLoss())
    batch, labels = separate()[0]
    soft = torch.full((len(labels), NUM_CLASSES), 0.1).scatter(1, labels[:, None], 0.5)
    for target in (labels, soft):
        found, expected = own(batch, target), plain(batch, target)
        assert torch.equal(found["loss"], expected["loss"])
        assert torch.equal(found["output"], expected["output"])
    assert float(own.assigner.class_counts.sum()) == pytest.approx(1.4 * len(labels))


@has_tasks
def test_a_task_feeds_in_training_only():
    task, (batch, labels) = task_of(converted(), step_every=1), separate()[0]
    with torch.no_grad():
        task(batch, labels)
    task.assigner.head.eval()
    task(batch, labels)
    assert not task.assigner.class_counts.any()
    assert not task.assigner.history


@has_tasks
def test_a_task_with_a_loss_of_this_library_feeds_once():
    model, (batch, labels) = converted(), separate()[0]
    task = hyperproto.timm.PrototypeTask(model, hyperproto.BalancedLoss(model), verbose=False)
    assert torch.equal(task(batch, labels)["loss"], hyperproto.BalancedLoss(model)(model(batch), labels))
    assert task.assigner.class_counts.sum() == len(labels)
    fed = hyperproto.BalancedLoss(hyperproto.DynamicAssigner(model))
    with pytest.raises(hyperproto.ArgumentError, match=r"BalancedLoss\(model\)"):
        hyperproto.timm.PrototypeTask(model, fed, verbose=False)
    with pytest.raises(hyperproto.HeadNotFoundError, match="convert_model"):
        task_of(timm.create_model("test_resnet"))


@has_task_checkpoints
@pytest.mark.parametrize("with_average", [False, True])
def test_a_tasks_run_resumes_as_if_nothing_had_been(tmp_path, with_average):
    from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
    from timm.utils import CheckpointSaver

    def begin():
        torch.manual_seed(0)
        task = task_of(converted(), step_every=2)
        if with_average:
            task.setup_ema(decay=0.5)
        return task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)

    def train(task, optimizer, num):
        for _ in range(num):
            train_epochs(task, optimizer)
            task.update_ema()

    undisturbed, optimizer = begin()
    train(undisturbed, optimizer, 4)
    stopped, optimizer = begin()
    train(stopped, optimizer, 2)
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(stopped.trainable_module, optimizer, task=stopped, **folders).save_checkpoint(0, metric=1.0)
    resumed, optimizer = begin()
    resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer)
    if with_average:
        load_task_ema_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    train(resumed, optimizer, 2)
    expected = undisturbed.state_dict()
    for name, value in resumed.state_dict().items():
        if not name.endswith(
            "assignment_record"
        ):  # of the average: between two, where a saved one is that of the newer
            assert torch.equal(value, expected[name]), name
    assert resumed.assigner.class_counts.tolist() == [16.0] * NUM_CLASSES
    plain = timm.create_model("hp_test_resnet", num_classes=NUM_CLASSES, hp_dim=DIM)
    plain.load_state_dict(torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"])


@pytest.mark.skipif(find_spec("timm.task") is not None, reason="this timm has tasks")
def test_where_timm_has_no_tasks_it_says_so():
    with pytest.raises(ImportError, match=r"timm >= 1\.0\.23"):
        from hyperproto.timm import PrototypeTask  # noqa: F401


# The page


@pytest.mark.parametrize("heading", [pytest.param("timm", marks=has_folders), "torchvision"])
def test_the_page(heading, tmp_path):
    space = {"folder": str(tmp_path), "images": images()}
    exec(block(heading), space)
    assert get_heads(space["model"])


@has_task_checkpoints
def test_the_page_of_tasks(tmp_path):
    space = {"folder": str(tmp_path), "loader": separate(), "epochs": 2}
    exec(block("A loop over timm's tasks"), space)
    assert len(space["task"].assigner.history) == 2
    assert (tmp_path / "last.pth.tar").exists()
