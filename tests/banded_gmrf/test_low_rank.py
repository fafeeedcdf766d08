"""A GMRF with a low-rank part, and what it is given observations, against dense float64 linear algebra."""

import io
import math
import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import banded_gmrf as bg
from banded_gmrf import low_rank_density
from tests.cases import STENCILS, dense, random_cholesky

# Here and there as many factors as distributions.
pytestmark = pytest.mark.filterwarnings("ignore:factors has shape")

# Dense inverses lose a multiple of cond ≈ 10³ roundings of float64 (10⁻¹⁶).
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

CASES = [
    ("3x3", (3, 4)),
    ("5x5", (5, 3)),
    ("diagonal", (2, 2)),
    ("line with a gap", (7,)),
    ("volume", (2, 1, 4)),
    ("cross", (1, 1)),
]
# Of loc, of the factor L, and of the factors.
BATCHES = [((), (), ()), ((2,), (), (3, 1)), ((3, 1), (2,), ()), ((), (), (2,))]


def random_field(name, grid, rank, loc_batch=(), batch=(), factors_batch=(), dtype=torch.float64):
    loc = torch.randn(*loc_batch, *grid).to(dtype)
    factors = torch.randn(*factors_batch, rank, *grid).to(dtype)
    return bg.LowRankGMRF(loc, random_cholesky(STENCILS[name], grid, batch, dtype), factors)


def dense_covariance(q):
    L, rows = dense(q.precision_cholesky), q.factors.double().flatten(-len(q.event_shape))
    return torch.cholesky_inverse(L) + rows.mT @ rows if L.numel() else torch.zeros_like(L)


def multivariate_normal(q):
    return MultivariateNormal(q.loc.double().flatten(-len(q.event_shape)), dense_covariance(q), validate_args=False)


def given(p, gain, noise, values):
    """The dense p given values = gain x + noise with this covariance: mean, covariance, and the values' own distribution."""
    cross = p.covariance_matrix @ gain.mT
    seen = MultivariateNormal((gain @ p.mean.unsqueeze(-1)).squeeze(-1), gain @ cross + noise, validate_args=False)
    weights = torch.linalg.solve(seen.covariance_matrix, cross.mT).mT
    mean = p.mean + (weights @ (values - seen.mean).unsqueeze(-1)).squeeze(-1)
    return mean, p.covariance_matrix - weights @ cross.mT, seen.log_prob(values)


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_density_moments_and_entropy_equal_the_dense_ones(name, grid, batches):
    ndim, n = len(grid), torch.Size(grid).numel()
    for rank in {0, 1, min(3, n), n}:
        q = random_field(name, grid, rank, *batches)
        p = multivariate_normal(q)
        shape = torch.broadcast_shapes(*batches)
        x = q.sample((5,))
        assert q.batch_shape == shape
        assert q.rank == rank
        assert x.shape == (5, *shape, *grid)
        torch.testing.assert_close(q.log_prob(x), p.log_prob(x.flatten(-ndim)), **CLOSE)
        torch.testing.assert_close(q.log_prob(x[0]), p.log_prob(x[0].flatten(-ndim)), **CLOSE)
        torch.testing.assert_close(q.entropy(), p.entropy(), **CLOSE)
        torch.testing.assert_close(q.variance, p.variance.reshape(q.loc.shape), **CLOSE)
        torch.testing.assert_close(q.covariance_matrix, p.covariance_matrix, **CLOSE)
        torch.testing.assert_close(q.precision_matrix, p.precision_matrix, rtol=1e-7, atol=1e-8)
        columns = p.covariance_matrix[..., [0, -1]].movedim(-1, 0).unflatten(-1, grid)
        last = tuple(size - 1 for size in grid)
        torch.testing.assert_close(q.covariance_columns([(0,) * ndim, last]), columns, **CLOSE)
        torch.testing.assert_close(q.covariance_columns(last), columns[1], **CLOSE)
        # A whitened value has the length that the density knows.
        squares = q.whiten(x).square().flatten(-ndim).sum(-1)
        torch.testing.assert_close(squares, 2 * (q.log_prob(q.loc) - q.log_prob(x)), **CLOSE)


def test_whitened_unit_vectors_are_a_root_of_the_precision():
    q = random_field("3x3", (3, 4), 3)
    root = q.whiten(q.loc + torch.eye(12, dtype=torch.float64).unflatten(-1, (3, 4))).flatten(-2)
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(dense_covariance(q)), **CLOSE)


def test_gradients_equal_the_dense_ones():
    q = random_field("3x3", (3, 4), 2, (3, 1), (2,), ())
    leaves = [t.detach().clone().requires_grad_() for t in (q.loc, q.log_diag, q.off_diag, q._factors, q.sample((4,)))]
    loc, log_diag, off_diag, factors, x = leaves
    q = bg.LowRankGMRF(loc, bg.StencilCholesky(log_diag, off_diag, q.stencil), factors, validate_args=False)
    p = multivariate_normal(q)
    for actual, expected in (
        (q.log_prob(x), p.log_prob(x.flatten(-2))),
        (q.entropy(), p.entropy()),
        (q.variance, p.variance.unflatten(-1, (3, 4))),
    ):
        cotangent = torch.randn_like(actual)
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        for a, e in zip(*(torch.autograd.grad(v, leaves, cotangent, **options) for v in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


# Batches with which the density is one fused operation: that of the value, and that of all that the distribution is made of.
FUSED = [((), ()), ((3,), ()), ((), (2,)), ((2, 3), (2, 1))]


def density_of_leaves(sample=(), batch=(), dtype=torch.float64, grid=(3, 4), rank=3):
    """The log density as a function of these: the residual, the coefficients of L and the factors."""
    L = random_cholesky(STENCILS["3x3"], grid, batch, dtype)
    leaves = [torch.randn(*sample, *batch, *grid).to(dtype), *L.coefficients[:2], torch.randn(*batch, rank, *grid).to(dtype)]

    def density(residual, log_diag, off_diag, factors):
        L = bg.StencilCholesky(log_diag, off_diag, STENCILS["3x3"])
        return bg.LowRankGMRF(torch.zeros_like(log_diag), L, factors, validate_args=False).log_prob(residual)

    return density, [t.detach().clone().requires_grad_() for t in leaves]


@pytest.mark.parametrize(("sample", "batch"), FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_density_equals_the_composed_one(sample, batch, dtype, monkeypatch):
    density, leaves = density_of_leaves(sample, batch, dtype)
    fused = low_rank_density._fused
    calls = []
    monkeypatch.setattr(low_rank_density, "_fused", lambda *args: calls.append(1) or fused(*args))
    value = density(*leaves)
    with torch.no_grad():
        assert torch.equal(density(*leaves), value)
    assert len(calls) == 2
    with monkeypatch.context() as patch:
        patch.setattr(low_rank_density, "nothing_intervenes", lambda tensors: False)
        composed = density(*leaves)
    assert len(calls) == 2
    # Float32 sums of a dozen numbers; gradients in bfloat16 are rounded once.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value, composed, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(value)
    rounding = max(tolerance, 2 * torch.finfo(dtype).eps)
    for some in (leaves, leaves[:1], leaves[1:2], leaves[2:3], leaves[3:]):
        of_both = [torch.autograd.grad(v, some, cotangent, retain_graph=True) for v in (value, composed)]
        for actual, expected in zip(*of_both, strict=True):
            assert actual.dtype == expected.dtype == dtype
            torch.testing.assert_close(actual, expected, rtol=rounding, atol=10 * rounding)


@pytest.mark.parametrize(("sample", "batch"), FUSED, ids=str)
def test_higher_and_batched_derivatives_of_the_fused_density(sample, batch):
    density, leaves = density_of_leaves(sample, batch, grid=(2, 3), rank=2)
    assert torch.autograd.gradcheck(density, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(density, leaves)


def test_a_gradient_of_the_fused_density_stays_on_its_own_way():
    """Where one input is made of another, a second derivative counts the way between them once."""
    density, (residual, log_diag, off_diag, factors) = density_of_leaves()

    def of_log_diag(log_diag):
        return density(residual.detach() * log_diag, log_diag, off_diag.detach(), factors.detach() * log_diag.exp())

    assert torch.autograd.gradgradcheck(of_log_diag, (log_diag,))


def test_saved_tensors_of_the_fused_density_may_be_moved():
    density, leaves = density_of_leaves((2,), (3,))
    expected = torch.autograd.grad(density(*leaves).sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        actual = torch.autograd.grad(density(*leaves).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradients_of_the_fused_density_hold_no_more_than_they_are():
    """Neither a graph, where none was asked for, nor the gradients of all factors beside that of one residual."""
    density, leaves = density_of_leaves((2,), rank=5)
    cotangents = torch.eye(2, dtype=torch.float64)
    batched = torch.autograd.grad(density(*leaves), leaves, cotangents, is_grads_batched=True)
    assert not any(gradient.requires_grad for gradient in batched)
    for one, of_one in zip(cotangents, zip(*batched, strict=True), strict=True):
        for actual, expected in zip(of_one, torch.autograd.grad(density(*leaves), leaves, one), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for some in (leaves[:1], leaves):
        residual_bar = torch.autograd.grad(density(*leaves).sum(), some)[0]
        assert residual_bar.untyped_storage().nbytes() == residual_bar.nbytes


def test_factors_alike_for_all_images_are_fused(monkeypatch):
    L = random_cholesky(STENCILS["3x3"], (3, 4), (2, 3))
    x, factors = torch.randn(5, 2, 3, 3, 4).double(), torch.randn(2, 3, 4).double().requires_grad_()

    def density():
        return bg.LowRankGMRF(torch.zeros(3, 4).double(), L, factors).log_prob(x)

    with monkeypatch.context() as patch:
        patch.setattr(low_rank_density, "_fused", None)
        patch.setattr(low_rank_density, "nothing_intervenes", lambda tensors: False)
        composed = density()
    monkeypatch.setattr(low_rank_density, "_composed", None)
    value = density()
    torch.testing.assert_close(value, composed, **CLOSE)
    actual, expected = (torch.autograd.grad(v.square().sum(), factors)[0] for v in (value, composed))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_gradients_of_the_fused_density_with_large_factors(scale, monkeypatch):
    """In float64 they lose no more digits than those of the composed one, which lose 10⁻¹⁶ times the scale."""
    density, leaves = density_of_leaves()
    leaves[3] = (scale * leaves[3].detach()).requires_grad_()
    leaves[0] = (leaves[0].detach() + torch.einsum("r,rhw->hw", torch.randn(3).double(), leaves[3].detach())).requires_grad_()
    fused = torch.autograd.grad(density(*leaves), leaves)
    monkeypatch.setattr(low_rank_density, "nothing_intervenes", lambda tensors: False)
    for actual, expected in zip(fused, torch.autograd.grad(density(*leaves), leaves), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14 * scale * expected.abs().max().item())


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("equal", [False, True])
def test_factors_that_are_tiny_equal_or_large(scale, equal):
    """Against a dense density whose factors are orthogonal, so that nothing in it cancels."""
    n, grid, st = 12, (3, 4), STENCILS["diagonal"]
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    rows = scale * (basis[:1].expand(3, n) if equal else basis[:3])
    L = bg.StencilCholesky(torch.zeros(grid).double(), torch.zeros(0, *grid).double(), st)
    q = bg.LowRankGMRF(torch.zeros(grid).double(), L, rows.unflatten(-1, grid))
    eigenvalues = torch.ones(n, dtype=torch.float64)
    eigenvalues[: 1 if equal else 3] += scale**2 * (3 if equal else 1)
    x = q.sample((20,))
    coordinates = x.flatten(-2) @ basis.mT
    expected = -0.5 * (coordinates.square() / eigenvalues + eigenvalues.log() + math.log(2 * math.pi)).sum(-1)
    # The values themselves are rounded at 10⁻¹⁶ of their size, `scale`; three equal factors of 10⁶ add 10¹² to I in float64.
    tolerance = max(1e-11, 1e-15 * scale * 10)
    torch.testing.assert_close(q.log_prob(x), expected, rtol=tolerance, atol=max(1e-10, 1e-4 * (scale > 1e5 and equal)))
    gradient = torch.autograd.grad(q.log_prob(x.requires_grad_()).sum(), x)[0].flatten(-2)
    precision = (basis.mT / eigenvalues) @ basis
    torch.testing.assert_close(gradient, -(x.flatten(-2) @ precision).detach(), rtol=1e-3, atol=1e-8 * max(1.0, scale))


def test_samples_have_the_covariance():
    q = random_field("3x3", (3, 4), 2)
    y = q.condition(torch.arange(12).reshape(3, 4) % 5 == 0, q.sample())
    for distribution in (q, y):
        covariance = distribution.covariance_columns([(i, j) for i in range(3) for j in range(4)]).flatten(1)
        samples = distribution.sample((20_000,)).flatten(1)
        stddev = covariance.diagonal().sqrt().clamp(min=1e-9)
        # The error of an entry has a standard deviation of at most √(2 / count) in units of the standard deviations.
        error = (samples.T.cov() - covariance) / stddev / stddev[:, None]
        assert error.abs().max() < 6 * (2 / 20_000) ** 0.5
        torch.testing.assert_close(
            samples.mean(0), distribution.mean.flatten(), rtol=0, atol=6 * float(stddev.max()) / 20_000**0.5
        )


@pytest.mark.parametrize(
    ("batches", "method"), [*((batches, "direct") for batches in BATCHES), (BATCHES[1], "iterative")], ids=str
)
def test_posteriors_equal_the_dense_ones(batches, method):
    grid, n = (3, 4), 12
    close = CLOSE if method == "direct" else {"rtol": 1e-6, "atol": 1e-6}
    solver = {"method": method, "tolerance": 1e-12}
    q = random_field("3x3", grid, 2, *batches)
    p, y = multivariate_normal(q), q.sample()
    correlated = bg.GMRF(torch.randn(grid).double(), random_cholesky(STENCILS["cross"], grid))
    noise = torch.linalg.inv(correlated.precision_matrix)
    operator = bg.operators.Matrix(torch.randn(5, n, dtype=torch.float64), grid)
    eye, seen = torch.eye(n, dtype=torch.float64), operator(y)
    for posterior, expected in (
        (q.posterior(y, 0.3, **solver), given(p, eye, 0.3 * eye, y.flatten(-2))),
        (q.posterior(y, noise=correlated, **solver), given(p, eye, noise, (y - correlated.loc).flatten(-2))),
        (q.posterior(seen, 0.3, operator=operator, **solver), given(p, operator.to_dense(), 0.3 * eye[:5, :5], seen)),
    ):
        mean, covariance, evidence = expected
        dense_posterior = MultivariateNormal(mean, 0.5 * (covariance + covariance.mT), validate_args=False)
        x = posterior.sample((3,))
        assert x.shape == (3, *q.batch_shape, *grid)
        torch.testing.assert_close(posterior.mean.flatten(-2), mean, **close)
        exact = posterior.marginal_variance("exact").variance.flatten(-2)
        torch.testing.assert_close(exact, dense_posterior.variance, **close)
        torch.testing.assert_close(posterior.covariance_columns((1, 2)).flatten(-2), covariance[..., 6], **close)
        torch.testing.assert_close(posterior.log_evidence, evidence, **close)
        torch.testing.assert_close(posterior.log_prob(x), dense_posterior.log_prob(x.flatten(-2)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(posterior.entropy(), dense_posterior.entropy(), **close)


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_conditioning_equals_the_dense_one(batches):
    grid = (3, 4)
    q = random_field("3x3", grid, 3, *batches)
    p, y, mask = multivariate_normal(q), q.sample(), torch.rand(grid) < 0.4
    known, free = mask.flatten(), ~mask.flatten()
    c = q.condition(mask, y.where(mask, torch.nan))
    mean, covariance, evidence = given(p, torch.eye(12).double()[known], torch.zeros(()).double(), y.flatten(-2)[..., known])
    expected = MultivariateNormal(mean[..., free], covariance[..., free, :][..., free], validate_args=False)
    x = c.sample((3,))
    assert torch.equal(x[..., mask], y[..., mask].expand(3, *y[..., mask].shape))
    torch.testing.assert_close(c.mean.flatten(-2), mean, **CLOSE)
    torch.testing.assert_close(c.variance.flatten(-2), covariance.diagonal(dim1=-2, dim2=-1), **CLOSE)
    torch.testing.assert_close(c.log_prob(x), expected.log_prob(x.flatten(-2)[..., free]), **CLOSE)
    torch.testing.assert_close(c.entropy(), expected.entropy(), **CLOSE)
    torch.testing.assert_close(c.log_evidence, evidence, **CLOSE)
    with pytest.raises(ValueError, match="value differs from the observation at a site that is known exactly"):
        c.log_prob(x + mask)
    wider = c.expand((4, *c.batch_shape))
    assert wider.sample().shape == (4, *c.batch_shape, *grid)
    torch.testing.assert_close(wider.log_prob(x[0]), c.log_prob(x[0]).expand(wider.batch_shape), **CLOSE)
    assert wider.prior.batch_shape == wider.batch_shape


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_weights_of_a_posterior_equal_the_dense_ones(batches):
    q = random_field("3x3", (3, 4), 2, *batches)
    p, y = multivariate_normal(q), q.sample()
    posterior = q.posterior(y, 0.3)
    factors = q.factors.flatten(-2)  # the covariance of w and x
    gain = torch.linalg.solve(p.covariance_matrix + 0.3 * torch.eye(12).double(), factors.mT).mT
    mean = (gain @ (y - q.loc).flatten(-2).unsqueeze(-1)).squeeze(-1)
    for weights in (posterior.weights, posterior.expand((3, *posterior.batch_shape)).weights):
        shape = weights.batch_shape
        torch.testing.assert_close(weights.mean, mean.expand(*shape, 2), **CLOSE)
        covariance = torch.eye(2).double() - gain @ factors.mT
        torch.testing.assert_close(weights.covariance_matrix, covariance.expand(*shape, 2, 2), **CLOSE)
    plain = bg.LowRankGMRF(q.loc, q.precision_cholesky, q.factors[..., :0, :, :]).posterior(y, 0.3)
    with pytest.raises(ValueError, match="the distribution has no factors"):
        plain.weights  # noqa: B018


def test_a_large_factor_in_a_posterior_leaves_its_direction_to_the_observations():
    """As the factor's scale grows, the posterior tends to that under a flat prior of its weight: here, of brightness."""
    q = random_field("3x3", (3, 4), 1)
    y = q.sample()
    flat = bg.LowRankGMRF(q.loc, q.precision_cholesky, torch.full((1, 3, 4), 1e6).double())
    local = torch.cholesky_inverse(dense(q.precision_cholesky)) + 0.3 * torch.eye(12).double()
    weights = torch.linalg.solve(local, torch.ones(12).double())
    brightness = (weights @ (y - q.loc).flatten()) / weights.sum()
    expected = bg.GMRF(q.loc + brightness, q.precision_cholesky).posterior(y, 0.3).mean
    torch.testing.assert_close(flat.posterior(y, 0.3).mean, expected, rtol=1e-8, atol=1e-8)


def test_autocast_rounds_nothing():
    """Products of float32 are those that autocast would compute in bfloat16."""
    q = random_field("3x3", (6, 5), 3, batch=(2,), factors_batch=(2,), dtype=torch.float32)

    def found():
        torch.manual_seed(1)
        x = q.sample((3,))
        tensors = x, q.covariance_matrix, q.covariance_columns([(0, 1), (3, 4)]), q.whiten(x), q.log_prob(x), q.variance
        return *tensors, q.constrain(torch.ones(1, 6, 5), torch.zeros(2, 1)).sample((2,))

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))


@pytest.mark.parametrize("method", ["log_prob", "whiten", "entropy", "rsample"])
@pytest.mark.parametrize("kind", [bg.GMRF, bg.LowRankGMRF])
def test_export_with_open_sizes(kind, method, keep_torch_defaults):
    """Sizes of the batch and of the grid stay open. A check of values ends an export, as with torch's own distributions."""
    stencil = bg.Stencil.square(3)

    class Method(torch.nn.Module):
        def forward(self, loc, log_diag, off_diag, factors, x):
            parts = (factors,) if kind is bg.LowRankGMRF else ()
            q = kind(loc, bg.StencilCholesky(log_diag, off_diag, stencil), *parts, validate_args=False)
            argument = {"log_prob": (x,), "whiten": (x,), "entropy": (), "rsample": ((2,),)}[method]
            return getattr(q, method)(*argument)

    def inputs(batch, *grid):
        shapes = [(batch, *grid), (batch, *grid), (batch, len(stencil), *grid), (batch, 2, *grid), (batch, *grid)]
        return tuple(0.3 * torch.randn(shape, dtype=torch.float64) for shape in shapes)

    sizes = torch.export.Dim.AUTO
    open_sizes = tuple({0: sizes, last - 2: sizes, last - 1: sizes} for last in (3, 3, 4, 4, 3))
    program = torch.export.export(Method(), inputs(3, 6, 7), dynamic_shapes=open_sizes).module()
    others = inputs(2, 4, 5)
    found = program(*others)
    if method == "rsample":
        assert found.shape == (2, 2, 4, 5)
    else:
        torch.testing.assert_close(found, Method()(*others))


def test_factors_that_may_lack_their_rank_are_warned_of():
    loc, factor = torch.zeros(4, 5, 6), random_cholesky(STENCILS["3x3"], (5, 6), (4,), torch.float32)
    factors = torch.randn(4, 5, 6)
    with pytest.warns(UserWarning, match=r"factors has shape \(4, 5, 6\), of which each of the batch \(4,\) has all 4"):
        assert bg.LowRankGMRF(loc, factor, factors).rank == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in (factors[:, None], factors[None], factors[:3]):
            bg.LowRankGMRF(loc, factor, said)


def test_constraints():
    q = random_field("3x3", (3, 4), 2, batch=(2,))
    A, e = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    posterior = q.posterior(q.sample(), 0.5)
    for base in (q, posterior):
        covariance = base.covariance_columns([(i, j) for i in range(3) for j in range(4)]).flatten(-2).movedim(0, -2)
        p = MultivariateNormal(base.mean.flatten(-2), 0.5 * (covariance + covariance.mT))
        mean, reduced, _ = given(p, A.flatten(1), torch.zeros(()).double(), e)
        c = base.constrain(A, e)
        torch.testing.assert_close(c.mean.flatten(-2), mean, **CLOSE)
        torch.testing.assert_close(c.variance.flatten(-2), reduced.diagonal(dim1=-2, dim2=-1), **CLOSE)
    assert c.log_evidence.shape == (2,)


def test_divergences_equal_the_dense_ones():
    low, other = random_field("5x5", (3, 4), 2, batch=(2,)), random_field("3x3", (3, 4), 3, (3, 1))
    plain = bg.GMRF(torch.randn(3, 4).double(), random_cholesky(STENCILS["3x3"], (3, 4)))
    as_dense = {q: multivariate_normal(q) for q in (low, other)}
    as_dense[plain] = MultivariateNormal(plain.loc.flatten(), plain.covariance_matrix)
    for q, p in ((low, other), (low, plain), (plain, low), (other, low)):
        expected = kl_divergence(*(as_dense[d].expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape)) for d in (q, p)))
        torch.testing.assert_close(kl_divergence(q, p), expected, **CLOSE)
        torch.testing.assert_close(bg.kl_divergence(q, p), expected, **CLOSE)
    assert kl_divergence(low, low).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q = random_field("3x3", (3, 4), 2, batch=(2,), dtype=dtype)
    p, x = multivariate_normal(q), q.sample((5,))
    eps = torch.finfo(dtype).eps
    assert x.dtype == q.mean.dtype == q.variance.dtype == dtype
    assert q.log_prob(x).dtype == q.whiten(x).dtype == q.entropy().dtype == torch.float32
    torch.testing.assert_close(q.log_prob(x).double(), p.log_prob(x.double().flatten(-2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.entropy().double(), p.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.variance.double().flatten(-2), p.variance, rtol=4 * eps, atol=1e-5)
    y = x[0]
    posterior = q.posterior(y, 0.3)
    eye = torch.eye(12, dtype=torch.float64)
    mean, covariance, _ = given(p, eye, 0.3 * eye, y.double().flatten(-2))
    assert posterior.mean.dtype == posterior.sample().dtype == posterior.variance.dtype == dtype
    torch.testing.assert_close(posterior.mean.double().flatten(-2), mean, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(
        posterior.variance.double().flatten(-2), covariance.diagonal(dim1=-2, dim2=-1), rtol=2 * eps, atol=eps
    )
    assert posterior.log_prob(y).dtype == posterior.entropy().dtype == torch.float32


def test_tensors_that_are_not_contiguous():
    q = random_field("3x3", (3, 4), 2, batch=(2,))
    turned = bg.LowRankGMRF(
        q.loc.mT.contiguous().mT, q.precision_cholesky, q.factors.movedim(1, -1).contiguous().movedim(-1, 1)
    )
    x = q.sample((5,))
    torch.testing.assert_close(turned.log_prob(x.mT.contiguous().mT), q.log_prob(x), rtol=1e-13, atol=1e-13)


def test_an_empty_batch_gives_empty_results():
    q = random_field("3x3", (3, 4), 2, (0,), (0,))
    leaves = [t.detach().requires_grad_() for t in (q.loc, q.log_diag, q.off_diag, q._factors)]
    q = bg.LowRankGMRF(leaves[0], bg.StencilCholesky(*leaves[1:3], q.stencil), leaves[3])
    x = q.rsample((5,))
    assert x.shape == q.whiten(x).shape == (5, 0, 3, 4)
    assert q.log_prob(x).shape == (5, 0)
    assert q.variance.shape == q.posterior(x[0], 0.3).sample().shape == (0, 3, 4)
    (q.log_prob(x).sum() + q.entropy().sum()).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert random_field("3x3", (3, 4), 2).sample((0,)).shape == (0, 3, 4)


def test_expand_shares_and_keeps():
    q = random_field("3x3", (3, 4), 2, batch=(2,))
    wider = q.expand((5, 2))
    x = q.sample()
    assert type(wider) is bg.LowRankGMRF
    assert wider.sample().shape == (5, 2, 3, 4)
    assert wider.factors.data_ptr() == q.factors.data_ptr()
    torch.testing.assert_close(wider.log_prob(x), q.log_prob(x).expand(5, 2), rtol=1e-13, atol=1e-13)
    independent = wider.sample()
    assert not torch.equal(independent[0], independent[1])
    with pytest.raises(RuntimeError, match="expand"):
        q.expand((3,))


def test_files_are_read_with_torchs_default():
    q = random_field("3x3", (3, 4), 2)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    assert torch.equal(torch.load(file).log_prob(q.loc), q.log_prob(q.loc))


def test_repr():
    q = random_field("3x3", (3, 4), 2)
    assert repr(q).startswith("LowRankGMRF(loc: torch.Size([3, 4]), ")
    assert "factors: torch.Size([2, 3, 4])" in repr(q)
    assert repr(q.posterior(q.loc, 0.3)) == "LowRankPosterior(batch_shape=(), event_shape=(3, 4), rank=2)"


def test_bad_arguments():
    q = random_field("3x3", (3, 4), 2, batch=(2,))
    L, loc = q.precision_cholesky, q.loc
    for factors, error, message in (
        (None, TypeError, "factors is a NoneType, expected a torch.Tensor"),
        (torch.zeros(2, 4, 3).double(), ValueError, r"factors has shape \(2, 4, 3\), expected \(\.\.\., 3, 4\)"),
        (torch.zeros(3, 4).double(), ValueError, r"factors has shape \(3, 4\), expected \(\*batch, R, 3, 4\)"),
        (torch.zeros(3, 2, 3, 4).double(), ValueError, r"factors has batch shape \(3,\), which does not broadcast with \(2,\)"),
        (torch.zeros(13, 3, 4).double(), ValueError, r"factors has 13 factors, expected at most as many as the grid \(3, 4\)"),
        (torch.zeros(2, 3, 4), TypeError, "factors is torch.float32, precision_cholesky is torch.float64"),
        (torch.zeros(2, 3, 4).double().to("meta"), ValueError, "factors is on meta"),
    ):
        with pytest.raises(error, match=message):
            bg.LowRankGMRF(loc, L, factors)
    bad = q.factors.clone()
    bad[1, 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="Expected parameter factors"):
        bg.LowRankGMRF(loc, L, bad, validate_args=True)
    lax = bg.LowRankGMRF(loc, L, bad, validate_args=False)
    assert lax.log_prob(loc).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="within the support"):
        bg.LowRankGMRF(loc, L, q.factors, validate_args=True).log_prob(loc * torch.nan)
    with pytest.raises(ValueError, match=r"value has shape \(4, 3\)"):
        q.log_prob(torch.zeros(4, 3).double())
    with pytest.raises(TypeError, match=r"observation is torch.float32, the distribution is torch.float64"):
        q.posterior(loc.float(), 0.3)
    with pytest.raises(TypeError, match=r"values is torch.float32"):
        q.condition(loc > 0, loc.float())
    with pytest.raises(TypeError, match=r"mask is torch.int64, expected a bool"):
        q.condition(loc.long(), loc)
    with pytest.raises(TypeError, match="noise is LowRankGMRF, expected GMRF"):
        q.posterior(loc, noise=q)
    with pytest.raises(TypeError, match="noise is LowRankGMRF, expected GMRF"):
        q.local.posterior(loc, noise=q)
    with pytest.raises(TypeError, match=r"value is torch.float32"):
        q.posterior(loc, 0.3).log_prob(loc.float())
