import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use (CUDA or ROCm)")
