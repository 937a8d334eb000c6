"""`hp_<name>` for every name in the registries of timm and torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from functools import wraps
from typing import Any

import timm.models
import torchvision.models
from torch import Tensor, nn

from hyperproto.arguments import positive_number
from hyperproto.bank import PrototypeBank
from hyperproto.conversion.convert import convert_model
from hyperproto.conversion.stored import head_names
from hyperproto.conversion.structures import CONVERTED
from hyperproto.errors import CheckpointError
from hyperproto.heads import get_heads
from hyperproto.projection import Projection

Build = Callable[..., nn.Module]


def know_names() -> None:
    """Let timm and torchvision build and list `hp_<name>`."""
    registry, api = timm.models._registry, torchvision.models._api
    registry._model_entrypoints = Registry(registry._model_entrypoints, _timm_builder)
    # What a script asks before it builds: input size, normalisation.
    registry._model_pretrained_cfgs = Registry(registry._model_pretrained_cfgs, lambda name, config: config)
    api.BUILTIN_MODELS = Registry(api.BUILTIN_MODELS, _torchvision_builder)
    of_timm: tuple[Any, ...] = (timm, timm.models, registry)
    for module in of_timm:
        module.list_models = _listing_converted(module.list_models, "filter", "exclude_filters")
    for module in (torchvision.models, api):
        module.list_models = _listing_converted(module.list_models, "include", "exclude")


class Registry(dict[str, Any]):
    """The entries of a registry, and under `hp_<name>` what is made of each, which is in no list of them.

    Args:
        entries: by name.
        make: of a name and its entry what the converted name stands for.
    """

    def __init__(self, entries: Mapping[str, Any], make: Callable[[str, Any], Any]) -> None:
        super().__init__(entries)
        self._make = make

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self._plain(name) is not None)

    def __missing__(self, name: str) -> Any:
        plain = self._plain(name)
        if plain is None:
            raise KeyError(name)
        return self._make(plain, self[plain])

    def _plain(self, name: str) -> str | None:
        plain = name.removeprefix(CONVERTED)
        return plain if plain != name and super().__contains__(plain) else None


def _timm_builder(name: str, build: Build) -> Build:
    def converted(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        *,
        hp_dim: int | None = None,
        hp_bank: str | PrototypeBank = "auto",
        hp_projection: Projection = "auto",
        hp_logit_scale: float | None = None,
        **options: Any,
    ) -> nn.Module:
        with_head = not options.get("features_only") and options.get("num_classes") != 0
        of_converted = _is_of_converted(pretrained_cfg)
        if of_converted:
            pretrained_cfg = {**pretrained_cfg, "architecture": name}
        load_first = pretrained and not (of_converted and with_head)
        model: Any = build(pretrained=load_first, pretrained_cfg=pretrained_cfg, **options)
        if not with_head or model.num_classes == 0:
            return model
        config = dict(model.pretrained_cfg)

        def convert(state: Mapping[str, Tensor] | None = None) -> None:
            if state is None:
                _convert(model, hp_logit_scale, dim=hp_dim, bank=hp_bank, projection=hp_projection)
            else:
                convert_model(model, like=state)

        def convert_for(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
            heads = tuple(f"{name}." for name in head_names(state))
            if not heads:
                raise CheckpointError(
                    f"expected the weights of a converted {name}, as its configuration says, got some without a head. "
                    f"Create {name} with them, and convert it afterwards."
                )
            if model.num_classes == config["num_classes"]:
                convert(state)
                return state
            convert()  # for other classes: a fresh head on the backbone of the stored model
            return {key: value for key, value in state.items() if not key.startswith(heads)}

        if pretrained and of_converted:
            timm.models.load_pretrained(
                model,
                config,
                num_classes=model.num_classes,
                in_chans=options.get("in_chans", 3),
                filter_fn=convert_for,
                cache_dir=options.get("cache_dir"),
            )
        else:
            convert()
        return model

    converted.__name__ = converted.__qualname__ = CONVERTED + name
    return converted


def _torchvision_builder(name: str, build: Build) -> Build:
    @wraps(build)  # with its signature, which says what weights there are
    def converted(
        *,
        hp_dim: int | None = None,
        hp_bank: str | PrototypeBank = "auto",
        hp_projection: Projection = "auto",
        hp_logit_scale: float | None = None,
        **options: Any,
    ) -> nn.Module:
        model = build(**options)
        _convert(model, hp_logit_scale, dim=hp_dim, bank=hp_bank, projection=hp_projection)
        return model

    converted.__name__ = converted.__qualname__ = CONVERTED + name
    return converted


def _convert(model: nn.Module, logit_scale: float | None, **options: Any) -> None:
    scale = None if logit_scale is None else positive_number(logit_scale, "hp_logit_scale")
    convert_model(model, **options)
    if scale is not None:
        for head in get_heads(model).values():
            head.initial_logit_scale = scale
            head.logit_scale.fill_(scale)


def _is_of_converted(pretrained_cfg: Any) -> bool:
    """Whether a configuration is that of a converted model's own weights, as `save_for_hf` writes it.

    timm takes the architecture out of it, and puts the name by which the model is built in its place.
    """
    if not isinstance(pretrained_cfg, Mapping):
        return False
    return (pretrained_cfg.get("architecture") or CONVERTED).startswith(CONVERTED)


def _listing_converted(plain: Callable[..., list[str]], include: str, exclude: str) -> Callable[..., list[str]]:
    """A function that lists names, with those of converted models where a filter begins with "hp_"."""
    signature = inspect.signature(plain)

    @wraps(plain)
    def list_models(*args: Any, **kwargs: Any) -> list[str]:
        arguments = signature.bind(*args, **kwargs).arguments
        filters, unwanted = (_strings(arguments.get(name)) for name in (include, exclude))
        own = [each for each in filters if each.startswith(CONVERTED)]
        if not own:
            return plain(*args, **kwargs)
        others = [each for each in filters if each not in own]
        found = plain(**(arguments | {include: others})) if others else []
        arguments.pop(exclude, None)
        names = plain(**(arguments | {include: [each.removeprefix(CONVERTED) for each in own]}))
        converted = [CONVERTED + name for name in names]
        return found + [name for name in converted if not any(_matches(name, each) for each in unwanted)]

    return list_models


def _matches(name: str, pattern: str) -> bool:
    """Whether a filter fits a name, or what stands before its tag, as it does in timm."""
    return fnmatch(name, pattern) or fnmatch(name.partition(".")[0], pattern)


def _strings(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value or ())
