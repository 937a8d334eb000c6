"""The shape of the package: imports only go down, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import hyperproto

PACKAGE = Path(hyperproto.__file__).parent

#: From the bottom up: a module may import from the ones above its own line only.
LAYERS = [
    "errors",
    "precision",
    "modes",
    "geometry",
    "targets",
    "constructions",
    "bank",
    "matching",
    "logits",
    "checkpoint",
    "projection",
    "affine",
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


def _in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    by_torch, by_us = (
        set(_in_new_process(f"import sys, {name}; print(' '.join(sys.modules))").split())
        for name in ("torch", "hyperproto")
    )
    assert not {"timm", "torchvision", "scipy", "matplotlib", "hypothesis", "tqdm"} & (by_us - by_torch)


def test_import_adds_at_most_300_milliseconds_to_torch():
    code = "import torch, time; start = time.perf_counter(); import hyperproto; print(time.perf_counter() - start)"
    # The best of three: what the library costs, not what else the machine does.
    assert min(float(_in_new_process(code)) for _ in range(3)) < 0.3


def test_nothing_global_is_touched():
    code = (
        "import torch; before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads();"
        "import hyperproto;"
        "head = hyperproto.HypersphericalHead(8, 20, dim=4, bank='separated');"
        "hyperproto.DynamicAssigner(head);"
        "after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads();"
        "print(torch.equal(before[0], after[0]) and before[1:] == after[1:])"
    )
    assert _in_new_process(code).strip() == "True"
