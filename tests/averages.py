"""Ways to average weights, by what they do to integers and to floats."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Timm(nn.Module):
    """timm's average under the names of torch's."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.ema = ModelEmaV3(model, decay=0.9, **options)

    def update_parameters(self, model: nn.Module) -> None:
        self.ema.update(model)

    @property
    def module(self) -> nn.Module:
        return self.ema.module


def lerp(old: Tensor, new: Tensor, decay: float) -> Tensor:
    return decay * old + (1.0 - decay) * new


def over_buffers(decay: float) -> Callable[[nn.Module], nn.Module]:
    return lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


class TimmV2(nn.Module):
    """timm's older average, of all entries."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.ema = ModelEmaV2(model, decay=decay)
        self.module, self.update_parameters = self.ema.module, self.ema.update


class Loop(nn.Module):
    """A loop of one's own over some entries of the state, in place, as ultralytics and many teachers have it."""

    def __init__(self, model: nn.Module, decay: float, keep: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.module, self.decay, self.keep = copy.deepcopy(model), decay, keep

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for own, new in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if self.keep(own):
                own.copy_(lerp(own, new, self.decay))


class EmaPytorch(nn.Module):
    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        ema_pytorch = pytest.importorskip("ema_pytorch", reason="needs ema-pytorch")
        self.ema = ema_pytorch.EMA(model, beta=decay, update_after_step=0, update_every=1, allow_different_devices=True)

    def update_parameters(self, model: nn.Module) -> None:
        self.ema.update()

    @property
    def module(self) -> nn.Module:
        return self.ema.ema_model


class Ignite(nn.Module):
    def __init__(self, model: nn.Module, decay: float, handle_buffers: str) -> None:
        super().__init__()
        handlers = pytest.importorskip("ignite.handlers", reason="needs pytorch-ignite")
        engine = pytest.importorskip("ignite.engine", reason="needs pytorch-ignite")
        self.handler = handlers.EMAHandler(model, momentum=1.0 - decay, handle_buffers=handle_buffers)
        self.engine, self.event = engine.Engine(lambda *_: None), engine.Events.ITERATION_COMPLETED
        self.handler.attach(self.engine)

    def update_parameters(self, model: nn.Module) -> None:
        self.engine.fire_event(self.event)

    @property
    def module(self) -> nn.Module:
        return self.handler.ema_model.train(self.training)


class OfFiles(nn.Module):
    """The mean of the states so far in float64, stored as it is stored by who made it, and loaded."""

    def __init__(self, model: nn.Module, cast: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.states, self.cast = copy.deepcopy(model), [copy.deepcopy(model.state_dict())], cast

    def update_parameters(self, model: nn.Module) -> None:
        self.states.append(copy.deepcopy(model.state_dict()))
        mean = {key: sum(each[key].double() for each in self.states) / len(self.states) for key in self.states[0]}
        self.module.load_state_dict({key: self.cast(value, self.states[0][key]) for key, value in mean.items()})


NEWEST = {
    "ModelEmaV3": Timm,
    "AveragedModel": AveragedModel,
    "ignite, copy": lambda model: Ignite(model, 0.9, "copy"),
    "ignite, update": lambda model: Ignite(model, 0.9, "update"),
}
RAISES: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{f"over buffers, {decay}": over_buffers(decay) for decay in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99998)},
    "over buffers, mean": lambda model: AveragedModel(model, use_buffers=True),
    "torchvision": lambda model: AveragedModel(model, None, lambda a, b, _: lerp(a, b, 0.99977), use_buffers=True),
    **{f"ModelEmaV2, {decay}": (lambda model, decay=decay: TimmV2(model, decay)) for decay in (0.9, 0.9999)},
    "ema-pytorch": lambda model: EmaPytorch(model, 0.9),
    "floats, 0.5": lambda model: Loop(model, 0.5, Tensor.is_floating_point),
    "floats, 0.9999": lambda model: Loop(model, 0.9999, Tensor.is_floating_point),
    "all entries": lambda model: Loop(model, 0.9, lambda _: True),
    "files, as float32": lambda model: OfFiles(model, lambda value, _: value.float()),
    "files, as they were": lambda model: OfFiles(model, lambda value, like: value.to(like.dtype)),
}
