"""An assigner inside other engines: its state in the model's checkpoint, pauses, and steps by themselves."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    ShapeError,
    convert_model,
    get_heads,
    restore_model,
    to_linear,
)

NUM_CLASSES, DIM = 6, 3


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES), nn.Identity())


def converted(**options: object) -> nn.Module:
    return convert_model(plain(), dim=DIM, classifier="2", **options)


def by_hand() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), HypersphericalHead(8, NUM_CLASSES, dim=DIM))


def head_alone() -> nn.Module:
    return HypersphericalHead(5, NUM_CLASSES, dim=DIM)


MODELS = {"converted": converted, "by hand": by_hand, "a head": head_alone}


def epoch(model: nn.Module, assigner: DynamicAssigner, seed: int, *, batches: int = 4) -> None:
    generator = torch.Generator().manual_seed(seed)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(batches):
        images, labels = torch.randn(16, 5, generator=generator), torch.randint(NUM_CLASSES, (16,), generator=generator)
        criterion(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_run_resumed_from_the_models_checkpoint_alone_is_the_undisturbed_one(make, momentum, tmp_path):
    def run(path: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = make()
        assigner = DynamicAssigner(model, momentum=momentum, attach=True)
        epoch(model, assigner, 0)
        assigner.step()
        epoch(model, assigner, 1, batches=2)
        if path is not None:  # another process
            torch.save(model.state_dict(), path)
            model = make()
            assigner = DynamicAssigner(model, momentum=momentum, attach=True)
            model.load_state_dict(torch.load(path, weights_only=True))
        epoch(model, assigner, 2, batches=2)
        assigner.step()
        return state_of(model), state_of(assigner)

    for undisturbed, resumed in zip(run(None), run(tmp_path / "model.pt"), strict=True):
        assert is_equal(undisturbed, resumed)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_checkpoints_with_and_without_it_load_into_models_with_and_without_it(make):
    model, bare = make(), make()
    assigner = DynamicAssigner(model, attach=True)
    epoch(model, assigner, 0)
    with_it, own = model.state_dict(), state_of(assigner)
    keys = [name for name in with_it if "assigner." in name]
    assert keys == list(with_it)[-len(keys) :]  # behind all others: what goes by position is not led astray
    assert len(keys) == len(own)
    bare.load_state_dict(with_it)
    assert is_equal(state_of(bare), {name: value for name, value in with_it.items() if name not in keys})
    other = DynamicAssigner(other_model := make(), attach=True)
    other_model.load_state_dict(bare.state_dict())
    assert float(other.class_counts.sum()) == 0
    other_model.load_state_dict(with_it)
    assert is_equal(state_of(other), own)


def test_an_attached_assigner_that_does_not_fit_is_refused_before_anything_is_loaded():
    model, other = converted(), converted()
    DynamicAssigner(model, attach=True)
    before, checkpoint = state_of(model), dict(other.state_dict())
    checkpoint["2.assigner.class_means"] = torch.zeros(NUM_CLASSES + 1, DIM)
    checkpoint["0.weight"] = checkpoint["0.weight"] + 1.0
    with pytest.raises(ShapeError, match=r"2\.assigner\.class_means"):
        model.load_state_dict(checkpoint)
    assert is_equal(state_of(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_have_none(copied):
    model = converted()
    assigner = DynamicAssigner(model, attach=True)
    twin = copied(model)
    assert not any("assigner" in name for name in twin.state_dict())
    epoch(model, assigner, 0)
    twin.load_state_dict(model.state_dict())
    assert any("assigner" in name for name in model.state_dict())
    assert len(list(twin.modules())) == len(list(converted().modules()))


def test_averages_do_not_see_it():
    model = converted()
    averages = [ModelEmaV3(model, decay=0.5), AveragedModel(model), AveragedModel(model, use_buffers=True)]
    assigner = DynamicAssigner(model, attach=True)
    epoch(model, assigner, 0)
    means = assigner.class_means.clone()
    averages[0].update(model)
    for average in averages[1:]:
        average.update_parameters(model)
    reference = ModelEmaV3(converted(), decay=0.5)
    reference.update(copy.deepcopy(model))
    assert is_equal(state_of(averages[0].module), state_of(reference.module))
    assert torch.equal(assigner.class_means, means)


def test_exporters_and_folding_do_not_see_it():
    model, images = converted().eval(), torch.randn(4, 5)
    assigner = DynamicAssigner(model, attach=True)
    epoch(model.train(), assigner, 0)
    exported = torch.export.export(model.eval(), (images,))
    torch.testing.assert_close(exported.module()(images), model(images))
    assert not any("assigner" in name for name in exported.state_dict)
    plain_state = plain().state_dict()
    assert to_linear(copy.deepcopy(model)).state_dict().keys() == plain_state.keys()
    assert restore_model(model).state_dict().keys() == plain_state.keys()
    assert to_linear(converted()).state_dict().keys() == plain_state.keys()


def test_a_wrapped_model_saves_it_under_its_own_names():
    model = converted()
    DynamicAssigner(wrapped := nn.DataParallel(model), attach=True)
    assert "module.2.assigner.class_means" in wrapped.state_dict()
    assert "2.assigner.class_means" in model.state_dict()


def test_distributed_data_parallel_broadcasts_none_of_it(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = converted()
        assigner = DynamicAssigner(model, attach=True)
        wrapped = DistributedDataParallel(model)
        assert not {id(buffer) for buffer in assigner.buffers()} & {id(each) for each in wrapped.modules_buffers}
        assert "module.2.assigner.class_means" in wrapped.state_dict()
    finally:
        torch.distributed.destroy_process_group()


# Batches that do not count


def test_paused_batches_feed_nothing_and_the_loss_is_the_same():
    model = converted()
    assigner = DynamicAssigner(model)
    criterion, images, labels = BalancedLoss(assigner), torch.randn(8, 5), torch.arange(8) % NUM_CLASSES
    before = state_of(assigner)
    with assigner.paused():
        with assigner.paused():
            paused = criterion(model(images), labels)
        assigner.update(model(images), labels)
    assert is_equal(state_of(assigner), before)
    torch.testing.assert_close(criterion(model(images), labels), paused)
    assert float(assigner.class_counts.sum()) == 8


def test_an_error_within_ends_the_pause():
    assigner = DynamicAssigner(model := converted())
    with pytest.raises(RuntimeError), assigner.paused():
        raise RuntimeError
    assigner.update(model(torch.randn(8, 5)), torch.arange(8) % NUM_CLASSES)
    assert float(assigner.class_counts.sum()) == 8


# Steps by themselves


@pytest.mark.parametrize("step_every", [1, 3, 10])
def test_a_step_after_every_so_many_batches(step_every):
    model = converted()
    assigner = DynamicAssigner(model, step_every=step_every)
    for seed in range(3):
        epoch(model, assigner, seed)
    assert len(assigner.history) == 12 // step_every


def test_the_batches_since_the_last_step_are_counted_in_the_state():
    model = converted()
    first = DynamicAssigner(model, step_every=3)
    epoch(model, first, 0, batches=2)
    second = DynamicAssigner(model, step_every=3)
    second.load_state_dict(first.state_dict())
    epoch(model, second, 1, batches=1)
    assert len(second.history) == 1
    without = DynamicAssigner(model)
    without.load_state_dict(first.state_dict())
    assert "num_batches" not in without.state_dict()
    first.load_state_dict(without.state_dict())
    epoch(model, first, 1, batches=2)
    assert not first.history
    first.step()
    epoch(model, first, 1, batches=2)  # a step by hand begins a new round
    assert len(first.history) == 1


def test_the_count_of_batches_is_kept_on_the_cpu_whatever_the_default_device():
    assigner = DynamicAssigner(converted(), step_every=3)
    with torch.device("meta"):
        count = assigner.state_dict()["num_batches"]
    assert (count.device.type, int(count)) == ("cpu", 0)


def test_a_step_by_itself_trains_as_one_by_hand():
    results = []
    for step_every in (2, None):
        model = converted()
        assigner = DynamicAssigner(model, step_every=step_every)
        for seed in range(3):
            epoch(model, assigner, seed, batches=2)
            if step_every is None:
                assigner.step()
        results.append(state_of(model))
    assert is_equal(*results)


def test_to_attach_or_not_is_a_flag():
    with pytest.raises(ArgumentError, match="expected attach to be True or False"):
        DynamicAssigner(head_alone(), attach="yes")


@pytest.mark.parametrize("step_every", [0, -1, 1.5, "2", True])
def test_batches_are_a_whole_number(step_every):
    with pytest.raises(ArgumentError, match="step_every"):
        DynamicAssigner(head_alone(), step_every=step_every)


def test_heads_know_of_no_assigner_by_themselves():
    assert all(not head._attached for head in get_heads(converted()).values())
