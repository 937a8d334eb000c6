"""The shape of the package: imports only go down, and importing it is cheap."""

import ast
import json
import re
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
    "modes",
    "sphere",
    "bounds",
    "targets",
    "ranks",
    "checkpoint",
    "constructions",
    "separation",
    "bank",
    "matching",
    "projection",
    "affine",
    "readout",
    "codebook",
    "head",
    "functional",
    "class_means",
    "assignment_step",
    "assigner",
    "losses",
    "conversion",
    "fitting",
    "testing",
]

#: The same inside of folders.
INNER_LAYERS = {
    "constructions": [
        "_check",
        "_rotation",
        "_optimise",
        "simplex",
        "orthoplex",
        "random",
        "code",
        "separated",
        "uniform",
        "energy",
        "hpn",
        "class_vectors",
    ],
    "matching": ["problem", "dense", "candidates", "prices", "sparse", "solve", "swaps", "procrustes"],
    "conversion": [
        "module_ref",
        "hooks",
        "locate",
        "channels",
        "record",
        "replace",
        "loading",
        "structures",
        "warm_start",
        "restore",
        "fold",
        "describe",
        "reach",
        "convert",
    ],
    "fitting": [
        "statistics",
        "closed_form",
        "components",
        "features",
        "lbfgs",
        "report",
        "data",
        "fit_head",
        "refit_head",
        "compress_head",
        "fit_logit_scale",
    ],
}

#: Longest file, in lines.
MOST_LINES = 350


def _imports(path: Path, depth: int = 1) -> set[str]:
    """Layers (or, at depth 2, files of its own folder) that a file imports from, at its top or inside functions."""
    prefix = ".".join(["hyperproto", *path.relative_to(PACKAGE).parts[: depth - 1]]) + "."
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
        found |= {name.split(".")[depth] for name in names if name.startswith(prefix)}
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


@pytest.mark.parametrize("folder", INNER_LAYERS)
def test_imports_only_go_down_inside_of_folders(folder):
    layers = INNER_LAYERS[folder]
    assert {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} == set(layers)
    for height, layer in enumerate(layers):
        path = PACKAGE / folder / f"{layer}.py"
        above = _imports(path, depth=2) - set(layers[:height])
        assert not above, f"{path.relative_to(PACKAGE)} imports from the files above it: {above}"


def test_folders_have_layers():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(INNER_LAYERS)


def test_one_file_knows_torch_distributed():
    known = re.compile(r"^\s*(from|import) torch\.distributed|from torch import .*\bdistributed\b", re.M)
    assert {path.name for path in PACKAGE.rglob("*.py") if known.search(path.read_text())} == {"ranks.py"}


def test_no_file_is_long():
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(name): length for name, length in lengths.items() if length > MOST_LINES}


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
