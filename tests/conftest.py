import pytest
import torch
from torch.distributions import Distribution

from tests import emulation


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def keep_torch_defaults():
    """The first torch.compile of a process turns the validation of every distribution off, for good."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(before)
    torch.compiler.reset()


def pytest_runtest_setup(item):
    if marks := list(item.iter_markers("gpu")):
        needs = next((mark.args[0] for mark in marks if mark.args), None)
        if reason := emulation.why_not(needs):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def emulate(request):
    """GPU tests run in the emulator where PTXEMU says so."""
    if emulation.EMULATOR and request.node.get_closest_marker("gpu"):
        with emulation.emulated():
            yield
    else:
        yield
