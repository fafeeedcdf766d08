"""Posteriors given what a linear operator shows of a field, against dense float64 linear algebra."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from banded_gmrf.operators import Convolution, Downsample, Mask, Matrix
from tests.banded_gmrf.test_conditioning import random_gmrf
from tests.banded_gmrf.test_operators import Doubled, Sums, Wrong
from tests.cases import STENCILS, dense
from tests.dense import random_factor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CASES = [("line", (7,)), ("3x3", (4, 5)), ("3x3", (1, 6)), ("volume", (3, 2, 3))]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def operators_on(grid):
    kernel = random(*(3, 4, 2)[: len(grid)])
    n = torch.Size(grid).numel()
    mask = torch.rand(grid) < 0.6
    mask.view(-1)[0] = True
    return {
        "zero": Convolution(kernel, "zero"),
        "reflect": Convolution(kernel, "reflect"),
        "periodic": Convolution(kernel, "periodic"),
        "downsampled blur": Downsample((2,) * len(grid)) @ Convolution(kernel, "reflect"),
        "masked blur": Mask(mask) @ Convolution(kernel, "zero"),
        "mask": Mask(mask),
        "downsample": Downsample((2,) * len(grid)),
        "matrix": Matrix(random(3, n)),
        "sparse": Matrix((random(n + 2, n) * (torch.rand(n + 2, n) < 0.3)).to_sparse_coo()),
    }


def dense_results(q, A, y, V):
    """Mean, covariance and log evidence of one field given y = A x + noise of covariance V."""
    L = dense(q.precision_cholesky)
    Sigma, m, y = torch.linalg.inv(L @ L.mT), q.loc.flatten(-len(q.event_shape)), y.reshape(*y.shape[: y.ndim], -1).flatten()
    S = A @ Sigma @ A.mT + V
    gain = torch.linalg.solve(S, A @ Sigma).mT
    evidence = MultivariateNormal(A @ m, S, validate_args=False).log_prob(y)
    return (m + gain @ (y - A @ m)).reshape(q.event_shape), Sigma - gain @ A @ Sigma, evidence


# Residuals of 1e-13 are within the rounding of b - A x: whether a processor reaches that is chance.
@pytest.fixture(params=["direct", "iterative"])
def precise(request):
    return {"method": request.param, "tolerance": 1e-12}


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_posteriors_equal_the_dense_ones(name, grid, precise):
    q = random_gmrf(name, grid)
    for kind, operator in operators_on(grid).items():
        A = operator.bind(grid)
        variance = 0.5 + torch.rand(A.output_shape, dtype=torch.float64)
        y = random(*A.output_shape)
        mean, covariance, evidence = dense_results(q, A.to_dense(), y, variance.flatten().diag())
        p = q.posterior(y, variance, operator=operator, **precise)
        torch.testing.assert_close(p.mean, mean, **CLOSE, msg=lambda m, kind=kind: f"{kind}: {m}")
        torch.testing.assert_close(p.log_evidence, evidence, **CLOSE)
        exact = p.marginal_variance("exact").variance
        torch.testing.assert_close(exact.flatten(), covariance.diagonal(), **CLOSE)
        x = random(3, *grid)
        expected = MultivariateNormal(mean.flatten(), covariance, validate_args=False)
        torch.testing.assert_close(p.log_prob(x), expected.log_prob(x.flatten(1)), **CLOSE)
        torch.testing.assert_close(p.entropy(), expected.entropy(), **CLOSE)
        column = p.covariance_columns((0,) * len(grid))
        torch.testing.assert_close(column.flatten(), covariance[0], **CLOSE)


def test_operators_of_others(precise):
    q = random_gmrf("3x3", (4, 5))
    for other, matrix in ((Doubled(), None), (Sums(), torch.eye(4).double().repeat_interleave(5, 1))):
        A = 2 * torch.eye(20).double()[5:] if matrix is None else matrix
        y = random(*((3, 5) if matrix is None else (4,)))
        mean, *_ = dense_results(q, A, y, 0.3 * torch.eye(len(A)).double())
        torch.testing.assert_close(q.posterior(y, 0.3, operator=other, **precise).mean, mean, **CLOSE)


def test_batches_and_unobserved_places(precise):
    grid = (4, 5)
    q = random_gmrf("3x3", grid, batch=(2, 1))
    A = Convolution(random(3, 3, 3), "reflect", ndim=2)
    y, variance = random(2, 1, *grid), 0.5 + torch.rand(3, *grid, dtype=torch.float64)
    unobserved = torch.rand(grid) < 0.3
    y = y.masked_fill(unobserved, torch.nan)
    variance = variance.masked_fill(unobserved, torch.inf)
    p = q.posterior(y, variance, operator=A, **precise)
    assert p.batch_shape == (2, 3)
    assert p.sample((4,)).shape == (4, 2, 3, *grid)
    for i in range(2):
        for j in range(3):
            rows = ~unobserved.flatten()
            matrix = Convolution(A.kernel[j], "reflect", grid=grid).to_dense()[rows]
            one = bg.GMRF(q.loc[i, 0], q.precision_cholesky[i, 0])
            mean, _, evidence = dense_results(one, matrix, y[i, 0].flatten()[rows], variance[j].flatten()[rows].diag())
            torch.testing.assert_close(p.mean[i, j], mean, **CLOSE)
            torch.testing.assert_close(p.log_evidence[i, j], evidence, **CLOSE)
    wide = p.expand((5, 2, 3))
    torch.testing.assert_close(wide.mean, p.mean.expand(5, 2, 3, *grid), **CLOSE)


def test_correlated_noise(precise):
    q, noise = random_gmrf("3x3", (6, 5)), random_gmrf("5x5", (3, 3))
    A = Downsample(2) @ Convolution(random(3, 3))
    y = random(3, 3)
    N = dense(noise.precision_cholesky)
    mean, covariance, evidence = dense_results(q, A.bind((6, 5)).to_dense(), y - noise.loc, torch.linalg.inv(N @ N.mT))
    p = q.posterior(y, noise=noise, operator=A, **precise)
    torch.testing.assert_close(p.mean, mean, **CLOSE)
    torch.testing.assert_close(p.log_evidence, evidence, **CLOSE)
    torch.testing.assert_close(p.marginal_variance("exact").variance.flatten(), covariance.diagonal(), **CLOSE)


def test_samples_have_the_dense_mean_and_covariance(precise):
    count = 20_000
    q = random_gmrf("3x3", (4, 3))
    A = Convolution(random(3, 3), "reflect", grid=(4, 3))
    y = random(4, 3)
    mean, covariance, _ = dense_results(q, A.to_dense(), y, 0.4 * torch.eye(12).double())
    p = q.posterior(y, 0.4, operator=A, method=precise["method"], tolerance=1e-8)
    x = p.sample((count,)).flatten(1)
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean.flatten()).abs() <= 5 * (variance / count).sqrt()).all()
    assert ((x.T.cov() - covariance).abs() <= 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()).all()
    estimate = p.marginal_variance("monte_carlo", 4000)
    assert ((estimate.variance.flatten() - variance).abs() <= 5 * estimate.standard_error.flatten()).all()
    torch.testing.assert_close(estimate.standard_error, estimate.variance * (2 / 4000) ** 0.5)


def test_selections_are_observations_of_sites():
    q, y = random_gmrf("3x3", (4, 5)), random(4, 5)
    mask = torch.rand(4, 5) < 0.5
    variance = torch.rand(4, 5, dtype=torch.float64)
    variance[0] = 0
    for A, seen in (
        (Mask(mask), mask),
        (Downsample(2), torch.tensor([1, 0] * 2).bool()[:, None] & torch.tensor([1, 0, 1, 0, 1]).bool()),
    ):
        p = q.posterior(A(y), A(variance), operator=A)
        expected = q.posterior(y, variance.masked_fill(~seen, torch.inf))
        for name in ("mean", "variance", "log_evidence"):
            torch.testing.assert_close(getattr(p, name), getattr(expected, name), **CLOSE)


@pytest.mark.parametrize("quantity", ["mean", "rsample", "variance", "log_evidence", "log_prob"])
@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_gradients(quantity, method):
    stencil, grid = STENCILS["3x3"], (3, 2)
    x = random(*grid)

    def function(loc, log_diag, off_diag, y, variance, kernel):
        q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False)
        A = Downsample((2, 1)) @ Convolution(kernel, "reflect")
        p = q.posterior(y, variance, operator=A, method=method, tolerance=1e-12)
        torch.manual_seed(1)
        calls = {
            "rsample": lambda: p.rsample((2,)),
            "log_prob": lambda: p.log_prob(x),
            "variance": lambda: p.marginal_variance("exact").variance,
        }
        return calls[quantity]() if quantity in calls else getattr(p, quantity)

    tensors = [random(*grid), *random_factor(stencil.offsets, grid, nan_outside=False), random(2, 2)]
    tensors += [0.5 + torch.rand(2, 2, dtype=torch.float64), random(3, 2)]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


# 39, 2 and 6 iterations at 256 x 256; without a preconditioner that knows the blur, 150 do not suffice.
@pytest.mark.parametrize(("boundary", "most"), [("zero", 60), ("reflect", 10), ("periodic", 20)])
def test_blurs_converge(boundary, most):
    t = torch.arange(-8, 9, dtype=torch.float64)
    kernel = torch.exp(-t.square() / 8)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    grid = (72, 64)
    q = bg.GMRF(
        torch.zeros(grid, dtype=torch.float64),
        bg.StencilCholesky.from_precision(bg.matern_precision(grid, 10.0, 1), bg.Stencil.square(5)),
    )
    A = Convolution(kernel, boundary)
    seen = A(q.sample())
    noise = 0.01 * seen.std()
    p = q.posterior(seen + noise * torch.randn_like(seen), noise**2, operator=A, method="iterative")
    assert p.mean.isfinite().all()
    assert p.convergence.residual <= 1e-6
    assert p.convergence.iterations <= most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, precise):
    q = random_gmrf("3x3", (5, 4), batch=(2,), dtype=dtype)
    A = Convolution(torch.rand(3, 3).to(dtype))
    y = torch.randn(5, 4).to(dtype)
    mean = q.posterior(y, 0.5, operator=A, **precise).mean
    exact = bg.GMRF(q.loc.double(), q.precision_cholesky.to(torch.float64))
    expected = exact.posterior(y.double(), 0.5, operator=Convolution(A.kernel.double()), **precise).mean
    eps = torch.finfo(dtype).eps  # only the result is rounded
    torch.testing.assert_close(mean.double(), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (random(4, 5), {"operator": Wrong()}, ValueError, r"observation has shape|operator.adjoint is not the adjoint"),
        (random(4, 5), {"operator": Downsample(2)}, ValueError, r"observation has shape \(4, 5\), expected \(..., 2, 3\)"),
        (random(2, 3).float(), {"operator": Downsample(2)}, TypeError, "observation is torch.float32, the distribution is"),
        (random(4, 5), {"operator": torch.eye(20)}, TypeError, "operator is a Tensor, expected a LinearOperator"),
        (random(3), {"operator": Matrix(random(3, 19))}, ValueError, r"Matrix has 19 columns, .* the grid \(4, 5\)"),
        (random(4, 5), {"operator": Convolution(random(3))}, ValueError, r"Convolution has 1 axes, .* the grid \(4, 5\)"),
        (
            random(4, 5),
            {"operator": Convolution(random(3, 3)), "noise_variance": 0.0},
            ValueError,
            "noise_variance has entries that are 0, expected more than 0 with an operator: see constrain",
        ),
        (
            random(4, 5).masked_fill(torch.eye(4, 5).bool(), torch.nan),
            {"operator": Convolution(random(3, 3))},
            ValueError,
            "observation has NaN or infinite entries where something was observed",
        ),
        (random(3, 4, 5), {"operator": Convolution(random(2, 3, 3), ndim=2)}, ValueError, r"operator has batch shape \(2,\)"),
        (
            random(2, 3),
            {"operator": Downsample(2), "noise_variance": torch.ones(4, 5)},
            ValueError,
            r"noise_variance has shape \(4, 5\)",
        ),
    ],
)
def test_bad_input(y, options, error, message):
    q = random_gmrf("3x3", (4, 5))
    with pytest.raises(error, match=message):
        q.posterior(y, **{"noise_variance": 1.0, **options})


def test_wrong_adjoints_are_refused_where_arguments_are_checked():
    q, y = random_gmrf("3x3", (4, 5)), random(3, 5)
    with pytest.raises(ValueError, match="is not the adjoint of operator"):
        q.posterior(y, 1.0, operator=Wrong())
    bg.GMRF(q.loc, q.precision_cholesky, validate_args=False).posterior(y, 1.0, operator=Wrong())


def test_noise_on_another_grid():
    q = random_gmrf("3x3", (4, 5))
    with pytest.raises(ValueError, match=r"noise is on the grid \(4, 5\), the observation on \(2, 3\)"):
        q.posterior(random(2, 3), noise=q, operator=Downsample(2))


def test_direct_factors_of_large_grids_are_refused(monkeypatch):
    monkeypatch.setattr("banded_gmrf.inference.systems._MAX_DENSE_SITES", 19)
    q = random_gmrf("3x3", (4, 5))
    with pytest.raises(
        ValueError, match=r"method 'direct' with an operator needs at most 19 sites, the grid \(4, 5\) has more"
    ):
        q.posterior(random(4, 5), 1.0, operator=Convolution(random(3, 3)), method="direct")
