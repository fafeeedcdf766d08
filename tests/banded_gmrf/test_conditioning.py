import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from banded_gmrf import inference
from banded_gmrf.inference.conjugate_gradients import conjugate_gradients
from gmrf_kernels import ops
from tests.cases import FACTORS, STENCILS, dense, random_cholesky, smooth_cholesky
from tests.dense import random_factor

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=["direct", "iterative"])
def precise(request):
    """The iteration stops at a relative residual of 10⁻¹³, which cond(Λ) ≈ 10² turns into an error of the solution."""
    return {"method": request.param, "tolerance": 1e-13}


def random_gmrf(name, grid, batch=(), dtype=torch.float64):
    loc = torch.randn(*batch, *grid, dtype=torch.float64).to(dtype)
    return bg.GMRF(loc, random_cholesky(STENCILS[name], grid, batch, dtype))


def dense_posterior(q, y, noise_variance):
    """Mean and covariance given y = x + noise, from Σ: the noise may be 0 or infinite; one observation vector each."""
    n = q.event_shape.numel()
    L, m = dense(q.precision_cholesky), q.loc.double().flatten(-len(q.event_shape))
    covariance = torch.linalg.inv(L @ L.mT)
    y, noise = (t.double().expand(*q.batch_shape, *q.event_shape).reshape(-1, n) for t in (y, noise_variance))
    means, covariances = [], []
    for mean, Sigma, value, variance in zip(m.reshape(-1, n), covariance.reshape(-1, n, n), y, noise, strict=True):
        seen = variance.isfinite()
        gain = torch.linalg.solve(Sigma[seen][:, seen] + variance[seen].diag(), Sigma[seen]).T
        means.append(mean + gain @ (value - mean)[seen])
        covariances.append(Sigma - gain @ Sigma[seen])
    return torch.stack(means).reshape(*q.batch_shape, *q.event_shape), torch.stack(covariances)


def mixed_noise(shape):
    """Variances of which a third are 0, a third infinite, and the others between 0.5 and 1.5."""
    kind = torch.rand(shape, dtype=torch.float64)
    return torch.where(kind < 1 / 3, 0, torch.where(kind < 2 / 3, torch.inf, 0.5 + torch.rand(shape, dtype=torch.float64)))


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_means_equal_the_dense_ones(name, grid, precise):
    q = random_gmrf(name, grid, batch=(2,))
    y = torch.randn(2, *grid, dtype=torch.float64)
    for noise_variance in (torch.rand(grid, dtype=torch.float64) + 0.1, mixed_noise((2, *grid))):
        expected, _ = dense_posterior(q, y, noise_variance)
        values = y.masked_fill(noise_variance.isinf(), torch.nan)
        torch.testing.assert_close(q.posterior(values, noise_variance, **precise).mean, expected, **CLOSE)
    mask = torch.rand(2, *grid) < 0.5
    expected, _ = dense_posterior(q, y, torch.zeros((), dtype=torch.float64).masked_fill(~mask, torch.inf))
    torch.testing.assert_close(q.condition(mask, y.masked_fill(~mask, torch.nan), **precise).mean, expected, **CLOSE)


# The noise reaches one row further than the prior, or one less.
@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize(("stencil", "noise_stencil"), [("3x3", "5x5"), ("5x5", "3x3")])
def test_correlated_noise_gives_the_dense_posterior(stencil, noise_stencil, block_sites, monkeypatch, precise):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    grid = (5, 3)
    tensors, means = [], []
    for name, batch in ((stencil, (2, 1)), (noise_stencil, (3,))):
        tensors += [t.requires_grad_() for t in random_factor(STENCILS[name].offsets, grid, batch)]
        means.append(torch.randn(*batch, *grid, dtype=torch.float64, requires_grad=True))
    y = torch.randn(grid, dtype=torch.float64, requires_grad=True)
    q = bg.GMRF(means[0], bg.StencilCholesky(*tensors[:2], STENCILS[stencil]))
    noise = bg.GMRF(means[1], bg.StencilCholesky(*tensors[2:], STENCILS[noise_stencil]))
    posterior = q.posterior(y, noise=noise, **precise)
    prior_precision, noise_precision = (L @ L.mT for L in (dense(of.precision_cholesky) for of in (q, noise)))
    precision = prior_precision + noise_precision
    gain = torch.linalg.solve(precision, (noise_precision @ (y - noise.loc - q.loc).flatten(-2).unsqueeze(-1)))
    total = torch.linalg.inv(prior_precision) + torch.linalg.inv(noise_precision)
    seen = MultivariateNormal((q.loc + noise.loc).flatten(-2), total, validate_args=False)
    everything = [*tensors, *means, y]
    for actual, expected in (
        (posterior.mean, q.loc + gain.unflatten(-2, grid).squeeze(-1)),
        (posterior.log_evidence, seen.log_prob(y.flatten())),
    ):
        torch.testing.assert_close(actual, expected, **CLOSE)
        cotangent = torch.randn_like(actual)
        gradients = [torch.autograd.grad(value, everything, cotangent, retain_graph=True) for value in (actual, expected)]
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize(("stencil", "noise_stencil"), [("3x3", "5x5"), ("5x5", "3x3")])
def test_iterative_samples_given_correlated_noise_have_the_dense_mean_and_covariance(stencil, noise_stencil, monkeypatch):
    grid, n = (3, 2), 6
    tensors = [
        t.requires_grad_() for name in (stencil, noise_stencil) for t in random_factor(STENCILS[name].offsets, grid, (2,))
    ]
    q = bg.GMRF(torch.randn(2, *grid, dtype=torch.float64), bg.StencilCholesky(*tensors[:2], STENCILS[stencil]))
    noise = bg.GMRF(torch.randn(grid, dtype=torch.float64), bg.StencilCholesky(*tensors[2:], STENCILS[noise_stencil]))
    posterior = q.posterior(torch.randn(grid, dtype=torch.float64), noise=noise, method="iterative", tolerance=1e-13)
    # In place of the prior's random numbers and the noise's, together (2 n,): zeros, which give the mean, and unit vectors,
    # which give the columns of A in mean + A u.
    units = torch.cat([torch.zeros(1, 2 * n), torch.eye(2 * n)]).double().reshape(2 * n + 1, 2, 1, *grid)
    numbers = iter(units.expand(2 * n + 1, 2, 2, *grid).unbind(1))
    for module in (ops, inference.posterior):
        monkeypatch.setattr(module, "standard_normal", lambda shape, dtype, device: next(numbers).expand(shape))
    mean, *columns = posterior.rsample((2 * n + 1,)).flatten(2)
    monkeypatch.undo()
    torch.testing.assert_close(mean, posterior.mean.flatten(1), **CLOSE)
    A = torch.stack(columns, -1) - mean.unsqueeze(-1)
    precision = sum(L @ L.mT for L in (dense(of.precision_cholesky) for of in (q, noise)))
    actual, expected = A @ A.mT, torch.linalg.inv(precision)
    torch.testing.assert_close(actual, expected, **CLOSE)
    cotangent = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad(value, tensors, cotangent) for value in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("name", ["5x5", "volume", "line with a gap"])
def test_samples_have_the_dense_mean_and_covariance(name, precise):
    count = 20_000
    q = random_gmrf(name, (3, 2, 2)[: STENCILS[name].ndim])
    noise_variance = mixed_noise(q.event_shape)
    y = torch.randn(q.event_shape, dtype=torch.float64)
    x = q.posterior(y, noise_variance, **precise).sample((count,))
    assert torch.equal(x[:, noise_variance == 0], y[noise_variance == 0].expand(count, -1))
    mean, (covariance,) = dense_posterior(q, y, noise_variance)
    x, variance = x.flatten(1), covariance.diagonal()
    # Five standard errors of a sample mean, and of a sample covariance, whose variance is (Σᵢᵢ Σⱼⱼ + Σᵢⱼ²) / count; the rest
    # is rounding where a site is known exactly.
    assert ((x.mean(0) - mean.flatten()).abs() <= 5 * (variance.clamp(min=0) / count).sqrt() + 1e-10).all()
    error = 5 * ((variance[:, None] * variance + covariance.square()).clamp(min=0) / count).sqrt() + 1e-10
    assert ((x.T.cov() - covariance).abs() <= error).all()


def dense_log_evidence(q, y, noise_variance):
    """log N(y; loc, Σ + noise) of the sites that are observed, one observation vector each."""
    n = q.event_shape.numel()
    L, m = dense(q.precision_cholesky), q.loc.flatten(-len(q.event_shape))
    covariance = torch.linalg.inv(L @ L.mT).reshape(-1, n, n)
    y, noise, m = (t.expand(*q.batch_shape, *q.event_shape).reshape(-1, n) for t in (y, noise_variance, m.view_as(q.loc)))
    values = []
    for mean, Sigma, value, variance in zip(m, covariance, y, noise, strict=True):
        seen = variance.isfinite()
        observed = MultivariateNormal(mean[seen], Sigma[seen][:, seen] + variance[seen].diag(), validate_args=False)
        values.append(observed.log_prob(value[seen]) if seen.any() else mean.new_zeros(()))
    return torch.stack(values).reshape(q.batch_shape)


@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_log_evidence_equals_the_dense_one(name, grid, block_sites, monkeypatch, precise):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    q = random_gmrf(name, grid, batch=(2,))
    y, noise_variance = torch.randn(2, *grid, dtype=torch.float64), mixed_noise(grid)
    expected = dense_log_evidence(q, y, noise_variance)
    torch.testing.assert_close(q.posterior(y, noise_variance, **precise).log_evidence, expected, **CLOSE)
    torch.testing.assert_close(
        q.posterior(y, torch.ones(grid)).log_evidence, dense_log_evidence(q, y, torch.ones(grid)), **CLOSE
    )
    mask = torch.ones(grid, dtype=torch.bool)
    torch.testing.assert_close(q.condition(mask, y).log_evidence, q.log_prob(y), **CLOSE)
    torch.testing.assert_close(q.condition(~mask, y).log_evidence, torch.zeros(2, dtype=torch.float64), **CLOSE)


def test_gradients_of_the_log_evidence_equal_the_dense_ones(monkeypatch, precise):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)
    stencil, grid = STENCILS["5x5"], (4, 3)
    noise_variance = mixed_noise(grid)
    noisy = (noise_variance > 0) & noise_variance.isfinite()
    tensors = [torch.randn(grid, dtype=torch.float64), *random_factor(stencil.offsets, grid, (2,))]
    tensors += [torch.randn(grid, dtype=torch.float64), noise_variance[noisy]]
    loc, log_diag, off_diag, y, noise = (t.requires_grad_() for t in tensors)
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil))
    noise_variance = noise_variance.masked_scatter(noisy, noise)
    actual = q.posterior(y, noise_variance, **precise).log_evidence
    expected = dense_log_evidence(q, y, noise_variance)
    gradients = [torch.autograd.grad(value.sum(), tensors, retain_graph=True) for value in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_determinants_of_smooth_fields_over_many_rows(monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)
    q = bg.GMRF(torch.zeros(60, 6, dtype=torch.float64), smooth_cholesky((60, 6)))
    # Where nothing is observed the evidence is 1: ½ log |Λ| is taken from L on one side and from the elimination on the other.
    torch.testing.assert_close(q.posterior(q.loc, torch.inf).log_evidence.item(), 0.0, rtol=0, atol=1e-8)


def test_noise_that_is_zero_or_infinite_has_finite_gradients():
    q = random_gmrf("3x3", (3, 2))
    noise_variance = torch.tensor([[0.5, 0.0], [torch.inf, 1.5], [0.7, torch.inf]], dtype=torch.float64, requires_grad=True)
    posterior = q.posterior(torch.randn(3, 2, dtype=torch.float64), noise_variance)
    for value in (posterior.mean, posterior.rsample((2,)), posterior.log_evidence):
        (gradient,) = torch.autograd.grad(value.sum(), noise_variance, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[(noise_variance == 0) | noise_variance.isinf()] == 0).all()


def test_log_evidence_of_large_grids_is_refused(monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 12 * (2 * 3) ** 2 - 1)
    with pytest.raises(ValueError, match=r"log_evidence needs n \(r \+ 1\)² W² ≤ 2⁴⁰, which the grid \(4, 3\) exceeds"):
        random_gmrf("3x3", (4, 3)).posterior(torch.zeros(4, 3, dtype=torch.float64), 1.0).log_evidence  # noqa: B018


def test_batches_are_broadcast(precise):
    q = random_gmrf("3x3", (4, 3), batch=(2, 1))
    y = torch.randn(3, 4, 3, dtype=torch.float64)
    mask = torch.rand(5, 1, 1, 4, 3) < 0.5
    conditional = q.condition(mask, y, **precise)
    assert (conditional.batch_shape, conditional.event_shape) == ((5, 2, 3), (4, 3))
    assert conditional.sample((7,)).shape == (7, 5, 2, 3, 4, 3)
    assert conditional.sample().shape == conditional.mean.shape == (5, 2, 3, 4, 3)
    one = bg.GMRF(q.loc[1, 0], bg.StencilCholesky(q.log_diag[1, 0], q.off_diag[1, 0], q.stencil))
    torch.testing.assert_close(conditional.mean[4, 1, 2], one.condition(mask[4, 0, 0], y[2], **precise).mean, **CLOSE)


def test_everything_and_nothing_observed():
    q = random_gmrf("3x3", (4, 3))
    y = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(q.condition(torch.ones(4, 3, dtype=torch.bool), y).sample((2,)), y.expand(2, 4, 3))
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    torch.testing.assert_close(q.condition(nothing, y).mean, q.loc, **CLOSE)
    torch.manual_seed(1)
    x = q.condition(nothing, y).sample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(x, q.sample((5,)), **CLOSE)


def test_an_empty_batch():
    q = random_gmrf("3x3", (4, 3), batch=(0,))
    y = torch.zeros(4, 3, dtype=torch.float64)
    assert q.posterior(y, 1.0).mean.shape == q.posterior(y, 1.0).sample().shape == (0, 4, 3)
    assert random_gmrf("3x3", (4, 3)).posterior(y, 1.0).sample((0,)).shape == (0, 4, 3)


@pytest.mark.parametrize("draw", ["mean", "rsample"])
def test_gradients(draw, precise):
    stencil, grid = STENCILS["3x3"], (3, 2)
    noise_variance = torch.tensor([[0.5, 0.0], [torch.inf, 1.5], [0.7, torch.inf]], dtype=torch.float64)
    noisy = (noise_variance > 0) & noise_variance.isfinite()

    def draw_one(loc, log_diag, off_diag, y, noise):
        q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False)
        posterior = q.posterior(y, noise_variance.masked_scatter(noisy, noise), **precise)
        torch.manual_seed(1)
        return posterior.mean if draw == "mean" else posterior.rsample((2,))

    tensors = [torch.randn(grid, dtype=torch.float64), *random_factor(stencil.offsets, grid, (2,), nan_outside=False)]
    tensors += [torch.randn(grid, dtype=torch.float64), noise_variance[noisy]]
    assert torch.autograd.gradcheck(draw_one, [t.requires_grad_() for t in tensors])


def test_gradients_ignore_entries_that_do_not_exist():
    q = random_gmrf("5x5", (4, 3), batch=(2,))
    off_diag = q.off_diag.clone().requires_grad_()
    q = bg.GMRF(q.loc, bg.StencilCholesky(q.log_diag, off_diag, q.stencil))
    mask = torch.rand(4, 3) < 0.5
    q.condition(mask, torch.full((4, 3), torch.nan, dtype=torch.float64).masked_fill(mask, 1)).mean.sum().backward()
    assert off_diag.grad.isfinite().all()
    assert (off_diag.grad[off_diag.isnan()] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, precise):
    q = random_gmrf("5x5", (5, 4), batch=(2,), dtype=dtype)
    y, noise_variance = torch.randn(2, 5, 4).to(dtype), torch.rand(5, 4).to(dtype) + 0.5
    mean = q.posterior(y, noise_variance, **precise).mean
    assert mean.dtype == q.posterior(y, noise_variance).sample().dtype == dtype
    expected, _ = dense_posterior(q, y, noise_variance)
    # Solved in float64: only the result is rounded.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mean.double(), expected, rtol=eps, atol=eps)


# Neighbours correlate above 0.8 and cond(Λ) ≈ 10⁴. Warnings are errors here: 100 iterations have to do.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_fields_converge(dtype):
    q = bg.GMRF(torch.zeros(64, 64, dtype=dtype), smooth_cholesky((64, 64), dtype, nugget=1e-2))
    x, solver = q.sample(), {"method": "iterative", "max_iterations": 100}
    for noise in (0.01, 0.1, 1.0):
        q.posterior(
            x + noise * torch.randn_like(x), (noise * x.std().item()) ** 2, max_iterations=100, method="iterative"
        ).sample()
    halves, block, scattered = (torch.ones(64, 64, dtype=torch.bool) for _ in range(3))
    halves[32:] = False
    block[20:44, 20:44] = False
    scattered[torch.rand(64, 64) < 0.9] = False
    for mask in (halves, halves.T, halves.flip(0), block, scattered):
        q.condition(mask, x, **solver).sample()


def test_convergence_is_that_of_the_last_solve():
    q = random_gmrf("3x3", (6, 5))
    posterior = q.posterior(torch.randn(6, 5, dtype=torch.float64), 1.0, method="iterative")
    assert posterior.convergence is None
    assert posterior.rsample().isfinite().all()
    assert posterior.convergence.iterations > 0
    assert posterior.convergence.residual <= 1e-6
    posterior = q.posterior(torch.randn(6, 5, dtype=torch.float64), 1.0, method="direct")
    assert posterior.mean.isfinite().all()
    assert posterior.convergence.iterations == 0
    assert posterior.convergence.residual <= 1e-14
    everything = q.condition(torch.ones(6, 5, dtype=torch.bool), q.loc)
    assert torch.equal(everything.mean, q.loc)
    assert everything.convergence == (0, 0.0)


def test_a_solver_that_does_not_converge_warns_with_its_residual():
    q = bg.GMRF(torch.zeros(20, 20, dtype=torch.float64), smooth_cholesky((20, 20)))
    x = q.sample()
    posterior = q.posterior(x, 0.01 * x.var(), max_iterations=2, method="iterative")
    with pytest.warns(RuntimeWarning, match=r"stopped after 2 iterations at a relative residual of \d.\de-0\d, above"):
        posterior.mean  # noqa: B018
    assert posterior.convergence.iterations == 2
    assert posterior.convergence.residual > 1e-6


def test_the_residual_is_that_of_the_solution_and_not_the_recursion():
    matrix = random_cholesky(STENCILS["3x3"], (4, 3)).to_dense()
    matrix = matrix @ matrix.mT

    def rough(x):
        """A product that is only as precise as float32: the recursion goes on to 0, the solution does not."""
        return (x.flatten(-2) @ matrix).float().double().reshape(x.shape)

    b = torch.randn(4, 3, dtype=torch.float64)
    x, convergence = conjugate_gradients(rough, b, lambda r: r, 2, 1e-14, 500)
    assert convergence.iterations < 500
    assert convergence.residual == pytest.approx(float((b - rough(x)).norm() / b.norm()), rel=1e-12)
    assert convergence.residual > 1e-9


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_observed_values_that_are_not_finite(wrong, precise):
    mask, values = torch.rand(5, 4) < 0.5, torch.randn(5, 4, dtype=torch.float64)
    mask[3, 2], values[3, 2] = True, wrong
    q = random_gmrf("3x3", (5, 4))
    with pytest.raises(
        ValueError, match="values has NaN or infinite entries where something was observed, expected finite ones"
    ):
        q.condition(mask, values, **precise)
    for noise in ({"noise_variance": 1.0}, {"noise": q}):
        with pytest.raises(ValueError, match="observation has NaN or infinite entries where something was observed"):
            q.posterior(values, **noise, **precise)
    unchecked = bg.GMRF(q.loc, q.precision_cholesky, validate_args=False)
    for posterior in (unchecked.condition(mask, values, **precise), unchecked.posterior(values, 1.0, **precise)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the iteration
            assert posterior.mean.isnan().any()


@pytest.mark.parametrize(
    ("mask", "values", "error", "message"),
    [
        (torch.ones(4, 3), torch.zeros(4, 3), TypeError, "mask is torch.float32, expected a bool tensor"),
        ([True], torch.zeros(4, 3), TypeError, "mask is list, expected a bool tensor"),
        (torch.ones(3, 4).bool(), torch.zeros(4, 3), ValueError, r"mask has shape \(3, 4\), expected \(..., 4, 3\)"),
        (torch.ones(5, 4, 3).bool(), torch.zeros(4, 3), ValueError, r"mask has batch shape \(5,\), .* with \(2,\)"),
        (torch.ones(4, 3).bool(), torch.zeros(4, 3).double(), TypeError, "values is torch.float64, .* is torch.float32"),
        (torch.ones(4, 3).bool(), torch.zeros(3), ValueError, r"values has shape \(3,\), expected \(..., 4, 3\)"),
        (torch.ones(4, 3).bool(), torch.zeros(5, 4, 3), ValueError, r"values has batch shape \(5,\), .* with \(2,\)"),
    ],
)
def test_bad_conditions(mask, values, error, message):
    with pytest.raises(error, match=message):
        random_gmrf("3x3", (4, 3), (2,), torch.float32).condition(mask, values)


@pytest.mark.parametrize(
    ("observation", "noise_variance", "error", "message"),
    [
        (torch.zeros(3), 1.0, ValueError, r"observation has shape \(3,\), expected \(..., 4, 3\)"),
        (torch.zeros(4, 3), torch.ones(5), ValueError, r"noise_variance has shape \(5,\), .* with \(2, 4, 3\)"),
        (torch.zeros(4, 3), -1.0, ValueError, "noise_variance has negative or NaN entries"),
        (torch.zeros(4, 3), torch.nan, ValueError, "noise_variance has negative or NaN entries"),
    ],
)
def test_bad_posteriors(observation, noise_variance, error, message):
    with pytest.raises(error, match=message):
        random_gmrf("3x3", (4, 3), (2,), torch.float32).posterior(observation, noise_variance)


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance is 0.0, expected more than 0 and less than 1"),
        ({"tolerance": 1}, ValueError, "tolerance is 1, expected more than 0 and less than 1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance is nan, expected more than 0 and less than 1"),
        ({"max_iterations": 0}, ValueError, "max_iterations is 0, expected at least 1"),
        ({"max_iterations": 2.5}, TypeError, "max_iterations is 2.5, expected an integer"),
        ({"method": "exact"}, ValueError, "method is 'exact', expected 'auto', 'direct' or 'iterative'"),
    ],
)
def test_bad_solvers(solver, error, message):
    q = random_gmrf("3x3", (4, 3))
    for call in (
        lambda: q.posterior(q.loc, 1.0, **solver),
        lambda: q.posterior(q.loc, noise=q, **solver),
        lambda: q.condition(torch.ones(4, 3, dtype=torch.bool), q.loc, **solver),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        ({}, TypeError, "posterior takes either noise_variance or noise, got neither"),
        ({"noise_variance": 1.0, "noise": (4, 3)}, TypeError, "posterior takes either noise_variance or noise, got both"),
        ({"noise": (3, 4)}, ValueError, r"noise is on the grid \(3, 4\), the distribution on \(4, 3\)"),
        ({"noise": (5, 4, 3)}, ValueError, r"noise has batch shape \(5,\), .* with \(2,\)"),
        ({"noise": 1.0}, TypeError, "noise is float, expected GMRF"),
    ],
)
def test_bad_noise(noise, error, message):
    q = random_gmrf("3x3", (4, 3), (2,), torch.float32)
    if isinstance(noise.get("noise"), tuple):
        *batch, height, width = noise["noise"]
        noise = {**noise, "noise": random_gmrf("3x3", (height, width), batch, torch.float32)}
    with pytest.raises(error, match=message):
        q.posterior(torch.zeros(4, 3), **noise)


def test_batches_that_only_fit_the_distribution():
    q, y = random_gmrf("3x3", (4, 3), dtype=torch.float32), torch.zeros(4, 4, 3)
    message = r"has batch shape \(3,\), which does not broadcast with \(4,\) of the distribution and "
    with pytest.raises(ValueError, match=f"mask {message}values"):
        q.condition(torch.ones(3, 4, 3, dtype=torch.bool), y)
    with pytest.raises(ValueError, match=f"noise_variance {message}observation"):
        q.posterior(y, torch.ones(3, 4, 3))
    with pytest.raises(ValueError, match=f"noise {message}observation"):
        q.posterior(y, noise=random_gmrf("3x3", (4, 3), (3,), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_noise_has_any_dtype(dtype, precise):
    q = random_gmrf("3x3", (4, 3), (2,), dtype)
    noise = random_gmrf("5x5", (4, 3))
    y = torch.randn(4, 3).to(dtype)
    exact = bg.GMRF(q.loc.double(), bg.StencilCholesky(q.log_diag.double(), q.off_diag.double(), q.stencil))
    mean = q.posterior(y, noise=noise, **precise).mean
    assert mean.dtype == dtype
    expected = exact.posterior(y.double(), noise=noise, **precise).mean
    eps = torch.finfo(dtype).eps  # only the result is rounded
    torch.testing.assert_close(mean.double(), expected, rtol=eps, atol=eps)


def test_log_evidence_counts_the_reach_of_the_noise(monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 12 * (3 * 3) ** 2 - 1)
    q, noise = (random_gmrf(name, (4, 3)) for name in ("3x3", "5x5"))
    y = torch.zeros(4, 3, dtype=torch.float64)
    assert q.posterior(y, 1.0).log_evidence.isfinite()
    with pytest.raises(ValueError, match="log_evidence needs"):
        q.posterior(y, noise=noise).log_evidence  # noqa: B018
