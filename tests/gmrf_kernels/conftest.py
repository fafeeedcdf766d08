import os

import pytest
import torch

import gmrf_kernels

# Each backend, and the device of the tensors that it is tested on: a new one inherits the suite by a line here. In a process
# whose Triton interprets its kernels there is nothing else to test.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = {"triton": "cpu"}
else:
    BACKENDS = {"reference": "cpu", "cpu": "cpu", "triton": "cuda"}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu if device == "cuda" else ()) for name, device in BACKENDS.items()]
)
def backend(request):
    """The name of the backend that runs every operation of the test."""
    with gmrf_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return BACKENDS[backend]


@pytest.fixture
def poisoned_memory():
    """New memory is full of NaN, so that a result which is not written everywhere shows it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
