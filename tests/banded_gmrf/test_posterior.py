"""A posterior as a distribution: everything that the dense normal distribution of its free sites has."""

import math

import pytest
import torch
from torch.distributions import Distribution, MultivariateNormal

import banded_gmrf as bg
from banded_gmrf.inference import posterior, priors, systems
from tests.banded_gmrf.test_conditioning import dense_log_evidence, dense_posterior, mixed_noise, random_gmrf
from tests.cases import FACTORS, STENCILS, dense
from tests.dense import random_factor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def free_normals(q, y, noise_variance):
    """The dense normal distributions of the sites whose noise is not 0, one of each of the batch, with these sites."""
    n = q.event_shape.numel()
    mean, covariance = dense_posterior(q, y, noise_variance)
    for m, Sigma, variance in zip(
        mean.reshape(-1, n), covariance, noise_variance.expand(*q.batch_shape, *q.event_shape).reshape(-1, n), strict=True
    ):
        free = variance > 0
        yield MultivariateNormal(m[free], Sigma[free][:, free], validate_args=False), free


@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_variances_densities_and_entropies_equal_the_dense_ones(name, grid, block_sites, monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    q = random_gmrf(name, grid, batch=(2,))
    y, noise_variance = random(2, *grid), mixed_noise((2, *grid))
    p = q.posterior(y.masked_fill(noise_variance.isinf(), torch.nan), noise_variance)
    mean, covariance = dense_posterior(q, y, noise_variance)
    assert isinstance(p, Distribution)
    assert (p.batch_shape, p.event_shape, p.has_rsample) == ((2,), grid, True)
    torch.testing.assert_close(p.mode, mean, **CLOSE)
    variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(2, *grid)
    known = noise_variance == 0
    torch.testing.assert_close(p.variance, variance.masked_fill(known, 0), **CLOSE)
    torch.testing.assert_close(p.stddev, variance.masked_fill(known, 0).sqrt(), **CLOSE)
    estimate = p.marginal_variance("exact")
    assert torch.equal(estimate.variance, p.variance)
    assert (estimate.standard_error == 0).all()
    x = y.where(known, random(3, 2, *grid))
    expected = [
        (normal.log_prob(x[:, i].flatten(1)[:, free]), normal.entropy())
        if free.any()
        else (torch.zeros(3).double(), torch.zeros(()).double())
        for i, (normal, free) in enumerate(free_normals(q, y, noise_variance))
    ]
    torch.testing.assert_close(p.log_prob(x), torch.stack([log_prob for log_prob, _ in expected], -1), **CLOSE)
    torch.testing.assert_close(p.entropy(), torch.stack([entropy for _, entropy in expected]), **CLOSE)
    n = torch.Size(grid).numel()
    sites = [torch.unravel_index(torch.tensor(site), grid) for site in (0, n // 2, n - 1)]
    sites = [tuple(int(i) for i in site) for site in sites]
    columns = p.covariance_columns(sites)
    expected = torch.stack([covariance[..., int(torch.arange(n).reshape(grid)[site])] for site in sites])
    both_free = ~known.flatten(1) & ~torch.stack([known[(slice(None), *site)] for site in sites])[..., None]
    torch.testing.assert_close(columns.flatten(2), expected.where(both_free, 0), **CLOSE)
    torch.testing.assert_close(p.covariance_columns(sites[1]), columns[1])


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_the_evidence_is_the_same_by_both_methods(method):
    q = random_gmrf("5x5", (5, 4), batch=(2,))
    y, noise_variance = random(2, 5, 4), mixed_noise((5, 4))
    p = q.posterior(y, noise_variance, method=method)
    torch.testing.assert_close(p.log_evidence, dense_log_evidence(q, y, noise_variance), **CLOSE)
    torch.testing.assert_close(p.log_evidence, q.log_prob(p.mean) + p.log_evidence - q.log_prob(p.mean), **CLOSE)


def test_correlated_noise():
    q, noise = random_gmrf("3x3", (5, 3), batch=(2, 1)), random_gmrf("5x5", (5, 3), batch=(3,))
    p = q.posterior(random(5, 3), noise=noise)
    precision = sum(L @ L.mT for L in (dense(of.precision_cholesky) for of in (q, noise)))
    covariance = torch.linalg.inv(precision)
    expected = MultivariateNormal(p.mean.flatten(-2), covariance, validate_args=False)
    x = random(4, 2, 3, 5, 3)
    torch.testing.assert_close(p.log_prob(x), expected.log_prob(x.flatten(-2)), **CLOSE)
    torch.testing.assert_close(p.variance.flatten(-2), covariance.diagonal(dim1=-2, dim2=-1), **CLOSE)
    torch.testing.assert_close(p.entropy(), expected.entropy(), **CLOSE)


@pytest.mark.parametrize("name", ["5x5", "volume", "line with a gap"])
def test_direct_samples_are_a_root_of_the_covariance(name, monkeypatch):
    grid = (3, 2, 2)[: STENCILS[name].ndim]
    n = torch.Size(grid).numel()
    q = random_gmrf(name, grid, batch=(2,))
    y, noise_variance = random(2, *grid), mixed_noise((2, *grid))
    p = q.posterior(y, noise_variance, method="direct")
    # In place of random numbers: zeros, which give the mean, and unit vectors, which give the columns of A in mean + A u.
    units = torch.cat([torch.zeros(1, n), torch.eye(n)]).double().reshape(n + 1, 1, *grid)
    monkeypatch.setattr(posterior, "standard_normal", lambda shape, dtype, device: units.expand(shape))
    mean, *columns = p.sample((n + 1,)).flatten(2)
    monkeypatch.undo()
    torch.testing.assert_close(mean, p.mean.flatten(1), **CLOSE)
    A = torch.stack(columns, -1) - mean.unsqueeze(-1)
    expected = dense_posterior(q, y, noise_variance)[1]
    known = (noise_variance == 0).flatten(1)
    torch.testing.assert_close(A @ A.mT, expected.masked_fill(known[:, None] | known[..., None], 0), **CLOSE)


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_monte_carlo_variances_have_the_error_that_they_state(method):
    count = 4000
    q = random_gmrf("3x3", (5, 4), batch=(2,))
    noise_variance = mixed_noise((5, 4))
    p = q.posterior(random(5, 4), noise_variance, method=method)
    exact, estimate = p.marginal_variance("exact").variance, p.marginal_variance("monte_carlo", count)
    error = estimate.variance - exact
    assert (error.abs() <= 5 * estimate.standard_error + 1e-10).all()
    assert (estimate.standard_error <= math.sqrt(2 / count) * estimate.variance).all()
    assert (estimate.standard_error[:, noise_variance == 0] == 0).all()
    # The scores z of 40 sites, correlated, have a mean square of about 1: an error stated √2 too small would give 2.
    z = [(p.marginal_variance("monte_carlo", 50).variance - exact)[:, noise_variance > 0] for _ in range(100)]
    stated = p.marginal_variance("monte_carlo", 100_000).standard_error[:, noise_variance > 0] * math.sqrt(100_000 / 50)
    assert abs((torch.stack(z) / stated).square().mean() - 1) < 0.2


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_expanded_posteriors(method):
    q = random_gmrf("3x3", (4, 3), batch=(2, 1))
    mask, y = torch.rand(4, 3) < 0.5, random(3, 4, 3)
    p = q.condition(mask, y, method=method)
    wide = p.expand((5, 2, 3))
    assert (wide.batch_shape, wide.event_shape) == ((5, 2, 3), (4, 3))
    assert wide.sample((2,)).shape == (2, 5, 2, 3, 4, 3)
    for name in ("mean", "log_evidence", *(("variance", "stddev") if method == "direct" else ())):
        torch.testing.assert_close(getattr(wide, name), getattr(p, name).expand(5, *getattr(p, name).shape), **CLOSE)
    x = p.sample()
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x).expand(5, 2, 3), **CLOSE)
    assert wide.entropy().shape == (5, 2, 3)
    assert torch.distributions.Independent(p, 2).log_prob(x).shape == ()
    with pytest.raises(RuntimeError):
        p.expand((4,))


def test_one_factorisation_is_kept(monkeypatch):
    made = []
    block_cholesky = systems.block_cholesky
    monkeypatch.setattr(systems, "block_cholesky", lambda *args: made.append(1) or block_cholesky(*args))
    q = random_gmrf("3x3", (6, 5))
    p = q.posterior(random(6, 5), mixed_noise((6, 5)))
    assert not made
    for _ in range(2):
        p.mean, p.variance, p.entropy(), p.log_evidence, p.log_prob(p.sample((3,))), p.expand((2,)).mean
        p.covariance_columns((0, 0)), p.marginal_variance("monte_carlo", 10)
    assert len(made) == 1


def test_auto_is_iterative_beyond_a_few_seconds(monkeypatch):
    q = random_gmrf("3x3", (6, 5), batch=(2,))
    y = random(6, 5)
    assert q.posterior(y, 1.0)._system.direct
    operations, numbers = 2 * 30 * (2 * 5) ** 2, 2 * 30 * 2 * 5  # both of the batch
    for name, limit in (("_AUTO_OPERATIONS", operations), ("_AUTO_NUMBERS", numbers)):
        monkeypatch.setattr(priors, name, limit)
        assert q.posterior(y, 1.0)._system.direct
        monkeypatch.setattr(priors, name, limit - 1)
        p = q.posterior(y, 1.0)
        assert not p._system.direct
        assert (p.marginal_variance(num_samples=2).standard_error > 0).all()
        assert (p.marginal_variance("exact").standard_error == 0).all()
        monkeypatch.undo()


def test_grids_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 12 * (2 * 3) ** 2 - 1)
    q = random_gmrf("3x3", (4, 3))
    p = q.posterior(random(4, 3), 1.0, method="iterative")
    needs = r"needs n \(r \+ 1\)² W² ≤ 2⁴⁰, which the grid \(4, 3\) exceeds"
    with pytest.raises(ValueError, match=f"an exact variance {needs}"):
        p.marginal_variance("exact")
    for name, call in (("log_prob", lambda: p.log_prob(q.loc)), ("entropy", p.entropy)):
        with pytest.raises(ValueError, match=f"{name} {needs}"):
            call()
    with pytest.raises(ValueError, match=f"method 'direct' {needs}"):
        q.posterior(random(4, 3), 1.0, method="direct")
    assert p.variance.isfinite().all()


def posterior_of(tensors, stencil, noise_variance, noisy, method="direct"):
    loc, log_diag, off_diag, y, noise = tensors
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False)
    return q.posterior(y, noise_variance.masked_scatter(noisy, noise), method=method, tolerance=1e-13)


QUANTITIES = {
    "mean": lambda p, x: p.mean,
    "rsample": lambda p, x: p.rsample((2,)),
    "variance": lambda p, x: p.variance,
    "stddev": lambda p, x: p.stddev,
    "log_prob": lambda p, x: p.log_prob(x),
    "entropy": lambda p, x: p.entropy(),
    "log_evidence": lambda p, x: p.log_evidence,
    "covariance_columns": lambda p, x: p.covariance_columns((1, 0)),
}


def differentiable_case():
    stencil, grid = STENCILS["3x3"], (3, 2)
    noise_variance = torch.tensor([[0.5, 0.0], [torch.inf, 1.5], [0.7, torch.inf]], dtype=torch.float64)
    noisy = (noise_variance > 0) & noise_variance.isfinite()
    tensors = [random(*grid), *random_factor(stencil.offsets, grid, nan_outside=False), random(*grid), noise_variance[noisy]]
    x = random(*grid)

    def function(quantity, method="direct"):
        def of(*tensors):
            torch.manual_seed(1)
            p = posterior_of(tensors, stencil, noise_variance, noisy, method)
            return QUANTITIES[quantity](p, tensors[3].where(noise_variance == 0, x))

        return of

    return function, tensors


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("quantity", list(QUANTITIES))
def test_gradients(quantity, method):
    function, tensors = differentiable_case()
    assert torch.autograd.gradcheck(function(quantity, method), [t.requires_grad_() for t in tensors])


def test_a_second_backward_pass_needs_no_graph_of_the_first():
    q = random_gmrf("3x3", (4, 3))
    log_diag, off_diag = q.log_diag.clone().requires_grad_(), q.off_diag.clone().requires_grad_()
    p = bg.GMRF(q.loc, bg.StencilCholesky(log_diag, off_diag, q.stencil)).posterior(random(4, 3), mixed_noise((4, 3)))
    for quantity in ("mean", "variance", "entropy", "mean", "variance", "entropy"):
        QUANTITIES[quantity](p, None).sum().backward()


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("quantity", list(QUANTITIES))
def test_second_derivatives_are_right_or_refused(quantity, method):
    function, tensors = differentiable_case()
    for number, tensor in enumerate(tensors):
        for other in tensors:
            other.requires_grad_(other is tensor)

        def first(argument, number=number):
            inputs = [*tensors[:number], argument, *tensors[number + 1 :]]
            value = function(quantity, method)(*inputs).square().sum()
            if not value.requires_grad:
                return None
            return torch.autograd.grad(value, argument, create_graph=True, allow_unused=True)[0]

        weights, step = torch.randn_like(tensor), 1e-5 * torch.randn_like(tensor)
        gradient = first(tensor)
        if gradient is None or not gradient.requires_grad:
            continue
        try:
            (second,) = torch.autograd.grad((gradient * weights).sum(), tensor)
        except NotImplementedError:
            assert quantity in ("mean", "covariance_columns", "rsample") or method == "iterative"
            continue
        ahead, behind = (first((tensor + by).detach().requires_grad_()).detach() for by in (step, -step))
        slope = ((ahead - behind) * weights).sum() / 2
        torch.testing.assert_close((second * step).sum(), slope, rtol=1e-4, atol=1e-10)


TRANSFORMATIONS = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at the first forward derivative
@pytest.mark.parametrize("transformation", list(TRANSFORMATIONS))
@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name != "rsample"])
def test_transformations_of_direct_posteriors(quantity, transformation):
    function, tensors = differentiable_case()
    for number in (1, 3):  # log_diag, the observation

        def of(argument, number=number):
            return function(quantity)(*tensors[:number], argument, *tensors[number + 1 :]).square().sum()

        actual = TRANSFORMATIONS[transformation](of)(tensors[number])
        plain = tensors[number].clone().requires_grad_()
        value = of(plain) + 0 * plain.sum()
        (expected,) = torch.autograd.grad(value, plain)
        if transformation == "hessian":
            step = 1e-5 * torch.randn_like(plain)
            ahead, behind = (
                torch.autograd.grad(of(at) + 0 * at.sum(), at)[0]
                for at in ((plain + by).detach().requires_grad_() for by in (step, -step))
            )
            expected = (ahead - behind) / 2
            torch.testing.assert_close((actual * step).sum((-1, -2)), expected, rtol=1e-4, atol=1e-10)
        else:
            torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transformations_of_iterative_posteriors_are_refused():
    function, tensors = differentiable_case()
    for transformation in (torch.func.grad, torch.func.jacfwd, torch.func.vmap):
        with pytest.raises(NotImplementedError, match="the method 'iterative' takes no transformations"):
            transformation(lambda y: function("mean", "iterative")(*tensors[:3], y, tensors[4]).sum())(
                tensors[3] if transformation is not torch.func.vmap else torch.stack([tensors[3], tensors[3]])
            )


def test_vmap_of_direct_posteriors():
    function, tensors = differentiable_case()
    many = random(3, 3, 2)
    for quantity in ("mean", "variance", "log_evidence", "covariance_columns", "entropy"):
        for number in (1, 3):

            def of(argument, number=number, quantity=quantity):
                return function(quantity)(*tensors[:number], argument, *tensors[number + 1 :])

            expected = torch.stack([of(one) for one in many])
            torch.testing.assert_close(torch.func.vmap(of, randomness="same")(many), expected, **CLOSE)


def test_known_sites_have_no_other_value():
    q = random_gmrf("3x3", (4, 3))
    mask, y = torch.rand(4, 3) < 0.5, random(4, 3)
    mask[1, 1] = True
    p = q.condition(mask, y)
    other = p.sample((2,))
    other[1, 1, 1] += 1e-3
    with pytest.raises(ValueError, match="value differs from the observation at a site that is known exactly"):
        p.log_prob(other)
    unchecked = bg.GMRF(q.loc, q.precision_cholesky, validate_args=False).condition(mask, y)
    assert unchecked.log_prob(other).isfinite().tolist() == [True, False]
    assert unchecked.log_prob(other)[1] == -torch.inf
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(other.where(torch.tensor(True), torch.nan).masked_fill(mask, torch.nan))
    for bad, error, message in (
        (other.float(), TypeError, "value is torch.float32, the distribution is torch.float64"),
        (other[:, 1:], ValueError, r"value has shape \(2, 3, 3\), expected \(..., 4, 3\)"),
    ):
        with pytest.raises(error, match=message):
            p.log_prob(bad)


def test_bad_variance_methods():
    p = random_gmrf("3x3", (4, 3)).posterior(random(4, 3), 1.0)
    with pytest.raises(ValueError, match="method is 'direct', expected 'auto', 'exact' or 'monte_carlo'"):
        p.marginal_variance("direct")
    with pytest.raises(ValueError, match="num_samples is 0, expected at least 1"):
        p.marginal_variance("monte_carlo", 0)


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_dtypes_and_empty_batches(method):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = random_gmrf("5x5", (5, 4), batch=(2,), dtype=dtype)
        y, noise_variance = random(2, 5, 4).to(dtype), mixed_noise((5, 4))
        p = q.posterior(y, noise_variance, method=method)
        assert p.mean.dtype == p.variance.dtype == p.sample().dtype == dtype
        x = p.sample((3,))
        assert p.log_prob(x).dtype == p.entropy().dtype == p.covariance_columns((0, 0)).dtype == torch.float32
        assert p.log_prob(x).isfinite().all()
    for q in (random_gmrf("3x3", (4, 3), batch=(0,)), random_gmrf("3x3", (4, 3), batch=(2, 0))):
        p = q.posterior(random(4, 3), 1.0, method=method)
        assert p.variance.shape == p.stddev.shape == (*q.batch_shape, 4, 3)
        assert p.entropy().shape == p.log_evidence.shape == q.batch_shape
        assert p.log_prob(p.sample((2,))).shape == (2, *q.batch_shape)
        assert p.covariance_columns([(0, 0)]).shape == (1, *q.batch_shape, 4, 3)
