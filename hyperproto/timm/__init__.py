"""Models of timm and torchvision by name, converted as they are made: for scripts that nobody wants to edit.

Importing this makes `hp_<name>` a name of every model that timm and torchvision know, also of those registered later:
`timm.create_model("hp_resnet50", num_classes=100, hp_dim=50)`, `torchvision.models.get_model("hp_resnet50")`. Options
are those of `convert_model`: `hp_dim`, `hp_bank`, `hp_projection`; and `hp_logit_scale`, the scale to start with, which
fixes the temperature of a script's own cross-entropy. With `features_only=True` or `num_classes=0` it is the plain
model. Only `list_models("hp_*")` lists these names.

A folder that `timm.models.save_for_hf` has written for a converted model says `hp_<name>`, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` brings the converted model back wherever this is imported. The
head is then that of the weights, whatever the options say.

`python -m hyperproto.timm SCRIPT ...` runs a script as it is, with these names known.

`PrototypeTask` is timm's training task with an assigner, for training loops over tasks.

Adaptive gradient clipping leaves out the projections, as it does the classifiers that they replace.

Examples:
    >>> import timm, hyperproto.timm
    >>> model = timm.create_model("hp_test_resnet", num_classes=10, hp_dim=5)
    >>> type(model.get_classifier()).__name__
    'HypersphericalHead'
    >>> [name for name in timm.list_models("*test_resnet") if name.startswith("hp_")]
    []
    >>> timm.list_models("hp_test_resnet")
    ['hp_test_resnet']
"""

from importlib.metadata import version
from importlib.util import find_spec

from hyperproto.timm.clipping import spare_projections
from hyperproto.timm.names import know_names

know_names()
spare_projections()

if find_spec("timm.task"):
    from hyperproto.timm.task import PrototypeTask as PrototypeTask
else:

    def __getattr__(name: str) -> object:
        if name == "PrototypeTask":
            raise ImportError(
                f"PrototypeTask needs timm >= 1.0.23, which has tasks; this is timm {version('timm')}. "
                "pip install --upgrade timm."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
