"""A device without float64, as Apple's GPUs are: nothing on the model's own device is ever of that type.

The device is played on the CPU: account is kept of the memory that is said to lie on it. What an operation makes of a
tensor there lies there too, and only a move to the CPU, a list or a number leaves it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from compatible import in_front
from losses import LOSSES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hyperproto import (
    DynamicAssigner,
    HypersphericalHead,
    PrototypeBank,
    compress_head,
    convert_model,
    describe,
    fit_head,
    fit_logit_scale,
    get_heads,
    refit_head,
    restore_model,
    to_linear,
)

DEVICE = torch.device("mps")
NUM_CLASSES, WIDTH = 6, 8


class DeviceWithoutFloat64(TorchFunctionMode):
    """Lets operations run on the CPU, keeps account of what lies on the device, and refuses float64 there."""

    def __init__(self) -> None:
        super().__init__()
        # Memory on the device, by address, which the reference keeps from being used again.
        self.memory: dict[int, StorageWeakRef] = {}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch._C._nn._parse_to:  # arguments of nn.Module.to, which calls Tensor.to with them
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(self.holds(tensor) for tensor in tensors)
        if function == Tensor.device.__get__:
            return DEVICE if on_device else function(*args)
        if function is Tensor.numpy and on_device:
            raise TypeError("a tensor on a device has no array: move it to the CPU first")
        target = torch.device("cpu") if function is Tensor.cpu else self._target(function, args, kwargs)
        if target is not None:
            on_device = target.type == DEVICE.type
            args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, torch.Size):
            return result
        given = {address_of(tensor) for tensor in tensors}

        def place(tensor: Tensor) -> Tensor:
            if target is not None and self.holds(tensor) != on_device and address_of(tensor) in given:
                tensor = tensor.clone()  # a move
                given.discard(address_of(tensor))
            if on_device and address_of(tensor) not in given:
                self.memory[address_of(tensor)] = StorageWeakRef(tensor.untyped_storage())
            if self.holds(tensor) and tensor.dtype == torch.float64:
                raise TypeError("the device has no float64")
            return tensor

        return tree_map_only(Tensor, place, result)

    def holds(self, tensor: Tensor) -> bool:
        return address_of(tensor) in self.memory

    @staticmethod
    def _target(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        """The device that the call names."""
        for each in (kwargs.get("device"), *(args[1:] if function is Tensor.to else ())):
            if isinstance(each, torch.device):
                return each
            if isinstance(each, str):
                return torch.device(each)
        return None


def address_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DeviceWithoutFloat64():
        yield


def plain() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, NUM_CLASSES))
    return model.to(DEVICE)


def converted(**options: object) -> nn.Module:
    return convert_model(plain(), classifier="3", **({"dim": 4} | options))


def loader() -> list[tuple[Tensor, Tensor]]:
    """On the CPU, where loaders are."""
    labels = torch.arange(60) % NUM_CLASSES
    inputs = torch.randn(NUM_CLASSES, 5)[labels] + 0.3 * torch.randn(60, 5)
    return list(zip(inputs.split(20), labels.split(20), strict=True))


def assert_on_device(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device == DEVICE, name


def test_the_device_that_is_played_has_no_float64():
    there = torch.ones(3).to(DEVICE)
    assert there.device == (there + 1).device == torch.zeros(2, device=DEVICE).device == DEVICE
    assert there.cpu().double().device == there.to("cpu").double().device == torch.device("cpu")
    for use in (
        there.double,
        lambda: there.to(torch.float64),
        lambda: torch.add(there, torch.ones(3, dtype=torch.float64)),
        lambda: torch.ones(3, dtype=torch.float64).to(there.device),
        lambda: torch.zeros(3, dtype=torch.float64, device=DEVICE),
        lambda: there.sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="no float64"):
            use()


@pytest.mark.parametrize("options", [{}, {"warm_start": True}, {"projection": "none", "dim": WIDTH}], ids=str)
@pytest.mark.parametrize("bank", ["auto", "separated", "uniform"])
def test_models_in_and_out(options, bank):
    model = converted(bank=bank, **options)
    assert_on_device(model)
    describe(model)
    restore_model(model)
    assert_on_device(model)


@pytest.mark.parametrize(
    ("loss", "momentum", "soft", "training_output"),
    in_front(
        product(LOSSES, [0.9, None], [False, True], ["logits", "embedding"]),
        *((loss, 0.9, False, "logits") for loss in LOSSES),
        *((loss, None, True, "embedding") for loss in LOSSES),
        *((loss, 0.9, True, "logits") for loss in LOSSES),
    ),
)
def test_training(loss, momentum, soft, training_output):
    model = converted(training_output=training_output)
    assigner = DynamicAssigner(model, momentum=momentum)
    criterion = LOSSES[loss](assigner).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for inputs, labels in loader():
            target = nn.functional.one_hot(labels, NUM_CLASSES).float() * 0.7 + 0.05 if soft else labels
            loss = criterion(model(inputs.to(DEVICE)), target.to(DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assigner.step()
    for module in (model, assigner, criterion):
        assert_on_device(module)
    assert loss.device == DEVICE


@pytest.mark.parametrize("momentum", [0.9, None])
def test_counts_go_there_and_come_back(momentum):
    model = converted()
    assigner = DynamicAssigner(model.cpu(), momentum=momentum)
    widest = assigner.class_counts.dtype
    assert widest == torch.float64
    features, labels = loader()[0]
    for turn, device in enumerate([DEVICE, torch.device("cpu"), DEVICE], start=1):
        model.to(device)
        assigner.update(model(features.to(device)).detach(), labels.to(device))
        assert assigner.class_counts.dtype == (torch.float32 if device == DEVICE else widest)
        assert float(assigner.class_counts.sum()) == float(assigner.pending_counts.sum()) == turn * len(labels)
        assigner.half()
        state = {name: value.cpu() for name, value in assigner.state_dict().items()}
        assigner.load_state_dict(state)
    assigner.step()
    assert float(assigner.combined_counts.sum()) == 3 * len(labels)


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
@pytest.mark.parametrize(
    "fit",
    [fit_head, partial(refit_head, iterations=3), fit_logit_scale],
    ids=["fit_head", "refit_head", "fit_logit_scale"],
)
def test_fits(fit, projection):
    model = converted(projection=projection, dim=5)
    fit(model, loader())
    assert_on_device(model)


def test_compression():
    model = converted(dim=5)
    compress_head(model, loader(), dim=3, iterations=3)
    assert_on_device(model)


def test_evaluation():
    model = converted().eval()
    [head] = get_heads(model).values()
    for bank in (head.bank, PrototypeBank(NUM_CLASSES, 4, method="random").to(DEVICE)):
        bank.report()
    embeddings = head.embed(torch.randn(3, WIDTH).to(DEVICE))
    cosines, labels = head.topk(embeddings, 2)
    recovered = head.recover_embeddings(model(torch.randn(3, 5).to(DEVICE)))
    assert all(tensor.device == DEVICE for tensor in (embeddings, cosines, labels, recovered))
    head.assign_(torch.randperm(NUM_CLASSES))
    to_linear(model)
    assert_on_device(model)


def test_banks_of_class_vectors():
    vectors = torch.randn(NUM_CLASSES, 7).to(DEVICE)
    bank = PrototypeBank.from_class_vectors(vectors, 4)
    HypersphericalHead(WIDTH, NUM_CLASSES, bank=bank).to(DEVICE)
    PrototypeBank.from_tensor(vectors)
