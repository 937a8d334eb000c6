"""The shape of the package: imports only go down, and importing it is cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hyperproto

PACKAGE = Path(hyperproto.__file__).parent

#: From the bottom up: a module may import from the ones above its own line only.
LAYERS = [
    "errors",
    "precision",
    "geometry",
    "targets",
    "constructions",
    "bank",
    "matching",
    "logits",
    "checkpoint",
    "projection",
    "head",
    "functional",
    "assigner",
    "losses",
    "conversion",
    "fitting",
    "calibration",
    "testing",
]


def _imports(path: Path) -> set[str]:
    """Layers that a file imports from, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "hyperproto" else []
            names = names or [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path.name} imports relatively; write the full path")
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("hyperproto.")}
    return found


def test_every_module_has_a_layer():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert modules - {"__init__", "__pycache__"} == set(LAYERS)


def test_imports_only_go_down():
    for height, layer in enumerate(LAYERS):
        single = PACKAGE / f"{layer}.py"
        for path in [single] if single.exists() else (PACKAGE / layer).rglob("*.py"):
            above = _imports(path) - set(LAYERS[: height + 1])
            assert not above, f"{path.relative_to(PACKAGE)} imports from the layers above it: {above}"


def test_public_names_are_sorted_and_there():
    assert hyperproto.__all__ == sorted(hyperproto.__all__)
    assert all(hasattr(hyperproto, name) for name in hyperproto.__all__)


#: What importing torch and then the library does, as JSON: told by a process of its own, one for all tests below.
IMPORTING = """
import json, sys, time
started = time.process_time()
import torch
loaded, torch_seconds = set(sys.modules), time.process_time() - started
touched = lambda: [torch.get_rng_state().tolist(), str(torch.get_default_dtype()), torch.get_num_threads()]
before = touched()
started = time.process_time()
import hyperproto
seconds = time.process_time() - started
modules = sorted(set(sys.modules) - loaded)
head = hyperproto.HypersphericalHead(8, 20, dim=4, bank="separated")
hyperproto.DynamicAssigner(head)
print(json.dumps({"modules": modules, "seconds": seconds, "torch_seconds": torch_seconds,
                  "untouched": touched() == before}))
"""


@pytest.fixture(scope="module")
def importing() -> dict:
    process = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def test_import_loads_nothing_heavy(importing):
    heavy = {"timm", "torchvision", "scipy", "matplotlib", "hypothesis", "tqdm", "torch._dynamo", "torch._inductor"}
    assert "hyperproto.head" in importing["modules"]
    assert not heavy & set(importing["modules"])


def test_import_costs_little_beside_torch(importing):
    # Time of the processor, and as a share: what the library costs, not what else the machine does or how fast it is.
    assert importing["seconds"] < 0.25 * importing["torch_seconds"]


def test_nothing_global_is_touched(importing):
    assert importing["untouched"]
