"""Settings shared by all tests."""

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # Matrices this small gain nothing from a second thread, and lose much where another process wants the core.
    torch.set_num_threads(1)
