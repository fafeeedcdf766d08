import functools
import os

import pytest
import torch

import gmrf_kernels
from gmrf_kernels import cpu_compile, cpu_plan
from tests import emulation

# Each backend, and the device of the tensors that it is tested on: a new one inherits the suite by a line here. In a process
# whose Triton interprets its kernels there is nothing else to test.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = {"triton": "cpu"} if INTERPRETED else {"reference": "cpu", "cpu": "cpu", "triton": emulation.DEVICE}
ON_GPU = set() if INTERPRETED else {"triton"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name in ON_GPU else ()) for name in BACKENDS])
def backend(request):
    """The name of the backend that runs every operation of the test."""
    with gmrf_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return BACKENDS[backend]


@pytest.fixture(autouse=True)
def new_plans():
    """Nothing that a test changes about the CPU backend is in the plans of another test, nor the other way round."""
    cpu_plan.forget_plans()
    yield
    cpu_plan.forget_plans()


@pytest.fixture
def poisoned_memory():
    """New memory is full of NaN, so that a result which is not written everywhere shows it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """As in a new process: kernels come from the disk cache or are compiled."""
    cpu_plan.forget_plans()
    monkeypatch.setattr(cpu_compile, "_compiled", functools.cache(cpu_compile._compiled.__wrapped__))
