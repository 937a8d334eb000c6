"""Settings shared by all tests."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# No network in tests: a library that tries to fetch weights must fail here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")

# Matrices this small gain nothing from a second thread, and lose much where another process wants the core. Fixtures of
# whole modules run under it as well: sums over two threads are rounded otherwise than over one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _imports_out_of_sight() -> None:
    """Collections look through what a module's tests make, not each time through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
