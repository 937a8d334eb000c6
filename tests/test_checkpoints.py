"""Checkpoints: every way to save and load is exact, and what does not fit is refused before anything is copied."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from compatible import NUM_CLASSES, converted, permute_
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from hyperproto import (
    AssignmentError,
    BalancedLoss,
    BankError,
    CheckpointError,
    DynamicAssigner,
    HypersphericalHead,
    PrototypeBank,
    ShapeError,
    convert_model,
    restore_model,
    to_linear,
)
from hyperproto.checkpoint import FORMAT_VERSION, count_in

# torch.distributed.checkpoint says so in a process of its own. The last two are torch 2.6's, the last of its own code.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:torch.distributed is unavailable:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)


def small(num_classes: int = 6, *, seed: int = 0, **options: object) -> nn.Module:
    """A converted model whose backbone lies before its head, with weights that the seed tells."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_classes))
    return convert_model(model, classifier="2", **({"dim": 4, "bank": PrototypeBank(6, 4)} | options))


def trained(model: nn.Module, *, momentum: float | None = 0.9, inputs: tuple[int, ...] = (5,)) -> DynamicAssigner:
    """The model after a few steps that moved everything that can move; returns its assigner."""
    generator = torch.Generator().manual_seed(1)
    assigner = DynamicAssigner(model, momentum=momentum)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        batch = torch.randn(12, *inputs, generator=generator)
        labels = torch.randint(assigner.head.num_classes, (12,), generator=generator)
        criterion(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert assigner.step().changed
    criterion(model(batch), labels)  # pending counts, and sums where there are any
    return assigner


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def assert_holds(module: nn.Module, state: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


# Round trips


def torch_save(source: nn.Module, target: nn.Module, folder: Path) -> None:
    torch.save(source.state_dict(), folder / "state.pt")
    target.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def safetensors_file(source: nn.Module, target: nn.Module, folder: Path) -> None:
    safetensors.torch.save_file(source.state_dict(), folder / "state.safetensors")
    target.load_state_dict(safetensors.torch.load_file(folder / "state.safetensors"))


def safetensors_model(source: nn.Module, target: nn.Module, folder: Path) -> None:
    safetensors.torch.save_model(source, str(folder / "state.safetensors"))
    missing, unexpected = safetensors.torch.load_model(target, folder / "state.safetensors")
    assert not missing
    assert not unexpected


def distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save(source.state_dict(), checkpoint_id=folder)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=folder)
    target.load_state_dict(state)


def distributed_checkpoint_of_copies(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save(get_model_state_dict(source), checkpoint_id=folder)
    state = copy.deepcopy(get_model_state_dict(target))
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state)


WAYS = [torch_save, safetensors_file, safetensors_model, distributed_checkpoint, distributed_checkpoint_of_copies]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.9, None])
def test_models_and_assigners_come_back_exactly(way, momentum, tmp_path):
    model, twin = small(), small(seed=1)
    assigner, resumed = trained(model, momentum=momentum), DynamicAssigner(twin, momentum=momentum)
    for name, source, target in (("model", model, twin), ("assigner", assigner, resumed)):
        folder = tmp_path / name
        folder.mkdir()
        way(source, target, folder)
        assert_holds(target, snapshot(source))
    head, other = assigner.head, resumed.head
    assert torch.equal(other.anchors, head.anchors)  # not in the checkpoint, made anew
    assert torch.equal(other.anchor_inverse, head.anchor_inverse)
    batch = torch.randn(4, 5)
    assert torch.equal(twin(batch), model(batch))
    for each, on in ((assigner, model), (resumed, twin)):
        each.update(on(batch).detach(), torch.arange(4))
    assert resumed.step().moved_labels == assigner.step().moved_labels
    assert_holds(resumed, snapshot(assigner))


@pytest.mark.parametrize("way", WAYS)
def test_heads_that_share_a_bank_come_back_and_share_it_still(way, tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    model, twin = converted(name), converted(name, bank=PrototypeBank(NUM_CLASSES, 5), seed=1)
    permute_(model)
    way(model, twin, tmp_path)
    assert_holds(twin, snapshot(model))
    assert twin.head.bank is twin.head_dist.bank


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shared_bank_is_stored_once_and_with_each_head_alone(device):
    model = converted("deit_tiny_distilled_patch16_224").to(device)
    assert [name for name in model.state_dict() if "prototypes" in name] == ["head.bank.prototypes"]
    assert [name for name in nn.DataParallel(model).state_dict() if "prototypes" in name] == [
        "module.head.bank.prototypes"
    ]
    for head in (model.head, model.head_dist):
        assert "bank.prototypes" in head.state_dict()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", [["head"], ["head_dist"], ["head", "head_dist"]])
def test_a_shared_bank_loads_by_any_of_its_names(stored, assign):
    # Earlier versions stored it with each head, and safetensors' save_model kept whichever came first.
    name = "deit_tiny_distilled_patch16_224"
    model, twin = converted(name), converted(name, bank=PrototypeBank(NUM_CLASSES, 5, seed=1))
    permute_(model)
    state = snapshot(model)
    prototypes = state.pop("head.bank.prototypes")
    state |= {f"{head}.bank.prototypes": prototypes.clone() for head in stored}
    for target in (twin, Within(twin)):
        prefix = "" if target is twin else "model."
        target.load_state_dict({prefix + key: value for key, value in state.items()}, assign=assign)
        assert_holds(twin, snapshot(model))
    with pytest.raises(RuntimeError, match=r"Missing key.*prototypes"):
        twin.load_state_dict({key: value for key, value in state.items() if "prototypes" not in key})


# What does not fit


def other_dim() -> nn.Module:
    return small(dim=5, bank="auto")


def other_num_classes() -> nn.Module:
    return small(7, bank="auto")


def more_prototypes() -> nn.Module:
    return small(bank=PrototypeBank(8, 4))


def other_num_classes_on_the_same_bank() -> nn.Module:
    return small(5)


def other_seed() -> nn.Module:
    return small(bank=PrototypeBank(6, 4, seed=1))


BAD_SCALES = (math.nan, math.inf, 0.0, -1.0)

MISFITS: list[tuple[Callable[[], nn.Module], type[ValueError], str]] = [
    (other_dim, BankError, r"2\.bank\.prototypes has shape \(6, 5\), this head expects \(6, 4\)"),
    (other_num_classes, BankError, r"2\.bank\.prototypes has shape \(7, 4\), this head expects \(6, 4\)"),
    (more_prototypes, BankError, r"2\.bank\.prototypes has shape \(8, 4\), this head expects \(6, 4\)"),
    (other_num_classes_on_the_same_bank, AssignmentError, r"2\.assignment.*of 6 labels.*\(6,\).*got \(5,\)"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("make", "error", "words"), MISFITS)
def test_checkpoints_of_another_head_are_refused_and_nothing_is_loaded(make, error, words, strict):
    model = small(seed=1)
    before, checkpoint = snapshot(model), make().state_dict()
    with pytest.raises(error, match=words):
        model.load_state_dict(checkpoint, strict=strict)
    assert_holds(model, before)


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        ({"2.assignment": torch.tensor([0, 1, 2, 3, 4, 4])}, AssignmentError, r"more than once: \[4\]"),
        ({"2.assignment": torch.arange(6) + 0.5}, AssignmentError, "average over different assignments"),
        ({"2.assignment_record": torch.zeros(5)}, AssignmentError, r"a record of shape \(8,\)"),
        ({"2.format_version": torch.tensor(FORMAT_VERSION + 1)}, CheckpointError, r"2\.format_version is 3.*up to 2"),
        *(({"2.logit_scale": torch.tensor(scale)}, CheckpointError, "positive and finite") for scale in BAD_SCALES),
        ({"2.bank.prototypes": PrototypeBank(6, 4).prototypes.half()}, BankError, "torch.float16"),
        ({"2.bank.prototypes": torch.full((6, 4), float("nan"))}, BankError, "no prototypes"),
        ({"2.bank.prototypes": torch.zeros(6, 4)}, BankError, "no prototypes"),
        ({"2.bank.prototypes": 1.01 * PrototypeBank(6, 4).prototypes}, BankError, "off 1 by 0.01"),
    ],
)
def test_damaged_and_later_checkpoints_are_refused_and_nothing_is_loaded(entry, error, words):
    model = small(seed=1)
    before, checkpoint = snapshot(model), small().state_dict() | entry
    with pytest.raises(error, match=words):
        model.load_state_dict(checkpoint)
    assert_holds(model, before)


class Within(nn.Module):
    """A user's module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, Within, DistributedDataParallel, sharded])
@pytest.mark.parametrize("load", [nn.Module.load_state_dict, set_model_state_dict])
def test_wrapped_models_refuse_as_bare_ones_do(wrap, load):
    model = small(seed=1)
    wrapped, other = wrap(model), wrap(other_num_classes_on_the_same_bank())
    before, checkpoint = snapshot(model), copy.deepcopy(get_model_state_dict(other))
    if load is nn.Module.load_state_dict:
        checkpoint = other.state_dict()
    with pytest.raises(AssignmentError, match=r"2\.assignment.*of 6 labels"):
        load(wrapped, checkpoint)
    assert_holds(model, before)
    same = wrap(other_seed())
    load(wrapped, same.state_dict() if load is nn.Module.load_state_dict else get_model_state_dict(same))
    assert_holds(wrapped, snapshot(same))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_refuse_on_their_own_and_restored_models_refuse_nothing(copier):
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
    model = convert_model(copy.deepcopy(plain), dim=4, classifier="2")
    twin = copier(model)
    restore_model(model).load_state_dict(plain.state_dict())
    assert not model._load_state_dict_pre_hooks
    before = snapshot(twin)
    with pytest.raises(BankError):
        twin.load_state_dict(other_dim().state_dict())
    assert_holds(twin, before)
    assert not to_linear(twin)._load_state_dict_pre_hooks
    twin.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("bank", [PrototypeBank(6, 4, seed=1), PrototypeBank(6, 4, method="random")])
@pytest.mark.parametrize("load", ["model", "head", "functional"])
def test_prototypes_are_data_and_come_with_their_assignment(bank, load):
    model, source = small(seed=1), small(bank=bank)
    source[2].assign_(torch.tensor([5, 3, 4, 0, 2, 1]))
    state, inputs = source.state_dict(), torch.randn(8, 5)
    expected = source.eval()(inputs)
    if load == "functional":
        assert torch.equal(functional_call(model.eval(), state, (inputs,)), expected)
    elif load == "head":
        model[2].load_state_dict(source[2].state_dict())
        assert_holds(model[2], snapshot(source[2]))
    else:
        model.load_state_dict(state)
        assert torch.equal(model.eval()(inputs), expected)
        features = torch.randn(8, 8)
        embeddings = model[2].embed(features)
        torch.testing.assert_close(model[2].recover_embeddings(model[2](features)), embeddings, atol=1e-5, rtol=0.0)


def test_prototypes_without_their_assignment_are_the_heads_own_or_refused():
    model, own = small(seed=1), snapshot(small())
    others = {"2.bank.prototypes": other_seed()[2].bank.prototypes}
    before = snapshot(model)
    with pytest.raises(BankError, match="and no assignment: entries differ by up to"):
        model.load_state_dict(others, strict=False)
    assert_holds(model, before)
    model.load_state_dict({"2.bank.prototypes": own["2.bank.prototypes"] + 1e-6}, strict=False)


def test_a_bank_loaded_by_itself_takes_the_anchors_along():
    head = small()[2].eval()
    head.bank.load_state_dict(other_seed()[2].bank.state_dict())
    features = torch.randn(8, 8)
    torch.testing.assert_close(head.recover_embeddings(head(features)), head.embed(features), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_in_half_precision_leaves_float32_where_heads_have_it(assign):
    source, model = small(), small(seed=1)
    source[2].assign_(torch.arange(6).flip(0))
    state = {
        name: value.half() if value.is_floating_point() and "bank" not in name else value
        for name, value in source.state_dict().items()
    }
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model[2].assignment, source[2].assignment)
    assert model[2].logit_scale.dtype == torch.float32
    norm = model[2].projection[1]
    assert all(each.dtype == torch.float32 for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    logits = model(torch.randn(4, 5, dtype=model[0].weight.dtype))
    assert logits.dtype == torch.float32
    logits.sum().backward()


def test_the_backbone_of_another_checkpoint_can_be_loaded_without_its_head():
    model, other = small(seed=1), other_dim()
    kept = {name: value for name, value in other.state_dict().items() if not name.startswith("2.")}
    assert model.load_state_dict(kept, strict=False).unexpected_keys == []
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_head_on_the_device_meta_takes_the_bank_that_comes():
    head = small()[2].to("meta")
    source = trained(other_seed()).head
    head.load_state_dict(source.state_dict(), assign=True)
    assert_holds(head, snapshot(source))
    assert not any(buffer.is_meta for buffer in head.buffers())
    assert torch.equal(head.anchors, source.anchors)
    assert torch.equal(head.anchor_inverse, source.anchor_inverse)
    with pytest.raises(BankError, match=r"\(6, 5\)"):
        small()[2].to("meta").load_state_dict(other_dim()[2].state_dict(), assign=True)


def another_bank(like: Tensor) -> Tensor:
    return PrototypeBank(*like.shape, method="random", seed=7).prototypes if like.dim() == 2 else torch.ones_like(like)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    "left_behind",
    [torch.zeros_like, torch.ones_like, another_bank],
    ids=["zeros", "ones", "unit rows"],
)
def test_a_model_made_by_to_empty_takes_the_bank_that_comes(monkeypatch, left_behind, device):
    model, source = small(), other_seed()
    trained(source)
    model.to(device)
    # Memory that was freed may hold anything, prototypes of an earlier bank among it.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like, device: left_behind(like.new_zeros(like.shape, device=device)))
        model.to_empty(device="cpu")
    assert model[2].bank.prototypes.isnan().all()
    model.load_state_dict(source.state_dict())
    assert_holds(model, snapshot(source))
    assert torch.equal(model[2].anchors, source[2].anchors)
    assert torch.equal(model[2].anchor_inverse, source[2].anchor_inverse)


def test_a_backbone_loads_into_a_model_without_values_and_the_head_waits(monkeypatch):
    model, source = small(), small(seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like, device: torch.full_like(like, 99, device=device))
        model.to_empty(device="cpu")
    backbone = {name: value for name, value in source.state_dict().items() if not name.startswith("2.")}
    model.load_state_dict(backbone, strict=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in backbone.items())
    order = torch.arange(6).flip(0)
    model[2].assign_(order)
    assert torch.equal(model[2].assignment, order)
    with pytest.raises(BankError, match="no values to report on"):
        model[2].bank.report()
    model.load_state_dict(source.state_dict())
    assert_holds(model, snapshot(source))


# Assigners


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("make", "momentum", "error", "words"),
    [
        (other_dim, 0.9, ShapeError, r"class_means has shape \(6, 5\), this assigner expects \(6, 4\)"),
        (other_num_classes, 0.9, ShapeError, r"class_means has shape \(7, 4\), this assigner expects \(6, 4\)"),
        (small, None, CheckpointError, r"with momentum=None, this assigner has momentum=0\.9"),
    ],
)
def test_checkpoints_of_another_assigner_are_refused_and_nothing_is_loaded(make, momentum, error, words, strict):
    assigner = trained(small(seed=1))
    before, checkpoint = snapshot(assigner), trained(make(), momentum=momentum).state_dict()
    with pytest.raises(error, match=words):
        assigner.load_state_dict(checkpoint, strict=strict)
    assert_holds(assigner, before)


def test_means_kept_with_a_momentum_do_not_load_where_sums_are_kept():
    assigner = trained(small(), momentum=None)
    before = snapshot(assigner)
    with pytest.raises(CheckpointError, match=r"with a momentum, this assigner has momentum=None"):
        assigner.load_state_dict(trained(small()).state_dict(), strict=False)
    assert_holds(assigner, before)


def test_counts_of_another_number_of_labels_are_refused_before_the_means_are_loaded():
    assigner, checkpoint = trained(small()), trained(small(seed=1)).state_dict()
    before = snapshot(assigner)
    with pytest.raises(ShapeError, match=r"pending_counts has shape \(7,\)"):
        assigner.load_state_dict(checkpoint | {"pending_counts": torch.zeros(7)})
    assert_holds(assigner, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_an_assigner_keeps_its_dtypes_whatever_those_of_the_checkpoint(momentum, dtype, assign):
    model = small()
    assigner, source = trained(model, momentum=momentum), trained(small(seed=1), momentum=momentum)
    dtypes = {name: value.dtype for name, value in assigner.named_buffers()}
    assert dtypes["class_means"] == torch.float32
    checkpoint = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in snapshot(source).items()
    }
    assigner.load_state_dict(checkpoint, assign=assign)
    assert {name: value.dtype for name, value in assigner.named_buffers()} == dtypes
    torch.testing.assert_close(assigner.class_means, checkpoint["class_means"].float())
    assigner.update(model(torch.randn(6, 5)).detach(), torch.arange(6))
    assigner.step()


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("assign", [False, True])
def test_whether_it_is_frozen_loads_from_a_checkpoint_that_says_so_by_a_bool(assign):
    model = small()
    assigner, checkpoint = DynamicAssigner(model), snapshot(DynamicAssigner(model))
    assert checkpoint["frozen"].dtype == torch.int64
    assigner.load_state_dict(checkpoint | {"frozen": torch.tensor(True)}, assign=assign)
    assert assigner.frozen.dtype == torch.int64
    assert assigner.step().solver == "frozen"
    assigner.unfreeze()
    assert assigner.step().solver == "dense"


class Training(nn.Module):
    """A model and what trains it in one module, as Lightning's users write it."""

    def __init__(self, model: nn.Module, momentum: float | None = 0.9) -> None:
        super().__init__()
        self.model = model
        self.criterion = BalancedLoss(DynamicAssigner(model, momentum=momentum))


def other_shape(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    return checkpoint | {name: torch.zeros(9, 9) for name in checkpoint if name.endswith("assigner.class_means")}


def other_momentum(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    sums = {name.replace("means", "sums"): value for name, value in checkpoint.items() if name.endswith(".class_means")}
    return checkpoint | sums


def later_format(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    return checkpoint | {name: value + 1 for name, value in checkpoint.items() if name.endswith("r.format_version")}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel, lambda module: nn.ModuleList([module])])
@pytest.mark.parametrize(
    ("change", "error"), [(other_momentum, CheckpointError), (other_shape, ShapeError), (later_format, CheckpointError)]
)
def test_a_module_with_model_and_criterion_is_refused_before_its_model_is_loaded(change, error, wrap, strict):
    training = wrap(Training(small()))
    before, checkpoint = snapshot(training), change(snapshot(wrap(Training(small(seed=1)))))
    with pytest.raises(error, match=r"criterion\.assigner\."):
        training.load_state_dict(checkpoint, strict=strict)
    assert_holds(training, before)


def test_a_module_with_model_and_criterion_comes_back_exactly():
    source, training = Training(small(seed=1)), Training(small())
    for _ in range(2):
        source.criterion(source.model(torch.randn(6, 5)), torch.arange(6))
    training.load_state_dict(source.state_dict())
    assert_holds(training, snapshot(source))


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_an_assigner_made_by_to_empty_is_as_a_new_one(monkeypatch, device, momentum):
    model = small()
    assigner, new = trained(model, momentum=momentum), DynamicAssigner(small(), momentum=momentum)
    assigner.to(device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like, device: torch.ones(like.shape, dtype=like.dtype, device=device))
        assigner.to_empty(device="cpu")
    for name, value in new.named_buffers():
        assert torch.equal(dict(assigner.named_buffers())[name], value), name
    source = trained(small(seed=1), momentum=momentum)
    assigner.load_state_dict(source.state_dict())
    assert_holds(assigner, snapshot(source))


@pytest.mark.parametrize("bank", ["simplex", "random"])
@pytest.mark.parametrize("assign", [False, True])
def test_an_assigner_of_a_model_on_the_device_meta(assign, bank):
    source = small(dim=8, bank=bank)
    saved = trained(source)
    model = small(dim=8, bank=bank).to("meta")
    assigner = DynamicAssigner(model)
    if not assign:
        model.to_empty(device="cpu")
        assigner.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assigner.load_state_dict(saved.state_dict(), assign=assign)
    assert not any(buffer.is_meta for buffer in assigner.buffers())
    assert_holds(assigner, snapshot(saved))
    batch = torch.randn(6, 5)
    for each, on in ((assigner, model), (saved, source)):
        each.update(on(batch).detach(), torch.arange(6))
    step = assigner.step()
    assert step.equiangular == (bank == "simplex")
    assert step.moved_labels == saved.step().moved_labels
    assert_holds(assigner, snapshot(saved))


def test_an_assigner_made_on_the_device_meta_follows_a_model_that_gets_values_later():
    model = small().to("meta")
    assigner = DynamicAssigner(model)
    with pytest.raises(AssignmentError, match="without values"):
        assigner.step()
    model.load_state_dict(small().state_dict(), assign=True)
    assigner.update(model(torch.randn(6, 5)).detach(), torch.arange(6))
    assert assigner.step().unseen == ()
    assert assigner.class_counts.tolist() == [1] * 6


# The version of the format


def modules() -> list[nn.Module]:
    head = small()[2]
    return [head, DynamicAssigner(head), small()]


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_a_later_format_is_refused_with_both_numbers(module):
    [name] = [name for name in module.state_dict() if name.endswith("format_version")]
    checkpoint = snapshot(module) | {name: torch.tensor(FORMAT_VERSION + 4)}
    with pytest.raises(CheckpointError, match=rf"{name} is {FORMAT_VERSION + 4}.*up to {FORMAT_VERSION}\. Update"):
        copy.deepcopy(module).load_state_dict(checkpoint)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_earlier_formats_load_and_are_of_the_present_one_from_then_on(module, assign):
    [name] = [name for name in module.state_dict() if name.endswith("format_version")]
    for change in ({name: torch.tensor(0)}, {}):
        checkpoint = {key: value for key, value in snapshot(module).items() if key != name} | change
        target = copy.deepcopy(module)
        target.load_state_dict(checkpoint, assign=assign)
        assert int(target.state_dict()[name]) % 2**32 == FORMAT_VERSION
        assert checkpoint.get(name) is change.get(name)  # the caller's dictionary is the caller's


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_carries_the_version(way, tmp_path):
    model, later = small(), small()
    later[2].format_version.fill_(FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=r"2\.format_version"):
        way(later, model, tmp_path)


# How often an assignment was set


def test_the_larger_of_two_counts_in_a_checkpoint_is_taken():
    head, loaded = (HypersphericalHead(6, 5, dim=4) for _ in range(2))
    for _ in range(4):
        head.assign_(head.assignment.roll(1))
    state = head.state_dict()
    assert count_in(state["format_version"]) == int(state["assignment_record"][-1]) == 5
    state["assignment_record"][-1] = 2.0
    loaded.load_state_dict(state)
    assert count_in(loaded.format_version) == 5


def test_counting_begins_anew_where_a_head_has_lost_its_values():
    head, old = (HypersphericalHead(6, 5, dim=4) for _ in range(2))
    for _ in range(4):
        old.assign_(old.assignment.roll(1))
    head.to("meta").to_empty(device="cpu")
    for name in ("assignment", "assignment_record", "format_version"):  # what the memory may have held before
        head.get_buffer(name).copy_(old.get_buffer(name))
    head.assign_(torch.tensor([4, 3, 2, 1, 0]))
    assert count_in(head.format_version) == 1
