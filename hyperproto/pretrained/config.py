"""`config.json` of a saved model: what it takes to build it again, as far as its weights do not say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperproto.arguments import shown
from hyperproto.errors import ArgumentError, CheckpointError
from hyperproto.heads import get_heads

FILE = "config.json"

#: Of what is written here; to be raised when it changes its meaning.
FORMAT = 1

#: No configuration is larger: a million names of classes fit.
MOST_BYTES = 64 * 2**20

#: Dtypes that the layers in front of the heads may have.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}

#: What images are made into before the model sees them, by timm's names.
NORMALISATION = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")

TRAINING_OUTPUTS = ("logits", "embedding")


@dataclass(frozen=True)
class Config:
    """What `save_pretrained` writes beside the weights.

    Attributes:
        architecture: name in timm, or None where a factory makes the model.
        num_classes: of the first head.
        class_names: in the order of the labels, or None.
        normalisation: some of `NORMALISATION`, or None.
        dtype: of the layers in front of the heads.
        heads: by dotted name, what they were converted with: dim, bank, num_prototypes, projection, training_output and
            logit_scale. The weights say the same of all but training_output, which alone is read back, and they count.
        hyperproto: the version that wrote it.
        format: of this file.
    """

    architecture: str | None
    num_classes: int
    class_names: list[str] | None
    normalisation: dict[str, Any] | None
    dtype: str
    heads: dict[str, dict[str, Any]]
    hyperproto: str
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @property
    def training_output(self) -> Any:
        """Of all heads."""
        outputs = {head.get("training_output", "logits") for head in self.heads.values()}
        return outputs.pop() if len(outputs) == 1 else "logits"


def read_config(folder: Path) -> Config:
    """The configuration in a folder; names in it are strings to be looked up, and nothing else.

    Raises:
        CheckpointError: there is none, a later format, or fields that cannot be meant.
    """
    path = folder / FILE
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise CheckpointError(
            f"expected a {FILE} as save_pretrained writes it in {folder.name!r}, got none. Weights alone are loaded by "
            "load_model(model, folder)."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{FILE} in {folder.name!r} is no JSON: {type(error).__name__}. It is damaged."
        ) from error
    known = Config.__dataclass_fields__
    if (
        not isinstance(fields, dict)
        or "format" not in fields
        or not {"heads", "dtype", "architecture"} <= fields.keys()
    ):
        raise CheckpointError(
            f"expected {FILE} in {folder.name!r} as save_pretrained writes it, got another one's. Weights alone are "
            "loaded by load_model(model, folder)."
        )
    if not isinstance(fields["format"], int) or fields["format"] > FORMAT:
        raise CheckpointError(
            f"{FILE} has format {shown(fields['format'])}, and this version of hyperproto reads up to {FORMAT}. Update "
            "hyperproto to load it."
        )
    config = Config(**{name: fields.get(name) for name in known})  # type: ignore[arg-type]
    _check(config)
    return config


def normalisation_of(model: Any, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What images are made into, as given or as a timm model's own configuration has it; None of neither.

    Raises:
        ArgumentError: names that are not in `NORMALISATION`.
    """
    source = given if given is not None else getattr(model, "pretrained_cfg", None) or {}
    unknown = sorted(set(source) - set(NORMALISATION)) if given is not None else []
    if unknown:
        raise ArgumentError(f"expected normalisation with {', '.join(NORMALISATION)} at most, got {unknown} as well.")
    found = {name: _plain(source[name]) for name in NORMALISATION if source.get(name) is not None}
    return found or None


def dtype_of(model: nn.Module) -> str:
    """Dtype of the layers in front of the heads, by its name.

    Raises:
        ArgumentError: they have several, or one that no plain model has.
    """
    own = {id(parameter) for head in get_heads(model).values() for parameter in head.parameters()}
    dtypes = {each.dtype for each in model.parameters() if id(each) not in own and each.is_floating_point()}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes or {torch.float32})
    if len(names) > 1 or names[0] not in DTYPES:
        raise ArgumentError(
            f"expected a model in one dtype among {', '.join(DTYPES)}, got {', '.join(names)}. Save its state_dict, "
            "and load it by load_model."
        )
    return names[0]


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _check(config: Config) -> None:
    names, heads, normalisation = config.class_names, config.heads, config.normalisation
    fits = {
        "architecture": config.architecture is None or isinstance(config.architecture, str),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "normalisation": normalisation is None
        or (isinstance(normalisation, dict) and set(normalisation) <= set(NORMALISATION)),
        "dtype": isinstance(config.dtype, str) and config.dtype in DTYPES,
        "heads": isinstance(heads, dict)
        and all(isinstance(head, dict) and head.get("training_output") in TRAINING_OUTPUTS for head in heads.values()),
    }
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise CheckpointError(
            f"{FILE} has no such {', '.join(wrong)} as save_pretrained writes. Load the weights alone: "
            "load_model(model, folder)."
        )
