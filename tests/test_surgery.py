"""What stands around a layer survives its replacement, and nothing of it that should go stays."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from hyperproto import (
    AlreadyConvertedError,
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    convert_model,
    describe,
    fit_head,
    fit_logit_scale,
    restore_model,
    to_linear,
)


def network(last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8) if last is None else last)


def converted() -> nn.Sequential:
    return convert_model(network(), classifier="2", dim=4)


def clusters(num: int = 320) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num) % 8
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(8, 5, generator=generator)
    return 3.0 * centres[labels] + torch.randn(num, 5, generator=generator), labels


# Hooks

CHANGES = {
    "convert": (network, lambda model: convert_model(model, classifier="2", dim=4)),
    "fold": (converted, to_linear),
    "restore": (converted, restore_model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_run_around_the_new_layer_and_their_handles_remove_them(change):
    build, act = CHANGES[change]
    model, calls = build(), []
    layer = model[2]
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: calls.append("before")),
        layer.register_forward_hook(lambda module, inputs, kwargs, output: calls.append("after"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, into, out: calls.append("back")),
    ]
    act(model)
    assert model[2] is not layer
    model(torch.randn(3, 5)).sum().backward()
    assert calls == ["before", "after", "back"]
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 5)).sum().backward()
    assert len(calls) == 3


def test_torchs_own_weight_hooks_stay_with_the_layer():
    calls = []
    model = network(prune.random_unstructured(nn.Linear(16, 8), "weight", 0.5))
    model[2].register_forward_pre_hook(lambda module, inputs: calls.append(module))
    layer = model[2]
    convert_model(model, classifier="2", dim=4)(torch.randn(3, 5))
    assert calls == [model[2]]
    assert not hasattr(model[2], "weight")
    restore_model(model)(torch.randn(3, 5))
    assert calls[1:] == [layer]


# Memory

BUILDS = {
    "sequential": network,
    "timm": lambda: timm.create_model("test_resnet", num_classes=4),
    "fuse": lambda: timm.create_model("levit_128s", num_classes=4),
}


@pytest.mark.parametrize("name", ["sequential", "timm", pytest.param("fuse", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "copier", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_converted_model_is_freed_when_its_last_name_goes(name, copier):
    def convert() -> nn.Module:
        return convert_model(BUILDS[name](), classifier="2" if name == "sequential" else None)

    gc.collect()
    gc.disable()
    try:
        # In names of their own: an assertion of pytest's keeps what it has evaluated.
        freed = weakref.ref(copier(convert()))() is None
        freed_when_restored = weakref.ref(restore_model(convert()))() is None
        assert freed
        assert freed_when_restored
    finally:
        gc.enable()


# Warm starts from what computes otherwise than nn.Linear


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 8)
        self.update = nn.Parameter(torch.randn(8, 2) @ torch.randn(2, 16))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.update, self.bias)


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor([-1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])[:, None, None]


class CosineLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 20.0 * F.linear(F.normalize(input), F.normalize(self.weight))


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(16, 8))


def loaded(build) -> nn.Module:
    """A layer right after loading, before its hooks have seen what it holds."""
    layer = build()
    state = {key: torch.randn_like(value) if "mask" not in key else value for key, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize(
    "build",
    [
        LowRank,
        lambda: loaded(normed),
        lambda: loaded(lambda: prune.random_unstructured(nn.Linear(16, 8), "weight", 0.5)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)),
    ],
)
def test_a_warm_start_reproduces_what_a_layer_computes(build):
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(0)
    second = build()  # not a copy: neither has run a forward pass, in which the older hooks compute the weight
    model, inputs = network(second), torch.randn(500, 5)
    expected = nn.Sequential(model[0], model[1], first)(inputs).argmax(dim=1)
    convert_model(model, classifier="2", dim=8, warm_start=True)
    assert float((model.eval()(inputs).argmax(dim=1) == expected).float().mean()) > 0.99


def test_a_warm_start_reproduces_what_a_convolution_computes():
    model = nn.Sequential(Doubled(16, 8, 1), nn.Flatten())
    inputs = torch.randn(500, 16, 1, 1)
    expected = model(inputs).argmax(dim=1)
    convert_model(model, classifier="0", dim=8, warm_start=True)
    assert float((model.eval()(inputs).argmax(dim=1) == expected).float().mean()) > 0.99


def test_a_warm_start_calls_no_hook():
    model, calls = network(LowRank()), []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    convert_model(model, classifier="2", dim=8, warm_start=True)
    assert not calls


def test_a_warm_start_from_what_is_not_linear_is_refused():
    model = network(CosineLinear(16, 8, bias=False))
    layer = model[2]
    with pytest.raises(ArgumentError, match=r"CosineLinear.*fit_head"):
        convert_model(model, classifier="2", dim=8, warm_start=True)
    assert model[2] is layer


def test_a_quantised_layer_gets_a_head_of_floats():
    model = network()
    model[2].weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    layer = model[2]
    assert convert_model(model, classifier="2", dim=4)(torch.randn(3, 5)).dtype == torch.float32
    assert restore_model(model)[2] is layer
    assert layer.weight.dtype == torch.int8


# Folding


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_folding_keeps_the_mean_confidence(factor):
    inputs, labels = clusters()
    model = convert_model(nn.Sequential(nn.Linear(5, 8)), classifier="0", dim=7)
    fit_head(model, [(factor * inputs, labels)])
    fit_logit_scale(model, [(factor * inputs, labels)])

    @torch.no_grad()
    def confidence() -> float:
        return float(model.eval()(factor * inputs).softmax(dim=1).amax(dim=1).mean())

    before = confidence()
    to_linear(model)
    assert confidence() == pytest.approx(before, abs=0.05)


# Several tasks


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.age, self.colour = nn.Linear(5, 16), nn.Linear(16, 8), nn.Linear(16, 6)
        self.num_classes = 8

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return self.age(features), self.colour(features)


def test_two_tasks_are_converted_one_by_one_and_come_back_together():
    model = TwoTasks()
    before, parameters = dict(model.named_modules()), sum(each.numel() for each in model.parameters())
    convert_model(model, classifier="age", dim=4)
    convert_model(model, classifier="colour", dim=3, bank="separated")
    assert [output.shape for output in model(torch.randn(2, 5))] == [(2, 8), (2, 6)]
    assert model.num_classes == 8
    text = describe(model)
    assert all(
        words in text for words in ("age: was Linear 16 -> 8", "colour: was Linear 16 -> 6", f"{parameters:,} b")
    )
    for name in (None, "age", "colour"):
        with pytest.raises(AlreadyConvertedError, match="second task"):
            convert_model(model, classifier=name)
    twin = copy.deepcopy(model)
    assert dict(restore_model(model).named_modules()) == before
    assert type(restore_model(twin).colour) is nn.Linear


def test_restoring_one_task_retires_no_head_put_in_by_hand():
    model = TwoTasks()
    model.colour = HypersphericalHead(16, 6)
    criterion = BalancedLoss(model.colour)
    restore_model(convert_model(model, classifier="age", dim=4))
    criterion(model(torch.randn(2, 5))[1], torch.tensor([0, 1]))


# What is done to a model by hand afterwards


def test_a_layer_put_in_the_heads_place_by_hand_is_noticed():
    model = converted()
    assigner = DynamicAssigner(model)
    criteria, head = [BalancedLoss(assigner), BalancedLoss(model)], model[2]
    inputs, labels = clusters(16)
    model[2] = nn.Linear(16, 8)
    for criterion in criteria:
        with pytest.raises(HeadNotFoundError, match="Put the head back"):
            criterion(model(inputs), labels)
    model[2] = nn.Sequential(nn.Dropout(), head)
    for criterion in criteria:
        criterion(model(inputs), labels)
    model.insert(0, nn.Identity())
    for criterion in criteria:
        criterion(model(inputs), labels)
    model[3] = nn.Identity()  # a backbone, and the head behind it
    for criterion in criteria:
        criterion(head(model(inputs)), labels)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_a_head_are_used_apart_from_its_model(copier):
    head = copier(converted()[2])
    BalancedLoss(head)(head(torch.randn(2, 16)), torch.tensor([0, 1]))
