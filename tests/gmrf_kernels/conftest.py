import pytest
import torch

import gmrf_kernels

# Each backend, and the device of the tensors that it is tested on: a new one inherits the suite by a line here.
BACKENDS = {"reference": "cpu", "cpu": "cpu"}


@pytest.fixture(params=BACKENDS)
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
