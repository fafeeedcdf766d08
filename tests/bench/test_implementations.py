"""Every backend and every installed peer gives the expected result of every operation, and so do the expected results."""

import pytest
import torch

from bench.cases import DTYPES, Case, Problem
from bench.implementations import BACKENDS, IMPLEMENTATIONS, default_backend, first_call
from bench.measure import in_own_process
from bench.operations import OPERATIONS, difference, tolerance
from bench.peers import PEERS, Peer
from tests.dense import dense_factor

CASES = [
    Case("5", (7, 9), batch=3, samples=2),
    Case("3", (3, 5, 4), batch=2, dtype="float64"),
    Case("7", (3, 3), batch=2),  # narrower than the stencil
    Case("cross2", (1, 6), batch=1, samples=3),
    Case("1", (4, 5), batch=2),  # a diagonal factor
    Case("3", (4, 5), batch=2, dtype="bfloat16"),
]


@pytest.mark.parametrize(
    ("operation", "name"), [(op, name) for op in OPERATIONS for name in IMPLEMENTATIONS if IMPLEMENTATIONS[name].has(op)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_is_as_expected(case, operation, name):
    implementation = IMPLEMENTATIONS[name]
    if reason := implementation.why_not(case):
        pytest.skip(reason)
    problem = Problem(case)
    prepared = implementation.prepare(problem, operation)
    for _ in range(2):  # a call must leave its inputs as they were
        result = prepared.read(prepared.run())
    assert difference(result, OPERATIONS[operation].expected(problem)) <= tolerance(DTYPES[case.dtype])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_expected_result_is_that_of_dense_algebra(operation):
    problem = Problem(Case("5", (4, 3), batch=1, dtype="float64"))
    log_diag, off_diag = (t[0].detach().requires_grad_() for t in (problem.factor.log_diag, problem.factor.off_diag))
    L = dense_factor(log_diag, off_diag, problem.stencil.offsets)
    given = [vector.flatten() for vector in OPERATIONS[operation].given(problem)]
    if operation.startswith("log_prob"):
        zero = torch.zeros_like(given[0])
        value = torch.distributions.MultivariateNormal(zero, precision_matrix=L @ L.T).log_prob(given[0])
        cotangent = torch.ones_like(value)
    else:
        matrix = {"solve": L, "precision_solve": L @ L.T}.get(operation, L.T)
        value = torch.linalg.solve(matrix, given[0])
        cotangent = given[-1]
    results = [value]
    if operation.endswith("grad"):
        results += torch.autograd.grad(value, (log_diag, off_diag), cotangent)
    for result, expected in zip(results, OPERATIONS[operation].expected(problem), strict=True):
        torch.testing.assert_close(result.detach().flatten(), expected.flatten())  # float64: torch's default tolerance


def test_difference_finds_what_is_wrong():
    right = (torch.tensor([1.0, -2.0]), torch.zeros(0))
    assert difference(right, right) == 0
    assert difference((torch.tensor([1.0, -2.5]), right[1]), right) == 0.25
    assert difference((torch.tensor([1.0, float("nan")]), right[1]), right) == float("inf")
    assert difference((torch.zeros(3), right[1]), right) == float("inf")


def test_peers_say_why_they_are_not_compared():
    class Missing(Peer):
        module = "no_such_package"

    assert Missing().why_not(CASES[0]) == "no_such_package is not installed"
    assert Missing().version() is None
    assert PEERS["scipy"].why_not(Case("3", (4, 4), 1, device="cuda")) == "does not run on cuda"
    assert PEERS["shifts"].why_not(CASES[-1]) == "does not take bfloat16"
    assert PEERS["scipy"].version() is not None


def test_backends_are_those_of_the_library():
    assert {"reference", "cpu"} <= set(BACKENDS)
    assert default_backend("cpu") == "cpu"
    assert "CPU tensors" in IMPLEMENTATIONS["cpu"].why_not(Case("3", (4, 4), 1, device="meta"))


def test_first_call_knows_its_memory():
    # In a process of its own, as in a run: what earlier tests have freed is given back meanwhile, which would hide the peak.
    work = Case("3", (1024, 1024), batch=2), "sample", "cpu"
    peak = in_own_process(first_call, *work, memory=2**32, seconds=120)
    vectors = 2 * 2 * 1024 * 1024 * 4  # the vector and the solution, 4 bytes each
    assert peak is None or peak > 0.75 * vectors  # what the process frees meanwhile is a few MiB
