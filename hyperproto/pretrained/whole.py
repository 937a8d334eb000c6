"""A converted model in a folder, with all that it takes to have it back in another process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperproto.affine import known_layers
from hyperproto.class_names import check_number_of_names, read_class_names
from hyperproto.constructions import CONSTRUCTIONS
from hyperproto.conversion.record import get_record
from hyperproto.conversion.stored import State, head_names, read_state
from hyperproto.conversion.structures import CONVERTED
from hyperproto.errors import ArgumentError, CheckpointError
from hyperproto.fitting.report import HeadFit
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads
from hyperproto.pretrained.card import model_card
from hyperproto.pretrained.config import DTYPES, Config, dtype_of, normalisation_of, read_config
from hyperproto.pretrained.load import convert_and_load
from hyperproto.projection import has_layers
from hyperproto.telling import tell

WEIGHTS = "model.safetensors"

#: What may have made a bank.
METHODS = (*CONSTRUCTIONS, "given", "class vectors")

#: Attributes of modules that say how they compute and that nobody's arguments set later.
SIMPLE = (bool, int, float, str, type(None))

#: Attributes of timm's models that change while they are used and not what they compute.
IN_USE = ("training", "grad_checkpointing", "num_classes")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    normalisation: Mapping[str, Any] | None = None,
    fits: Iterable[HeadFit] = (),
) -> None:
    """Write a converted model into a folder: weights, what builds it again, and a card; `load_pretrained` reads it.

    `model.safetensors` has the `state_dict`. `config.json` has the architecture, what the heads were converted with,
    the names of the classes and how images are normalised. `README.md` is a card for people: `describe`, the bank's
    report, the scale and what has fitted the heads.

    A timm model is built again by its name alone, which is tried here: one that was made with further arguments
    (another size of images, another pooling) is told (`HyperprotoWarning`), and saved as one that a factory makes.

    Args:
        model: as `convert_model` returned it, not wrapped.
        folder: made where there is none; its files of these names are replaced.
        normalisation: of the images that the model was trained with: some of mean, std, input_size, interpolation,
            crop_pct, crop_mode. By default that of the timm model's own configuration.
        fits: what `fit_head`, `refit_head` or `compress_head` returned, for the card.

    Raises:
        HeadNotFoundError: it was not converted, or it is wrapped.
        ArgumentError: layers in several dtypes, an unknown kind of normalisation, or no values (device meta).
        ImportError: safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> from hyperproto import convert_model
        >>> model = convert_model(nn.Sequential(nn.Linear(16, 2)), dim=2, classifier="0", class_names=["cat", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     load_pretrained(folder, factory=lambda: nn.Sequential(nn.Linear(16, 2)))[0].class_names
        ('cat', 'dog')
    """
    from safetensors.torch import save_file

    get_record(model, "save_pretrained")
    if any(each.is_meta for each in model.state_dict().values()):
        raise ArgumentError("expected a model with values, got one on the device meta. Load its weights first.")
    heads = get_heads(model)
    names = {head.class_names for head in heads.values()}
    several = len(names) > 1
    config = Config(
        architecture=_architecture(model),
        num_classes=next(iter(heads.values())).num_classes,
        class_names=None if several else _listed(names.pop()),
        normalisation=normalisation_of(model, normalisation),
        dtype=dtype_of(model),
        heads={name: _made_of(head, several=several) for name, head in heads.items()},
        hyperproto=_version(),
    )
    card = model_card(model, config, fits)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # Beside the last one and then in its place: a crash leaves no half a file where a whole one was.
    save_file(_each_once(state), folder / f"{WEIGHTS}.new", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.new", folder / WEIGHTS)
    config.write(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_pretrained(folder: str | os.PathLike[str], factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote into a folder, on the CPU and in eval mode: the same logits, bit for bit.

    Nothing of the folder is run: weights are read by safetensors, and the architecture is a name that timm has.

    Args:
        folder: with `config.json` and `model.safetensors`.
        factory: makes the plain model, as it was before it was converted, for models that timm's names do not make.

    Raises:
        CheckpointError: the folder has no such files, or they do not belong together or to this model; the model needs
            a factory; timm has no model of that name.

    Examples:
        See `save_pretrained`.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"expected {WEIGHTS} beside the configuration in {folder.name!r}, got none. Save anew.")
    state = read_state(folder / WEIGHTS)
    sizes = {name: len(value) for name, value in state.items() if name.endswith(".assignment")}
    if config.num_classes not in sizes.values():
        raise CheckpointError(
            f"the configuration in {folder.name!r} has {config.num_classes} classes, and the weights beside it have "
            f"heads of {sorted(set(sizes.values()))}. They are of two models: save anew."
        )
    model = _by_name(config, state) if factory is None else factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"expected factory() to return a plain model (torch.nn.Module), got {type(model).__name__}."
        )
    model.to(DTYPES[config.dtype])
    convert_and_load(model, state, training_output=config.training_output, class_names=config.class_names)
    for name, head in get_heads(model).items():
        made_of = config.heads.get(name, {})
        if made_of.get("bank") in METHODS:
            head.bank.method = made_of["bank"]
        if "class_names" in made_of:
            head.class_names = read_class_names(made_of["class_names"])
            check_number_of_names(head.class_names, head.num_classes)
    return model.eval()


def _by_name(config: Config, state: State) -> nn.Module:
    import timm

    name = config.architecture
    if name is None:
        raise CheckpointError(
            "this model is not one that timm makes by a name alone. Pass what makes it as it was before it was "
            "converted: load_pretrained(folder, factory=lambda: ...)."
        )
    if not timm.is_model(name):
        raise CheckpointError(
            f"expected the name of a model of the installed timm ({timm.__version__}), got {name!r}. Update timm, or "
            "pass factory=lambda: ... that makes the model."
        )
    _check_sizes(name, config.num_classes, state)
    model = _create(name, config.num_classes)
    own = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (config.normalisation or {}).items()
    }
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **own}
    return model


def _create(name: str, num_classes: int) -> Any:
    import timm

    with torch.random.fork_rng(devices=[]):  # its start is overwritten, and nobody's random numbers are to move
        return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _check_sizes(name: str, num_classes: int, state: State) -> None:
    """Raise unless the weights are those of the architecture, before it takes the memory of any.

    Raises:
        CheckpointError: they are of another one.
    """
    try:
        with torch.device("meta"):
            sizes = {key: value.shape for key, value in _create(name, num_classes).state_dict().items()}
    except (RuntimeError, NotImplementedError):  # a few models ask for values while they are made
        return
    tops = {head.partition(".")[0] for head in head_names(state)} | {"aux_head"}
    wrong = [
        key
        for key, size in sizes.items()
        if (key in state and state[key].shape != size) or (key not in state and key.partition(".")[0] not in tops)
    ]
    if wrong:
        raise CheckpointError(
            f"the weights are not those of timm's {name!r}, which the configuration names: {wrong[0]!r} differs, and "
            f"{len(wrong) - 1} others. Pass factory=lambda: ... that makes the model."
        )


def _architecture(model: Any) -> str | None:
    """Name by which timm makes the plain model again; None where there is none.

    A model that timm makes, but another one than this, is told.
    """
    import timm

    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture")).removeprefix(CONVERTED)
    if not timm.is_model(name):
        return None
    difference = next(_differences(model, _create(name, model.num_classes), get_heads(model)), None)
    if difference is None:
        return name
    tell(
        f"timm makes another model by the name {name!r} than this one, which was made with further arguments: "
        f"{difference}. It is saved as one that a factory makes: load_pretrained(folder, factory=lambda: "
        f"timm.create_model({name!r}, ...))."
    )
    return None


def _differences(model: nn.Module, again: nn.Module, heads: dict[str, HypersphericalHead]) -> Any:
    """In words, where two models differ apart from the heads of the first."""
    theirs = dict(again.named_modules())
    for name, own in model.named_modules():
        if any(f"{name}.".startswith(f"{head}.") for head in heads):
            continue
        other = theirs.get(name)
        if other is None:
            if not any(f"{head}.".startswith(f"{name}.") for head in heads):
                yield f"{name or 'the model'} is a {type(own).__name__} here, and not there"
            continue
        if type(own) is not type(other):
            yield f"{name} is a {type(own).__name__} here and a {type(other).__name__} there"
        for key, value in own.__dict__.items():
            there = other.__dict__.get(key, value)
            plain = isinstance(value, SIMPLE) or (
                isinstance(value, tuple) and all(isinstance(v, SIMPLE) for v in value)
            )
            if plain and key not in IN_USE and not key.startswith("_") and there != value:
                yield f"{name}.{key} is {value!r} here and {there!r} there".removeprefix(".")
        for key, tensor in (*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)):
            match = other._parameters.get(key, other._buffers.get(key))
            if match is None or match.shape != tensor.shape:
                there = None if match is None else tuple(match.shape)
                yield f"{name}.{key} has shape {tuple(tensor.shape)} here and {there} there".removeprefix(".")


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def _made_of(head: HypersphericalHead, *, several: bool) -> dict[str, Any]:
    known = known_layers(head.projection)
    kind = "none" if not has_layers(head.projection) else "linear" if known and not known.batch_norm else "linear+bn"
    return {
        "dim": head.dim,
        "bank": head.bank.method,
        "num_prototypes": head.bank.num_prototypes,
        "projection": kind,
        "training_output": head.training_output,
        "logit_scale": float(head.logit_scale),
        **({"class_names": _listed(head.class_names)} if several else {}),
    }


def _each_once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share memory as tensors of their own: safetensors takes no memory twice."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        place = value.untyped_storage().data_ptr()
        own[name] = value.clone() if place in seen else value
        seen.add(place)
    return own


def _version() -> str:
    import hyperproto

    return hyperproto.__version__
