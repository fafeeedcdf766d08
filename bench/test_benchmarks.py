"""The core cases under pytest-benchmark, whose own options store and compare runs: ``pytest bench --benchmark-only``."""

import pytest

from bench.cases import DTYPES, Case, Problem
from bench.implementations import IMPLEMENTATIONS, default_backend
from bench.operations import OPERATIONS, difference, tolerance

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("resolution", [64, 256])
@pytest.mark.parametrize("stencil", ["3", "5", "7"])
def test_operation(benchmark, stencil, resolution, operation):
    case = Case(stencil, (resolution, resolution), batch=16)
    problem = Problem(case)
    prepared = IMPLEMENTATIONS[default_backend(case.device)].prepare(problem, operation)
    assert difference(prepared.run(), OPERATIONS[operation].expected(problem)) <= tolerance(DTYPES[case.dtype])
    benchmark(prepared.run)
