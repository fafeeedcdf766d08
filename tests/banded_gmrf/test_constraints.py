"""Distributions under linear constraints, against dense float64 linear algebra on the subspace that they leave."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from tests.banded_gmrf.test_conditioning import random_gmrf
from tests.cases import STENCILS, dense
from tests.dense import random_factor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CASES = [("line", (7,)), ("3x3", (4, 5)), ("5x5", (1, 6)), ("volume", (3, 2, 3))]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dense_constrained(mean, covariance, A, e):
    """Mean, covariance, and the normal distribution on an orthonormal basis of the fields with A x = 0."""
    gain = torch.linalg.solve(A @ covariance @ A.mT, A @ covariance).mT
    mean = mean + (gain @ (e - (A @ mean.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
    covariance = covariance - gain @ A @ covariance
    basis = torch.linalg.svd(A)[2][len(A) :].mT
    on_basis = MultivariateNormal(mean @ basis, basis.mT @ covariance @ basis, validate_args=False)
    return mean, covariance, on_basis, basis


def moments(q):
    L = dense(q.precision_cholesky)
    return q.loc.flatten(-len(q.event_shape)), torch.linalg.inv(L @ L.mT)


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_constrained_fields_equal_the_dense_ones(name, grid):
    n = torch.Size(grid).numel()
    q = random_gmrf(name, grid, batch=(2,))
    A, e = random(2, *grid), random(2, 2)
    y, variance = random(*grid), 0.5 + torch.rand(grid, dtype=torch.float64)
    precision = torch.linalg.inv(moments(q)[1]) + (1 / variance).flatten().diag()
    posterior = q.posterior(y, variance)
    cases = [
        (q, *moments(q)),
        (posterior, posterior.mean.flatten(1), torch.linalg.inv(precision)),
        (q.posterior(y, variance, method="iterative", tolerance=1e-13), posterior.mean.flatten(1), torch.linalg.inv(precision)),
    ]
    for base, m, Sigma in cases:
        c = base.constrain(A, e)
        mean, covariance, on_basis, basis = dense_constrained(m, Sigma, A.flatten(1), e)
        assert (c.batch_shape, c.event_shape, c.has_rsample) == ((2,), grid, True)
        torch.testing.assert_close(c.mean.flatten(1), mean, **CLOSE)
        torch.testing.assert_close(c.mode, c.mean)
        exact = c.marginal_variance("exact").variance
        torch.testing.assert_close(exact.flatten(1), covariance.diagonal(dim1=-2, dim2=-1), **CLOSE)
        sites = [(0,) * len(grid), tuple(size - 1 for size in grid)]
        columns = c.covariance_columns(sites).flatten(2)
        torch.testing.assert_close(columns, covariance[:, [0, n - 1]].movedim(1, 0), **CLOSE)
        torch.testing.assert_close(c.covariance_columns(sites[0]).flatten(1), columns[0], **CLOSE)
        x = c.sample((3,))
        torch.testing.assert_close((x.flatten(2) @ A.flatten(1).mT), e.expand(3, 2, 2), **CLOSE)
        torch.testing.assert_close(c.log_prob(x), on_basis.log_prob(x.flatten(2) @ basis), **CLOSE)
        torch.testing.assert_close(c.entropy(), on_basis.entropy(), **CLOSE)


def test_constraints_on_fields_of_which_some_sites_are_known():
    grid = (4, 5)
    q = random_gmrf("3x3", grid)
    known, y, e = torch.rand(grid) < 0.3, random(*grid), random(2)
    A = random(2, *grid)
    p = q.condition(known, y)
    c = p.constrain(A, e)
    free = ~known.flatten()
    m, Sigma = moments(q)
    rows = torch.cat([torch.eye(20).double()[~free], A.flatten(1)])
    mean, covariance, *_ = dense_constrained(m, Sigma, rows, torch.cat([y.flatten()[~free], e]))
    torch.testing.assert_close(c.mean.flatten(), mean, **CLOSE)
    torch.testing.assert_close(c.variance.flatten(), covariance.diagonal(), **CLOSE)
    # On the free sites: the posterior's own distribution, given the rest of the constraints' values.
    inner = e - A.flatten(1)[:, ~free] @ y.flatten()[~free]
    *_, on_basis, basis = dense_constrained(
        p.mean.flatten()[free], torch.linalg.inv(torch.linalg.inv(Sigma)[free][:, free]), A.flatten(1)[:, free], inner
    )
    x = c.sample((4,))
    torch.testing.assert_close(c.log_prob(x), on_basis.log_prob(x.flatten(1)[:, free] @ basis), **CLOSE)
    torch.testing.assert_close(c.entropy(), on_basis.entropy(), **CLOSE)


def test_evidence_under_constraints():
    grid = (3, 4)
    q = random_gmrf("3x3", grid, batch=(2,))
    A, e, y = random(2, *grid), random(2), random(*grid)
    m, Sigma = moments(q)
    mean, covariance, *_ = dense_constrained(m, Sigma, A.flatten(1), e)
    expected = MultivariateNormal(mean, covariance + 0.5 * torch.eye(12).double(), validate_args=False).log_prob(y.flatten())
    torch.testing.assert_close(q.posterior(y, 0.5).constrain(A, e).log_evidence, expected, **CLOSE)
    with pytest.raises(AttributeError):
        q.constrain(A, e).log_evidence  # noqa: B018


def test_samples_have_the_dense_covariance():
    count, grid = 20_000, (3, 3)
    q = random_gmrf("3x3", grid)
    A, e = torch.ones(1, *grid, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    _, covariance, *_ = dense_constrained(*moments(q), A.flatten(1), e)
    for c in (q.constrain(A, e), q.posterior(q.loc, torch.inf, method="iterative").constrain(A, e)):
        x = c.sample((count,)).flatten(1)
        assert x.sum(1).abs().max() < 1e-10
        variance = covariance.diagonal()
        error = 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()
        assert ((x.T.cov() - covariance).abs() <= error).all()


def test_operators_batches_and_expansions():
    grid = (4, 6)
    q = random_gmrf("3x3", grid)
    blocks = bg.operators.Downsample(2) @ bg.operators.Convolution(torch.full((2, 2), 0.25, dtype=torch.float64))
    e = random(3, 2, 3)
    c = q.constrain(blocks, e)
    assert c.batch_shape == (3,)
    torch.testing.assert_close(blocks(c.sample((5,))), e.expand(5, 3, 2, 3), **CLOSE)
    rows = blocks.bind(grid).to_dense().unflatten(-1, grid)
    torch.testing.assert_close(q.constrain(rows, e.flatten(1)).mean, c.mean, **CLOSE)
    wide = c.expand((2, 3))
    for name in ("mean", "variance", "stddev"):
        assert torch.equal(getattr(wide, name), getattr(c, name).expand(2, 3, *grid))
    assert wide.sample((5,)).shape == (5, 2, 3, *grid)
    assert wide.entropy().shape == wide.log_prob(wide.sample()).shape == (2, 3)


@pytest.mark.parametrize("quantity", ["mean", "rsample", "variance", "log_prob", "entropy", "log_evidence"])
def test_gradients(quantity):
    stencil, grid = STENCILS["3x3"], (3, 2)
    tensors = [random(*grid), *random_factor(stencil.offsets, grid, nan_outside=False), random(*grid)]
    A, e = random(2, *grid), random(2)
    value = bg.GMRF(tensors[0], bg.StencilCholesky(*tensors[1:3], stencil)).constrain(A, e).sample()

    def function(loc, log_diag, off_diag, y, A=A, e=e):
        q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False)
        c = q.posterior(y, 0.5).constrain(A, e)
        torch.manual_seed(1)
        if quantity == "rsample":
            return c.rsample((2,))
        if quantity == "log_prob":
            return c.log_prob(value)
        return c.entropy() if quantity == "entropy" else getattr(c, quantity)

    if quantity != "log_prob":  # the value would leave the subspace with every step in A and e
        tensors += [A, e]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q = random_gmrf("3x3", (4, 5), batch=(2,), dtype=dtype)
    A, e = torch.ones(1, 4, 5).to(dtype), torch.ones(1).to(dtype)
    c = q.constrain(A, e)
    assert c.mean.dtype == c.variance.dtype == c.sample().dtype == dtype
    exact = bg.GMRF(q.loc.double(), q.precision_cholesky.to(torch.float64)).constrain(A.double(), e.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(c.mean.double(), exact.mean, rtol=eps, atol=eps)
    assert c.log_prob(c.sample((3,))).isfinite().all()


ONES = torch.ones(1, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("A", "e", "error", "message"),
    [
        (ONES[0], random(1), ValueError, r"A has shape \(4, 5\), expected \(m, 4, 5\)"),
        (ONES[:0], random(0), ValueError, r"A has shape \(0, 4, 5\), expected \(m, 4, 5\), m at least 1"),
        (ONES, random(2), ValueError, r"e has shape \(2,\), expected \(..., 1\), one value for each constraint"),
        (ONES, random(3, 1), ValueError, r"e has batch shape \(3,\), .* \(2,\) of the distribution"),
        (ONES * torch.nan, random(1), ValueError, "A has NaN or infinite entries, expected finite ones"),
        (ONES, random(1) * torch.inf, ValueError, "e has NaN or infinite entries, expected finite ones"),
        (ONES.long(), random(1), TypeError, "A is torch.int64, expected float16"),
        (ONES, [0.0], TypeError, "e is a list, expected a torch.Tensor"),
        (ONES.expand(2, 4, 5), torch.ones(2).double(), ValueError, "A has 2 constraints that repeat each other: its rank is 1"),
        (ONES.expand(2, 4, 5), torch.arange(2.0).double(), ValueError, "A has 2 constraints that contradict each other"),
        (
            0 * ONES,
            torch.zeros(1).double(),
            ValueError,
            "A has 1 constraints that repeat each other: its rank is 0, expected 1",
        ),
        (random(21, 4, 5), random(21), ValueError, "A has 21 constraints that contradict each other: its rank is 20"),
        (bg.operators.Downsample(2), random(4, 5), ValueError, r"e has shape \(4, 5\), expected \(..., 2, 3\)"),
        (abs, random(1), TypeError, "A is a builtin_function_or_method, expected a LinearOperator"),
    ],
)
def test_bad_constraints(A, e, error, message):
    with pytest.raises(error, match=message):
        random_gmrf("3x3", (4, 5), (2,)).constrain(A, e)


def test_fields_that_do_not_fulfil_the_constraints():
    q = random_gmrf("3x3", (4, 5))
    c = q.constrain(ONES, torch.zeros(1).double())
    x = c.sample()
    x[2, 2] += 1e-3
    with pytest.raises(ValueError, match="value does not fulfil the constraints, where its density is 0"):
        c.log_prob(x)
    unchecked = bg.GMRF(q.loc, q.precision_cholesky, validate_args=False).constrain(ONES, torch.zeros(1).double())
    assert unchecked.log_prob(x) == -torch.inf
    known = torch.zeros(4, 5, dtype=torch.bool)
    known[0] = True
    with pytest.raises(ValueError, match="A has constraints that bind only sites that are known exactly"):
        q.condition(known, q.loc).constrain(ONES * known, torch.zeros(1).double())
