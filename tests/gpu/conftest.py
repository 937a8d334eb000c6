"""What can only be seen on a CUDA GPU: `python -m pytest tests/gpu -k quick` takes under a minute on a large one.

`--junitxml=FILE` keeps what some of them measure.
Warnings are shown and raise nothing here: those of drivers and of torch's own CUDA code are not the library's to mend.
"""

import sys
from pathlib import Path

import pytest
import torch

# Where the helpers of the experiments lie.
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")
