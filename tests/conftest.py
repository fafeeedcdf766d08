import pytest
import torch
from torch.distributions import Distribution


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def keep_torch_defaults():
    """torch.compile turns the validation of every distribution off, for good."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)
    torch.compiler.reset()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use (CUDA or ROCm)")
