"""`README.md` of a saved model: what it is, how good its bank is, what has fitted it, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hyperproto.conversion.describe import describe, shown_names
from hyperproto.fitting.report import HeadFit
from hyperproto.heads import get_heads
from hyperproto.pretrained.config import Config

CARD = """\
---
library_name: hyperproto
pipeline_tag: image-classification
tags: [hyperproto]
---

# {title}

A classifier whose last layer does not train: fixed prototypes on the unit hypersphere, made by
[hyperproto](https://pypi.org/project/hyperproto/) {version}.

```python
import hyperproto

model = hyperproto.load_pretrained("path/to/this/folder"{factory})
```

```text
{description}
```

| | |
|---|---|
{rows}
"""


def model_card(model: nn.Module, config: Config, fits: Iterable[HeadFit]) -> str:
    """The text of the card."""
    rows: list[tuple[str, str]] = [
        ("architecture", config.architecture or f"{type(model).__name__}, made by a factory")
    ]
    if config.class_names is not None:
        rows.append(("classes", shown_names(tuple(config.class_names))))
    if config.normalisation is not None:
        rows.append(("input", "; ".join(f"{name} {value}" for name, value in config.normalisation.items())))
    heads = get_heads(model)
    banks = {head.bank: name for name, head in heads.items()}
    rows += [(f"bank of {name}", f"{bank.method}: {bank.report()}") for bank, name in banks.items()]
    rows += [(f"scale of {name}", f"{float(head.logit_scale):.6g}") for name, head in heads.items()]
    rows += [("fit", str(fit)) for fit in fits]
    return CARD.format(
        title=f"{config.architecture or type(model).__name__} with prototypes for {config.num_classes} classes",
        version=config.hyperproto,
        factory="" if config.architecture else ", factory=make_the_plain_model",
        description=describe(model),
        rows="\n".join(f"| {name} | {_in_a_cell(text)} |" for name, text in rows),
    )


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
