"""Converted models inside of what people wrap models with, on two ranks (gloo on the CPU)."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from compatible import SYNC_BUFFERS, needs
from ranks import run_on_ranks
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    PrototypeCrossEntropyLoss,
    convert_model,
    get_heads,
)

NUM_CLASSES, DIM, WIDTH, BATCH_SIZE, EPOCHS, BATCHES = 6, 4, 8, 16, 3, 4


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, NUM_CLASSES))


def make_model(**options: str) -> nn.Module:
    return convert_model(plain_model(), classifier="2", **({"dim": DIM, "projection": "linear"} | options))


def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Points around one centre a class."""
    centres = torch.randn(NUM_CLASSES, WIDTH, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        yield centres[labels] + 0.3 * torch.randn(BATCH_SIZE, WIDTH, generator=generator), labels


def shard(model: nn.Module, **options: object) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **options)


def shard_every_layer(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2]):
        shard(layer)
    return shard(model)


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP, accumulating": DistributedDataParallel,
    "DDP, own buffers": lambda model: DistributedDataParallel(model, **{SYNC_BUFFERS: False}),
    "fully_shard": shard,
    "fully_shard, every layer": shard_every_layer,
    "DDP of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="eager", fullgraph=True)),
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


on_the_cpu = needs("fully_shard on a CPU", torch="2.11")


def wrapped(name: str) -> object:
    """The name as a parameter, skipped where this torch cannot wrap so."""
    return pytest.param(name, marks=on_the_cpu if "fully_shard" in name else ())


def train(rank: int, world_size: int, wrap: str, options: dict[str, str]) -> dict:
    """The documented loop; every rank takes every world_size-th sample of each batch."""
    model = make_model(**options)
    wrapped = WRAP[wrap](model)
    assigner = DynamicAssigner(wrapped, momentum=None)
    assert assigner.head is DynamicAssigner(model).head
    criterion = BalancedLoss(assigner)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    moved = []
    for epoch in range(EPOCHS):
        for features, labels in batches(epoch):
            own = features[rank::world_size], labels[rank::world_size]
            parts = zip(*(tensor.chunk(2) for tensor in own), strict=True) if "accumulating" in wrap else [own]
            for number, (inputs, target) in enumerate(parts):
                waits = "accumulating" in wrap and number == 0
                with wrapped.no_sync() if waits else contextlib.nullcontext():
                    (criterion(wrapped(inputs), target) * len(target) / len(own[1])).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(assigner.step().moved_labels)
    state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    return {"model": state, "assigner": assigner.state_dict(), "moved": moved}


@functools.cache
def train_alone(training_output: str) -> dict:
    [result] = run_on_ranks(train, 1, 1, "nothing", {"training_output": training_output})
    return result


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("wrap", [wrapped(name) for name in WRAP if name != "nothing"])
def test_two_ranks_train_what_one_process_trains(wrap, training_output):
    options = {"training_output": training_output}
    alone = train_alone(training_output)
    first, second = run_on_ranks(train, 2, 2, wrap, options)
    assert first["moved"] == second["moved"] == alone["moved"]
    assert first["moved"][0]
    for name, value in first["assigner"].items():
        assert torch.equal(value, second["assigner"][name]), name
    for part in ("model", "assigner"):
        for name, expected in alone[part].items():
            torch.testing.assert_close(first[part][name], expected, atol=1e-5, rtol=0, msg=name)
    make_model(**options).load_state_dict(first["model"])  # what a wrapped model saves is for bare ones too


def train_with_batch_norm(rank: int, wrap: str) -> dict:
    return train(rank, 2, wrap, {"projection": "linear+bn"})


@pytest.mark.parametrize("wrap", [wrapped(name) for name in ("DDP", "DDP, own buffers", "fully_shard, every layer")])
def test_batch_norm_in_the_projection(wrap):
    first, second = run_on_ranks(train_with_batch_norm, 2, wrap)
    assert first["moved"] == second["moved"]
    for name in ("class_means", "class_counts"):
        assert torch.equal(first["assigner"][name], second["assigner"][name])
    for name in ("2.assignment", "2.projection.0.weight", "2.projection.1.weight"):
        assert torch.equal(first["model"][name], second["model"][name])


def forward_in_bfloat16(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = make_model(projection="linear+bn")
    sharded = shard(copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    features, labels = next(batches(rank))
    criterion = BalancedLoss(DynamicAssigner(sharded))
    logits = sharded(features)
    criterion(logits, labels).backward()
    assert all(torch.isfinite(parameter.grad.full_tensor()).all() for parameter in sharded.parameters())
    return logits.detach(), model(features).detach()


@on_the_cpu
def test_mixed_precision_of_fully_shard():
    for logits, expected in run_on_ranks(forward_in_bfloat16, 2):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=0.2, rtol=0)  # 8 bits of mantissa, logits up to 10


def train_uneven(rank: int) -> torch.Tensor:
    wrapped = DistributedDataParallel(make_model())
    assigner = DynamicAssigner(wrapped)
    criterion = BalancedLoss(assigner)
    with wrapped.join():
        for features, labels in list(batches(0))[: 3 - 2 * rank]:
            criterion(wrapped(features), labels).backward()
    assigner.step()
    return assigner.class_counts


def test_ranks_with_different_numbers_of_batches():
    first, second = run_on_ranks(train_uneven, 2)
    assert torch.equal(first, second)
    assert float(first.sum()) == (3 + 1) * BATCH_SIZE


# Compiled


#: DistributedDataParallel breaks the graph itself before it calls the model (which torch 2.6 words by the kind of
#: call), and logs its own running time.
DDP_BREAKS = ("_inside_ddp_forward", "UserDefinedObjectVariable(instancemethod) __call__", "set_runtime_stats_and_log")


def compile_and_step(rank: int, outside: bool, backend: str, autocast: bool) -> list[float]:
    """An epoch, an assignment step that moves labels, and an epoch that must not compile again."""
    torch.compiler.reset()
    model = make_model()
    if outside:
        wrapped = torch.compile(DistributedDataParallel(model), backend=backend)
    else:
        wrapped = DistributedDataParallel(torch.compile(model, backend=backend, fullgraph=True))
    assigner = DynamicAssigner(wrapped)
    criterion = BalancedLoss(assigner)
    compute = torch.compile(criterion, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    losses = []
    for epoch in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            for features, labels in batches(2 * epoch + rank):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = compute(wrapped(features), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert assigner.step().changed > 0 or epoch == 1
    assert not [reason for reason in counters["graph_break"] if not any(part in reason for part in DDP_BREAKS)]
    assert float(assigner.class_counts.sum()) == 2 * 2 * BATCHES * BATCH_SIZE
    return losses


@pytest.mark.parametrize("outside", [False, True], ids=["DDP of compiled", "compiled DDP"])
def test_an_assignment_step_does_not_recompile(outside):
    run_on_ranks(compile_and_step, 2, outside, "eager", False)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("outside", [False, True], ids=["DDP of compiled", "compiled DDP"])
def test_compiled_by_inductor_on_two_ranks(outside, autocast):
    compiled = run_on_ranks(compile_and_step, 2, outside, "inductor", autocast, seconds=300)
    eager = run_on_ranks(compile_and_step, 2, outside, "eager", autocast)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), atol=0.02 if autocast else 1e-5, rtol=0)


# Convert first, then wrap


def refuse_to_convert(rank: int) -> list[tuple[str, str]]:
    messages = []
    for name, wrap in {
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
        "torch.compile": lambda model: torch.compile(model, backend="eager"),
        "DataParallel": nn.DataParallel,
    }.items():
        wrapped = wrap(plain_model())
        before = dict(wrapped.named_modules())
        inner = next(key for key, module in before.items() if isinstance(module, nn.Linear) and key.endswith("2"))
        for model, classifier in ((wrapped, None), (wrapped, inner), (nn.Sequential(wrapped), f"0.{inner}")):
            with pytest.raises(HeadNotFoundError) as failure:
                convert_model(model, classifier=classifier)
            messages.append((name, str(failure.value)))
        assert dict(wrapped.named_modules()) == before
        wrap(make_model())(torch.randn(4, WIDTH)).sum().backward()  # as the message says
    return messages


@on_the_cpu
def test_a_wrapped_model_is_refused_and_the_advice_works():
    [messages] = run_on_ranks(refuse_to_convert, 1)
    assert len(messages) == 12
    for wrap, message in messages:
        assert f"convert_model(model, ...), then {wrap}(model, ...)" in message


def convert_beside_a_wrapper(rank: int) -> list[str]:
    model = nn.Sequential(DistributedDataParallel(nn.Linear(WIDTH, 12)), nn.Linear(12, NUM_CLASSES))
    return list(get_heads(convert_model(model, classifier="1")))


def test_a_classifier_beside_a_wrapped_backbone_converts():
    assert run_on_ranks(convert_beside_a_wrapper, 1) == [["1"]]


# SyncBatchNorm. Without a process group it computes on the CPU what it computes on one GPU.


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)], ids=str)
def test_synchronised_batch_norm_keeps_the_head_what_it_was(shape):
    head = HypersphericalHead(8, NUM_CLASSES, dim=DIM, projection="linear+bn")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
    assert isinstance(synchronised.projection[1], nn.SyncBatchNorm)
    for training in (True, False):
        features = torch.randn(*shape, 8)
        expected = head.train(training)(features)
        assert torch.equal(synchronised.train(training)(features), expected)
    for name, value in head.state_dict().items():
        assert torch.equal(synchronised.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_synchronised_batch_norm_stays_float32(dtype):
    head = nn.SyncBatchNorm.convert_sync_batchnorm(HypersphericalHead(8, NUM_CLASSES, dim=DIM, projection="linear+bn"))
    linear, batch_norm = head.projection
    batch_norm.running_mean.fill_(1.0 / 3.0)
    head.to(dtype)
    assert linear.weight.dtype == dtype
    assert {tensor.dtype for tensor in (*batch_norm.parameters(), batch_norm.running_mean)} == {torch.float32}
    assert (batch_norm.running_mean == torch.tensor(1.0 / 3.0)).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_batch_norm_forgets_a_batch_that_is_not_finite(value, momentum):
    head = nn.SyncBatchNorm.convert_sync_batchnorm(HypersphericalHead(8, NUM_CLASSES, dim=DIM, projection="linear+bn"))
    batch_norm, features = head.projection[1], torch.randn(3, 5, 8)
    batch_norm.momentum = momentum
    twin, buffers = copy.deepcopy(head), dict(batch_norm.named_buffers())
    features[1, 2, 3] = value
    for rows in features:
        head(rows).sum().backward()
    for rows in (features[0], features[2]):
        twin(rows)
    assert all(buffers[name] is buffer for name, buffer in batch_norm.named_buffers())
    for name, buffer in twin.projection[1].named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert head.eval()(features[0]).isfinite().all()


def test_synchronised_batch_norm_without_running_statistics_of_its_own():
    features = torch.randn(5, 8)
    for change in ({"track_running_stats": False}, {"running_mean": None, "running_var": None}):
        head = HypersphericalHead(8, NUM_CLASSES, dim=DIM, projection="linear+bn")
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
        for model in (head, twin):
            for name, value in change.items():
                setattr(model.projection[1], name, value)
            model(features)
        assert torch.equal(twin(features), head(features))
        for name in {"running_mean", "running_var"} - change.keys():
            assert torch.equal(getattr(twin.projection[1], name), getattr(head.projection[1], name)), name


def test_synchronised_batch_norm_behind_a_convolution():
    torch.manual_seed(0)
    model = timm.create_model(
        "resnetv2_18", num_classes=NUM_CLASSES, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=16
    )
    convert_model(model, dim=DIM)
    synchronised = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.testing.assert_close(synchronised(images), model(images))
    PrototypeCrossEntropyLoss(DynamicAssigner(synchronised))(synchronised(images), labels).backward()
