import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)
