"""What timm and torch do with a converted model in training: every such tool goes on working."""

import copy
import pickle

import pytest
import timm
import torch
from compatible import MODELS, NUM_CLASSES, converted, heads_of, images, needs, permute_, plain
from timm.data import Mixup
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, unfreeze
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from hyperproto import (
    AssignmentError,
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    convert_model,
    get_heads,
)

every_model = pytest.mark.parametrize("name", MODELS)


def train_step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(4, 3, 32, 32, generator=generator)
    labels = torch.randint(NUM_CLASSES, (4,), generator=generator)
    criterion(model(batch), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


# timm's own interface of a model


@every_model
def test_the_features_are_those_of_the_original(name):
    model, batch = plain(name).eval(), images()
    features = model.forward_features(batch)
    pooled = model.forward_head(features, pre_logits=True)
    convert_model(model, dim=5)
    assert torch.equal(model.forward_features(batch), features)
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    assert torch.equal(model.forward_head(features), model(batch))


@every_model
def test_the_classifier_and_the_number_of_classes_are_the_heads(name):
    model = converted(name)
    found = model.get_classifier()
    listed = list(found) if isinstance(found, (tuple, nn.ModuleList)) else [found]
    assert [id(module) for module in listed] == [id(head) for head in heads_of(model)]
    assert model.num_classes == NUM_CLASSES
    # For another number of classes: to be counted by everything that asks the model.
    assert converted(name, num_classes=7).num_classes == 7


# Optimisers


@every_model
def test_layer_decay_puts_the_heads_last(name):
    model = converted(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale_of.keys() == {id(parameter) for parameter in model.parameters()}
    for head in heads_of(model):
        assert [scale_of[id(parameter)] for parameter in head.parameters()] == [1.0, 1.0, 1.0]
    assert min(scale_of.values()) < 1.0


@every_model
def test_weight_decay_reaches_the_projection_and_nothing_else_of_the_head(name):
    model = converted(name)
    groups = param_groups_weight_decay(model, weight_decay=0.05)
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay_of.keys() == {id(parameter) for parameter in model.parameters()}
    for head in heads_of(model):
        linear, batch_norm = head.projection
        assert [decay_of[id(parameter)] for parameter in linear.parameters()] == [0.05]
        assert [decay_of[id(parameter)] for parameter in batch_norm.parameters()] == [0.0, 0.0]


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adamw", "lamb", pytest.param("muon", marks=needs("the optimizer muon", timm="1.0.26"))]
)
def test_optimizers_of_timm_leave_prototypes_and_assignment_alone(optimizer):
    model = converted("test_resnet")
    [head] = heads_of(model)
    before = state_of(head)
    built = create_optimizer_v2(model, opt=optimizer, lr=0.1, weight_decay=0.05, layer_decay=0.75)
    train_step(model, BalancedLoss(model), built)
    changed = {key for key, value in head.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("projection.")}


# Averages of weights


@every_model
@pytest.mark.parametrize("foreach", [True, False])
def test_timm_ema_follows_the_assignment_and_keeps_the_prototypes(name, foreach):
    model = converted(name)
    ema = ModelEmaV3(model, decay=0.5, foreach=foreach)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        train_step(model, BalancedLoss(model), optimizer, seed)
        permute_(model, seed)
        ema.update(model)
    for averaged, head in zip(heads_of(ema.module), heads_of(model), strict=True):
        assert torch.equal(averaged.bank.prototypes, head.bank.prototypes)
        assert torch.equal(averaged.assignment, head.assignment)
        assert torch.equal(averaged.logit_scale, head.logit_scale)
        assert not torch.equal(averaged.projection[0].weight, head.projection[0].weight)
    assert torch.isfinite(ema.module.eval()(images())).all()


@every_model
@pytest.mark.parametrize("ema", [True, False])
def test_averaged_model_of_torch_follows_the_assignment_and_keeps_the_prototypes(name, ema):
    model = converted(name)
    averaged_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        train_step(model, BalancedLoss(model), optimizer, seed)
        permute_(model, seed)
        averaged_model.update_parameters(model)
    for averaged, head in zip(heads_of(averaged_model), heads_of(model), strict=True):
        assert torch.equal(averaged.bank.prototypes, head.bank.prototypes)
        assert torch.equal(averaged.assignment, head.assignment)
        assert not torch.equal(averaged.projection[0].weight, head.projection[0].weight)
    update_bn([images(4)], averaged_model)
    assert torch.isfinite(averaged_model.eval()(images())).all()


def test_averaging_integer_buffers_is_undone_by_assigning_again():
    # use_buffers=True averages every buffer, also integers: torch would blend two assignments as it blends the
    # batch counters of batch norm. The documented cure is one line.
    model = converted("test_resnet")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    averaged.update_parameters(model)
    order = permute_(model)
    averaged.update_parameters(model)
    [head] = heads_of(averaged)
    with pytest.raises(AssignmentError, match="average over different assignments"):
        head.assignment  # noqa: B018
    head.assign_(order)
    assert torch.equal(head.class_prototypes, heads_of(model)[0].class_prototypes)


# Ways of running and training


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs("gradient checkpointing of it", timm="1.0.26") if name == "resnetv2_18" else ())
        for name in MODELS
    ],
)
def test_gradient_checkpointing_changes_no_gradient(name):
    model, batch, labels = converted(name), images(4), torch.arange(4)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    for each in (model, twin):
        BalancedLoss(each)(each(batch), labels).backward()
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=key)


@every_model
def test_a_frozen_backbone_stays_and_the_head_trains(name):
    model = converted(name)
    names = [child for child, _ in model.named_children() if not any(key.startswith(child) for key in get_heads(model))]
    freeze(model, names)
    in_heads = {id(parameter) for head in heads_of(model) for parameter in head.parameters()}
    before = state_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model, BalancedLoss(model), optimizer)
    for key, parameter in model.named_parameters():
        if id(parameter) in in_heads:
            assert not torch.equal(parameter, before[key]), key
        elif key.split(".")[0] in names:
            assert torch.equal(parameter, before[key]), key
    unfreeze(model, names)
    assert all(p.requires_grad for child in names for p in model.get_submodule(child).parameters())


@needs("a freeze that reaches the tokens of a Vision Transformer", timm="1.0.31")
@every_model
def test_freezing_the_whole_model_keeps_the_heads(name):
    model = converted(name)
    heads = heads_of(model)
    freeze(model)
    assert heads_of(model) == heads
    assert not any(parameter.requires_grad for parameter in model.parameters())
    permute_(model)  # no parameter: may still be assigned


@every_model
def test_channels_last(name):
    model, batch = converted(name).eval(), images()
    expected = model(batch)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(batch.to(memory_format=torch.channels_last)), expected, atol=1e-3, rtol=1e-3)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_compares_in_float32(name, dtype):
    model, batch = converted(name), images(4)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(batch)
        loss = BalancedLoss(DynamicAssigner(model))(logits, torch.arange(4))
    loss.backward()
    assert logits.dtype == loss.dtype == torch.float32
    for head in heads_of(model):
        assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
    model.eval()
    with torch.autocast("cpu", dtype=dtype):
        under = model(batch)
    largest = float(heads_of(model)[0].logit_scale)
    torch.testing.assert_close(under, model(batch), atol=0.1 * largest, rtol=0)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(name, dtype):
    model = converted(name).to(dtype).eval()
    logits = model(images().to(dtype))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@every_model
def test_timm_mixup_gives_soft_targets_to_criterion_and_assigner(name):
    model = converted(name)
    assigner = DynamicAssigner(model)
    # Labels that no image has get 0.01 of each: no reason to give them a mean.
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
    for criterion in (BalancedLoss(assigner), LongTailLoss(assigner)):
        batch, target = mixup(images(4), torch.arange(4))
        loss = criterion(model(batch), target)
        loss.backward()
        assert torch.isfinite(loss)
    assert float(assigner.class_counts.sum()) == pytest.approx(0.9 * 8.0, abs=1e-3)
    assert set(assigner.step().unseen) >= {4, 5, 6, 7, 8, 9}


@needs("timm.task", timm="1.0.26")
@every_model
def test_classification_task_of_timm(name):
    model = converted(name)
    assigner = DynamicAssigner(model)
    from timm.task import ClassificationTask

    task = ClassificationTask(model, criterion=BalancedLoss(assigner), verbose=False)
    task.train()
    result = task(images(4), torch.arange(4))
    result["loss"].backward()
    assert result["output"].shape == (4, NUM_CLASSES)
    assert assigner.class_counts.tolist() == [1.0] * 4 + [0.0] * 6
    assert all(torch.isfinite(parameter.grad).all() for head in heads_of(model) for parameter in head.parameters())
    assert assigner.step().unseen == tuple(range(4, NUM_CLASSES))
    task.eval()
    with torch.no_grad():
        task(images(4), torch.arange(4))
    assert float(assigner.class_counts.sum()) == 4.0


# Copies and checkpoints


@every_model
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_alike_and_are_independent(name, copier):
    model, batch = converted(name).eval(), images()
    order = permute_(model)
    twin = copier(model)
    assert torch.equal(twin(batch), model(batch))
    permute_(twin, seed=1)
    assert all(torch.equal(head.assignment, order) for head in heads_of(model))


@needs("a resume_checkpoint with weights_only", timm="1.0.26")
@every_model
def test_checkpoints_of_timm_carry_the_assignment(name, tmp_path):
    model, batch = converted(name), images()
    permute_(model)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
    train_step(model, BalancedLoss(model), optimizer)
    saver = CheckpointSaver(model, optimizer, model_ema=ModelEmaV3(model), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=3, metric=0.5)
    path = str(tmp_path / "last.pth.tar")
    expected = model.eval()(batch)

    loaded = converted(name).eval()
    load_checkpoint(loaded, path, use_ema=False, weights_only=False)
    assert torch.equal(loaded(batch), expected)
    load_checkpoint(loaded, path, use_ema=True, weights_only=False)
    assert torch.equal(loaded(batch), expected)

    resumed = converted(name).eval()
    restarted = create_optimizer_v2(resumed, opt="sgd", lr=0.1, momentum=0.9)
    assert resume_checkpoint(resumed, path, restarted, log_info=False, weights_only=False) == 4
    assert torch.equal(resumed(batch), expected)
    assert_same_state(resumed, state_of(model))
    assert restarted.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@every_model
def test_a_state_dict_needs_no_pickle(name, tmp_path):
    model = converted(name)
    permute_(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = converted(name, bank=PrototypeBank(NUM_CLASSES, 5), seed=1)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_state(twin, state_of(model))


def test_a_plain_model_takes_the_backbone_of_a_converted_checkpoint(tmp_path):
    model = converted("test_resnet")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    incompatible = load_checkpoint(other, str(tmp_path / "state.pt"), strict=False)
    assert set(incompatible.missing_keys) == {"fc.weight", "fc.bias"}
    assert all(key.startswith("fc.") for key in incompatible.unexpected_keys)
    assert isinstance(other.fc, nn.Linear)
    assert not isinstance(other.fc, HypersphericalHead)
