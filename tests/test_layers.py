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
ROOT = Path(__file__).parents[1]

#: From the bottom up: a module may import from the ones above its own line only.
LAYERS = [
    "errors",
    "telling",
    "arguments",
    "precision",
    "modes",
    "module_ref",
    "adapted",
    "sphere",
    "bounds",
    "targets",
    "ranks",
    "group_handle",
    "checkpoint",
    "constructions",
    "separation",
    "prototypes",
    "bank",
    "matching",
    "projection",
    "affine",
    "readout",
    "assignment_record",
    "assigned_bank",
    "placement",
    "codebook",
    "restart",
    "head",
    "heads",
    "class_names",
    "functional",
    "class_means",
    "assignment_step",
    "oversights",
    "running_means",
    "attachment",
    "assigner",
    "losses",
    "conversion",
    "fitting",
    "pretrained",
    "testing",
    "lightning",
    "transformers",
    "timm",
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
        "hooks",
        "locate",
        "channels",
        "stored",
        "like",
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
        "batches",
        "features",
        "held_out",
        "lbfgs",
        "temperature",
        "unit_head",
        "closed_form",
        "components",
        "teacher",
        "hand_over",
        "report",
        "data",
        "unit_fit",
        "refit_head",
        "compress_head",
        "fit_head",
        "fit_logit_scale",
    ],
    "pretrained": ["config", "card", "load", "whole"],
    "testing": [
        "requirements",
        "state",
        "assignment_checks",
        "bank_checks",
        "strategies",
        "subject",
        "properties",
        "loss_checks",
    ],
    "timm": ["clipping", "names", "task", "__main__"],
}

#: Longest file, in lines.
MOST_LINES = 350


def _imports(path: Path, depth: int = 1) -> set[str]:
    """Layers (or, at depth 2, files of its own folder) that a file imports from, at its top or inside functions."""
    prefix = ".".join(["hyperproto", *path.relative_to(PACKAGE).parts[: depth - 1], ""])
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
    assert {path.stem for path in (PACKAGE / folder).iterdir()} - {"__init__", "__pycache__"} == set(layers)
    for height, layer in enumerate(layers):
        single = PACKAGE / folder / f"{layer}.py"
        for path in [single] if single.exists() else single.with_suffix("").glob("*.py"):
            above = _imports(path, depth=2) - set(layers[: height + (path != single)])
            assert not above, f"{path.relative_to(PACKAGE)} imports from the files above it: {above}"


def test_folders_have_layers():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(INNER_LAYERS)


def test_one_file_knows_torch_distributed():
    known = re.compile(r"^\s*(from|import) torch\.distributed|from torch import .*\bdistributed\b", re.M)
    assert {path.name for path in PACKAGE.rglob("*.py") if known.search(path.read_text())} == {"ranks.py"}


def test_no_file_is_long():
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(name): length for name, length in lengths.items() if length > MOST_LINES}


#: What examples, experiments and benchmarks may import, or name as an attribute of the package.
PUBLIC = {"hyperproto", "hyperproto.functional", "hyperproto.testing", "hyperproto.timm"} | {
    f"hyperproto.{name}" for name in (*hyperproto.__all__, "__version__")
}
PROMISED = "hyperproto.conversion.warm_start.warm_start_"

USERS = [
    path.relative_to(ROOT)
    for folder in ("examples", "experiments", "tests/benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def _used(source: str) -> set[str]:
    """Dotted names of the package's that a file imports or names, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    # What a public module gives out is public.
    modules = {"hyperproto.functional", "hyperproto.testing"}
    found = {name.rpartition(".")[0] if name.rpartition(".")[0] in modules else name for name in found}
    return {name for name in found if name.split(".")[0] == "hyperproto"}


@pytest.mark.parametrize("path", USERS, ids=str)
def test_examples_and_experiments_use_what_is_public(path):
    promised = {PROMISED} if path.is_relative_to("tests/benchmarks") else set()
    below = _used((ROOT / path).read_text()) - PUBLIC - promised
    assert not below, f"{path} uses what is below the public interface: {sorted(below)}"


@pytest.mark.parametrize(
    "line",
    [
        "import hyperproto.fitting.lbfgs",
        "from hyperproto.fitting.lbfgs import minimise",
        "from hyperproto import fitting",
        "def later():\n    from hyperproto.sphere import normalise",
        "hyperproto.sphere.normalise(rows)",
    ],
)
def test_a_use_of_what_is_not_public_is_seen(line):
    assert _used(line) - PUBLIC - {PROMISED}


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
