import copy
import math
import pickle

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Distribution,
    ExpTransform,
    Independent,
    MultivariateNormal,
    TransformedDistribution,
    constraints,
)

import banded_gmrf as bg
from tests.cases import FACTORS, STENCILS, dense, random_cholesky
from tests.dense import exists, random_factor


def random_gmrf(stencil, grid, batch=(), loc_batch=None):
    """A random distribution whose factor has NaN where entries do not exist; ``loc_batch`` is ``batch`` by default."""
    loc = torch.randn(*(batch if loc_batch is None else loc_batch), *grid, dtype=torch.float64)
    return bg.GMRF(loc, random_cholesky(stencil, grid, batch))


def multivariate_normal(loc, cholesky):
    """torch's dense distribution of the flattened sites, from the precision matrix."""
    L = dense(cholesky)
    return MultivariateNormal(loc.double().flatten(-cholesky.stencil.ndim), precision_matrix=L @ L.mT, validate_args=False)


@pytest.fixture
def q():
    return random_gmrf(STENCILS["3x3"], (3, 4), batch=(2,))


class Subclass(bg.GMRF):
    """Adds nothing: `expand` must keep the class."""


class SubclassWithInit(bg.GMRF):
    def __init__(self, scale):
        log_diag = -scale.log().expand(3, 4)
        super().__init__(torch.zeros(3, 4), bg.StencilCholesky(log_diag, torch.zeros(4, 3, 4), STENCILS["3x3"]))


# The dense distribution itself loses a multiple of cond(Λ) ≈ 10² roundings of float64 (10⁻¹⁶) to its decomposition.
RELATIVE = 1e-10


def relative_error(actual, expected):
    """The largest error over the largest entry, or over 1 where all entries are smaller."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    return float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).detach())


@pytest.mark.parametrize("name", STENCILS)
def test_log_prob_and_its_gradients_equal_the_dense_ones_on_50_random_cases(name):
    stencil = STENCILS[name]

    def choose(*options):
        return options[torch.randint(len(options), ())]

    for _ in range(50):
        grid = [choose(*range(1, 7 if stencil.ndim < 3 else 5)) for _ in range(stencil.ndim)]
        loc_batch, batch, value_batch = choose(((), (), ()), ((2,), (), (3, 1)), ((), (2,), (3, 2)), ((2, 1), (3,), ()))
        tensors = [torch.randn(*loc_batch, *grid, dtype=torch.float64)]
        tensors += random_factor(stencil.offsets, grid, batch)
        tensors += [torch.randn(*value_batch, *grid, dtype=torch.float64)]
        loc, log_diag, off_diag, value = (t.requires_grad_() for t in tensors)
        L = bg.StencilCholesky(log_diag, off_diag, stencil)
        actual = bg.GMRF(loc, L).log_prob(value)
        expected = multivariate_normal(loc, L).log_prob(value.flatten(-stencil.ndim))
        assert relative_error(actual, expected) < RELATIVE
        cotangent = torch.randn(actual.shape, dtype=torch.float64)
        actual = torch.autograd.grad(actual, tensors, cotangent)
        expected = torch.autograd.grad(expected, tensors, cotangent, materialize_grads=True)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < RELATIVE
        assert (actual[2][~exists(stencil.offsets, grid).expand_as(off_diag)] == 0).all()


def test_the_hessian_of_log_prob_is_minus_the_precision(q):
    q = bg.GMRF(q.loc[0], bg.StencilCholesky(q.log_diag[0], q.off_diag[0], q.stencil))
    hessian = torch.autograd.functional.hessian(q.log_prob, q.sample()).reshape(12, 12)
    L = dense(q.precision_cholesky)
    torch.testing.assert_close(hessian, -L @ L.mT, rtol=1e-12, atol=1e-12)


def test_vmap_over_distributions_equals_a_batch(q):
    def log_prob(loc, log_diag, off_diag, value):
        return bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, q.stencil), validate_args=False).log_prob(value)

    value = q.sample((5,))
    each = torch.vmap(log_prob, in_dims=(0, 0, 0, 1), out_dims=1)(q.loc, q.log_diag, q.off_diag, value)
    torch.testing.assert_close(each, q.log_prob(value), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_moments_and_entropy_equal_the_dense_ones(name, grid):
    q = random_gmrf(STENCILS[name], grid, batch=(3, 1), loc_batch=(2,))
    p = multivariate_normal(q.loc, q.precision_cholesky)
    shape = (3, 2, *grid)
    assert torch.equal(q.mean, q.loc)
    assert torch.equal(q.mode, q.loc)
    assert q.mean.shape == q.variance.shape == q.stddev.shape == shape
    assert relative_error(q.variance, p.variance.reshape(shape)) < RELATIVE
    assert relative_error(q.stddev, p.stddev.reshape(shape)) < RELATIVE
    assert relative_error(q.entropy(), p.entropy()) < RELATIVE
    assert relative_error(q.perplexity(), p.perplexity()) < RELATIVE


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_covariances_and_precisions_equal_the_dense_ones(name, grid):
    q = random_gmrf(STENCILS[name], grid, batch=(3, 1), loc_batch=(2,))
    p = multivariate_normal(q.loc, q.precision_cholesky)
    assert relative_error(q.covariance_matrix, p.covariance_matrix) < RELATIVE
    assert relative_error(q.precision_matrix, p.precision_matrix) < RELATIVE
    first, last = (0,) * len(grid), tuple(size - 1 for size in grid)
    columns = p.covariance_matrix[..., [0, -1]].movedim(-1, 0).reshape(2, 3, 2, *grid)
    assert relative_error(q.covariance_columns([first, last]), columns) < RELATIVE
    assert relative_error(q.covariance_columns(last), columns[1]) < RELATIVE
    stddev = p.stddev.reshape(3, 2, *grid)
    own = torch.stack([p.stddev[..., 0], p.stddev[..., -1]]).reshape(2, 3, 2, *[1] * len(grid))
    assert relative_error(q.correlation_with([first, last]), columns / (stddev * own)) < RELATIVE
    assert relative_error(q.correlation_with(last), columns[1] / (stddev * own[1])) < RELATIVE


@pytest.mark.parametrize("num_sites", [2, 3])
def test_covariances_where_the_mean_has_more_batch_axes_than_the_factor(num_sites):
    q = random_gmrf(STENCILS["5x5"], (4, 3), batch=(2,), loc_batch=(3, 1))
    p = multivariate_normal(q.loc, q.precision_cholesky)
    columns = q.covariance_columns([(0, number) for number in range(num_sites)])
    expected = p.covariance_matrix[..., :num_sites].movedim(-1, 0).reshape(num_sites, 3, 2, 4, 3)
    assert relative_error(columns, expected) < RELATIVE


def test_correlations_between_chosen_sites_are_exact_where_the_variance_is_estimated(monkeypatch):
    tensors = [t.requires_grad_() for t in random_factor(STENCILS["5x5"].offsets, (4, 3), (2,))]
    q = bg.GMRF(torch.zeros(4, 3, dtype=torch.float64), bg.StencilCholesky(*tensors, STENCILS["5x5"]))
    p = multivariate_normal(q.loc, q.precision_cholesky)
    sites, numbers = [(1, 2), (3, 0), (1, 2)], [5, 9, 5]
    expected = p.covariance_matrix / (p.stddev.unsqueeze(-1) * p.stddev.unsqueeze(-2))
    expected = expected[:, numbers].movedim(1, 0)  # (m, batch, n)
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 0)
    actual = q.correlation_with(sites).flatten(-2)
    others = [number for number in range(12) if number not in numbers]
    error = (actual / expected - 1)[..., others].abs()
    assert (error > 1e-6).any()  # they are estimated
    assert (error < 5 * 512**-0.5).all()  # five of the standard errors that the docstring states
    actual, expected = actual[..., numbers], expected[..., numbers]
    assert relative_error(actual, expected) < RELATIVE
    cotangent = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad(value, tensors, cotangent) for value in (actual, expected)), strict=True):
        assert relative_error(a, e) < RELATIVE
    assert relative_error(q.correlation_with((1, 2))[:, 1, 2], torch.ones(2).double()) < RELATIVE


def test_one_site_of_one_axis_can_be_an_integer():
    q = random_gmrf(STENCILS["line"], (7,), batch=(2,))
    assert torch.equal(q.covariance_columns(3), q.covariance_columns([(3,)])[0])
    assert torch.equal(q.covariance_columns(torch.tensor([[3], [5]]))[1], q.covariance_columns((5,)))
    assert q.covariance_columns(torch.empty(0, 1, dtype=torch.long)).shape == (0, 2, 7)


def test_gradients_of_covariances_equal_the_dense_ones():
    stencil, grid = STENCILS["5x5"], (4, 3)
    tensors = random_factor(stencil.offsets, grid, batch=(2,))
    L = bg.StencilCholesky(*(t.requires_grad_() for t in tensors), stencil)
    q = bg.GMRF(torch.zeros(grid, dtype=torch.float64), L)
    p = multivariate_normal(q.loc, L)
    for actual, expected in (
        (q.covariance_columns((1, 2)).flatten(1), p.covariance_matrix[..., 5]),
        (q.covariance_matrix, p.covariance_matrix),
        (q.precision_matrix, dense(L) @ dense(L).mT),
    ):
        cotangent = torch.randn_like(actual)
        actual = torch.autograd.grad(actual, tensors, cotangent)
        expected = torch.autograd.grad(expected, tensors, cotangent, retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < RELATIVE


def test_gradients_of_variance_and_entropy_equal_the_dense_ones():
    stencil, grid = STENCILS["3x3"], (2, 3)
    tensors = random_factor(stencil.offsets, grid)
    log_diag, off_diag = (t.requires_grad_() for t in tensors)
    q = bg.GMRF(torch.zeros(grid, dtype=torch.float64), bg.StencilCholesky(log_diag, off_diag, stencil))
    p = multivariate_normal(q.loc, q.precision_cholesky)
    for actual, expected in ((q.variance.flatten(), p.variance), (q.entropy(), p.entropy())):
        cotangent = torch.randn(actual.shape, dtype=torch.float64)
        actual = torch.autograd.grad(actual, tensors, cotangent, materialize_grads=True)
        expected = torch.autograd.grad(expected, tensors, cotangent, retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < RELATIVE


@pytest.mark.parametrize("sample_shape", [(), torch.Size(), (5,), [5], torch.Size([5, 3]), (0,), (2, 0), torch.Size([1])])
@pytest.mark.parametrize(("batch", "loc_batch"), [((), ()), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), ())])
def test_sample_shapes(sample_shape, batch, loc_batch):
    q = random_gmrf(STENCILS["3x3"], (3, 4), batch, loc_batch)
    assert q.batch_shape == torch.broadcast_shapes(batch, loc_batch)
    assert q.event_shape == (3, 4)
    shape = (*sample_shape, *q.batch_shape, 3, 4)
    x = q.sample(sample_shape)
    assert x.shape == q.rsample(sample_shape).shape == q.whiten(x).shape == shape
    assert q.log_prob(x).shape == shape[:-2]
    assert q.entropy().shape == q.batch_shape
    assert x.isfinite().all()


def test_sample_takes_its_shape_by_name_and_by_default(q):
    assert q.sample().shape == (2, 3, 4)
    assert q.rsample(sample_shape=(5,)).shape == (5, 2, 3, 4)


def test_samples_follow_torch_seed_and_only_rsample_has_a_gradient():
    stencil = STENCILS["3x3"]
    log_diag, off_diag = (t.requires_grad_() for t in random_factor(stencil.offsets, (3, 4)))
    q = bg.GMRF(torch.zeros(3, 4, dtype=torch.float64), bg.StencilCholesky(log_diag, off_diag, stencil))
    torch.manual_seed(1)
    x = q.sample((3,))
    torch.manual_seed(1)
    y = q.rsample((3,))
    assert torch.equal(x, y)
    assert not x.requires_grad
    assert y.requires_grad
    assert not torch.equal(y, q.rsample((3,)))


def test_whiten_undoes_rsample(q):
    u = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    x = q.loc + q.precision_cholesky.solve(u, transpose=True)
    torch.testing.assert_close(q.whiten(x), u, rtol=1e-12, atol=1e-12)
    expected = -0.5 * u.square().flatten(-2).sum(-1) + q.precision_cholesky.logdet() - 6 * math.log(2 * math.pi)
    torch.testing.assert_close(q.log_prob(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["5x5", "volume", "line with a gap"])
def test_samples_have_the_dense_mean_and_covariance(name):
    stencil, count = STENCILS[name], 20_000
    q = random_gmrf(stencil, (2, 3, 2)[-stencil.ndim :])
    x = q.sample((count,)).flatten(1)
    p = multivariate_normal(q.loc, q.precision_cholesky)
    covariance, variance = p.covariance_matrix, p.variance
    # Five standard errors of a sample mean, and of a sample covariance: (Σᵢᵢ Σⱼⱼ + Σᵢⱼ²) / count is its variance.
    assert ((x.mean(0) - p.mean).abs() < 5 * (variance / count).sqrt()).all()
    error = 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((x.T.cov() - covariance).abs() < error).all()


def test_gradients_through_rsample_equal_dense_reparametrization():
    stencil, grid = STENCILS["5x5"], (4, 3)
    tensors = [torch.randn(3, 1, *grid, dtype=torch.float64), *random_factor(stencil.offsets, grid, batch=(2,))]
    loc, log_diag, off_diag = (t.requires_grad_() for t in tensors)
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil))
    x = q.rsample((5,))
    u = q.whiten(x).detach().flatten(-2)
    same = loc.flatten(-2) + torch.linalg.solve_triangular(dense(q.precision_cholesky).mT, u.unsqueeze(-1), upper=True)[..., 0]
    assert relative_error(x.flatten(-2), same) < RELATIVE
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    actual = torch.autograd.grad(x, tensors, cotangent)
    expected = torch.autograd.grad(same, tensors, cotangent.flatten(-2))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < RELATIVE


def test_expand_repeats_the_distribution(q):
    expanded = q.expand((5, 2))
    assert type(expanded) is bg.GMRF
    assert expanded.batch_shape == (5, 2)
    assert expanded.event_shape == (3, 4)
    for tensor in (expanded.loc, expanded.mean, expanded.mode, expanded.variance, expanded.stddev, expanded.log_diag):
        assert tensor.shape == (5, 2, 3, 4)
    assert expanded.off_diag.shape == (5, 2, 4, 3, 4)
    assert expanded.off_diag.data_ptr() == q.off_diag.data_ptr()
    assert expanded.precision_cholesky.batch_shape == (5, 2)
    assert torch.equal(expanded.precision_cholesky.to_dense(), q.precision_cholesky.to_dense().expand(5, 2, 12, 12))
    x = q.sample()
    torch.testing.assert_close(expanded.log_prob(x), q.log_prob(x).expand(5, 2), rtol=1e-13, atol=1e-13)
    assert torch.equal(expanded.entropy(), q.entropy().expand(5, 2))
    assert expanded.sample((7,)).shape == (7, 5, 2, 3, 4)
    assert q.expand([0, 2]).sample().shape == (0, 2, 3, 4)
    assert expanded.expand((4, 5, 2)).sample().shape == (4, 5, 2, 3, 4)
    independent = expanded.sample()
    assert not torch.equal(independent[0], independent[1])
    with pytest.raises(RuntimeError, match="expand"):  # as every torch distribution
        q.expand((3,))


def test_expand_keeps_the_class_and_fills_an_instance_given_to_it(q):
    sub = Subclass(q.loc, q.precision_cholesky, validate_args=False)
    expanded = sub.expand((5, 2))
    assert type(expanded) is Subclass
    assert expanded._validate_args is False
    instance = Subclass.__new__(Subclass)
    assert q.expand((5, 2), _instance=instance) is instance
    assert instance.sample().shape == (5, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="SubclassWithInit"):
        SubclassWithInit(torch.tensor(2.0)).expand((5,))


def test_interface_of_a_torch_distribution(q):
    assert isinstance(q, Distribution)
    assert q.has_rsample
    assert not q.has_enumerate_support
    assert q.support.event_dim == 2
    assert not q.support.is_discrete
    assert constraints.is_dependent(bg.GMRF.support)
    assert q.support.check(q.sample()).tolist() == [True, True]
    assert q.stencil == STENCILS["3x3"]
    assert set(q.arg_constraints) == {"loc", "log_diag", "off_diag"}
    for name, constraint in q.arg_constraints.items():
        assert constraint.check(getattr(q, name)).tolist() == [True, True]
    for unsupported in (lambda: q.cdf(q.loc), lambda: q.icdf(q.loc), q.enumerate_support):
        with pytest.raises(NotImplementedError):
            unsupported()


def test_repr(q):
    assert repr(q) == ("GMRF(loc: torch.Size([2, 3, 4]), log_diag: torch.Size([2, 3, 4]), off_diag: torch.Size([2, 4, 3, 4]))")
    assert repr(Subclass(q.loc, q.precision_cholesky)).startswith("Subclass(")


def test_copies_and_pickles(q):
    x = q.sample()
    for original in (q, q.expand((5, 2))):
        for other in (copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert type(other) is bg.GMRF
            assert other.batch_shape == original.batch_shape
            assert torch.equal(other.log_prob(x), original.log_prob(x))


def test_independent(q):
    reinterpreted = Independent(q, 1)
    assert (reinterpreted.batch_shape, reinterpreted.event_shape) == ((), (2, 3, 4))
    assert reinterpreted.support.event_dim == 3
    x = reinterpreted.rsample((5,))
    assert x.shape == (5, 2, 3, 4)
    assert torch.equal(reinterpreted.log_prob(x), q.log_prob(x).sum(-1))
    assert torch.equal(reinterpreted.entropy(), q.entropy().sum())
    assert torch.equal(reinterpreted.variance, q.variance)
    assert reinterpreted.expand((6,)).sample().shape == (6, 2, 3, 4)
    assert "GMRF" in repr(reinterpreted)


def test_transformed_distribution(q):
    scale = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)[:, None, None, None].expand(3, 1, 3, 4)
    transformed = TransformedDistribution(q, [AffineTransform(1.0, scale, event_dim=2), ExpTransform()])
    assert (transformed.batch_shape, transformed.event_shape) == ((3, 2), (3, 4))
    y = transformed.rsample((5,))
    assert y.shape == (5, 3, 2, 3, 4)
    assert (y > 0).all()
    x = (y.log() - 1) / scale
    expected = q.log_prob(x) - 12 * scale[:, :, 0, 0].log() - y.log().flatten(-2).sum(-1)
    torch.testing.assert_close(transformed.log_prob(y), expected, rtol=1e-12, atol=1e-12)
    assert transformed.expand((6, 3, 2)).sample().shape == (6, 3, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loc_dtype", ["the factor's", torch.float32])
def test_dtypes(dtype, loc_dtype):
    loc_dtype = dtype if loc_dtype == "the factor's" or dtype == torch.float64 else loc_dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    q = bg.GMRF(torch.randn(3, 4).to(loc_dtype), random_cholesky(STENCILS["3x3"], (3, 4), (2,), dtype))
    x = q.sample((5,))
    assert x.dtype == q.mean.dtype == q.variance.dtype == loc_dtype
    assert q.log_prob(x).dtype == q.whiten(x).dtype == q.entropy().dtype == accumulated
    p = multivariate_normal(q.loc, q.precision_cholesky)
    # Nothing but the sample itself and the variance is rounded below float32.
    torch.testing.assert_close(q.log_prob(x).double(), p.log_prob(x.double().flatten(-2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.entropy().double(), p.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.variance.double(), p.variance.reshape(2, 3, 4), rtol=2 * torch.finfo(loc_dtype).eps, atol=1e-5)


def test_a_factor_given_as_views_is_not_copied():
    stencil = STENCILS["5x5"]
    log_diag, off_diag = random_factor(stencil.offsets, (5, 3), batch=(2,))
    channels = torch.cat([log_diag[:, None], off_diag], 1)
    q = bg.GMRF(torch.zeros(5, 3, dtype=torch.float64), bg.StencilCholesky(channels[:, 0], channels[:, 1:], stencil))
    assert q.log_diag.data_ptr() == channels.data_ptr()
    contiguous = bg.GMRF(torch.zeros(5, 3, dtype=torch.float64), bg.StencilCholesky(log_diag, off_diag, stencil))
    x = contiguous.sample((4,))
    torch.testing.assert_close(q.log_prob(x), contiguous.log_prob(x), rtol=1e-13, atol=1e-13)


def test_an_empty_batch_gives_empty_results():
    stencil = STENCILS["3x3"]
    tensors = [torch.zeros(0, 3, 4, dtype=torch.float64), *random_factor(stencil.offsets, (3, 4), batch=(0,))]
    loc, log_diag, off_diag = (t.requires_grad_() for t in tensors)
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil))
    x = q.rsample((5,))
    assert x.shape == (5, 0, 3, 4)
    assert q.variance.shape == (0, 3, 4)
    assert q.entropy().shape == (0,)
    (q.log_prob(x).sum() + q.entropy().sum()).backward()
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape


def test_an_empty_set_of_values_has_zero_gradients(q):
    log_diag, off_diag = (t.detach().clone().requires_grad_() for t in (q.log_diag, q.off_diag))
    q = bg.GMRF(q.loc, bg.StencilCholesky(log_diag, off_diag, q.stencil))
    value = q.log_prob(torch.empty(0, 2, 3, 4, dtype=torch.float64))
    assert value.shape == (0, 2)
    value.sum().backward()
    assert (log_diag.grad == 0).all()
    assert (off_diag.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diagonal_that_overflows_gives_infinity(dtype):
    stencil = STENCILS["3x3"]
    log_diag, off_diag = random_factor(stencil.offsets, (3, 4), dtype=dtype)
    log_diag[1, 2] = 1000.0
    q = bg.GMRF(torch.zeros(3, 4, dtype=dtype), bg.StencilCholesky(log_diag, off_diag, stencil))
    assert q.log_prob(torch.randn(3, 4, dtype=dtype)) == -torch.inf
    torch.testing.assert_close(q.entropy(), 6 * (1 + math.log(2 * math.pi)) - log_diag.sum())
    # That site is known exactly: e⁻¹⁰⁰⁰ is 0 in either dtype. Every other one is drawn as ever.
    x = q.sample()
    assert x[1, 2] == 0
    assert x.isfinite().all()


def with_a_bad_entry(argument, bad):
    """A distribution's arguments, one entry of one of them bad; ``missing`` is an entry of off_diag that does not exist."""
    stencil = STENCILS["3x3"]
    log_diag, off_diag = random_factor(stencil.offsets, (3, 4), batch=(2,), nan_outside=False)
    loc = torch.zeros(3, 4, dtype=torch.float64)
    tensor, index = {
        "loc": (loc, (1, 2)),
        "log_diag": (log_diag, (1, 0, 2)),
        "off_diag": (off_diag, (1, 0, 1, 2)),
        "missing": (off_diag, (1, 0, 1, 3)),
    }[argument]
    tensor[index] = bad
    return loc, bg.StencilCholesky(log_diag, off_diag, stencil)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["loc", "log_diag", "off_diag"])
def test_validate_args_refuses_what_is_not_finite(argument, bad):
    args = with_a_bad_entry(argument, bad)
    with pytest.raises(ValueError, match=f"Expected parameter {argument} .* of distribution GMRF"):
        bg.GMRF(*args, validate_args=True)
    bg.GMRF(*args, validate_args=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_validate_args_ignores_entries_that_do_not_exist(bad):
    q = bg.GMRF(*with_a_bad_entry("missing", bad), validate_args=True)
    assert q.log_prob(q.sample()).isfinite().all()


def test_validate_args_of_a_shared_factor_finds_a_bad_entry_once_per_batch_element():
    loc, L = with_a_bad_entry("off_diag", torch.nan)
    q = bg.GMRF(loc, L.expand((3, 2)), validate_args=False)
    assert q.arg_constraints["off_diag"].check(q.off_diag).tolist() == [[True, False]] * 3


@pytest.fixture
def default_validate_args():
    before = Distribution._validate_args
    yield Distribution.set_default_validate_args
    Distribution.set_default_validate_args(before)


def test_validate_args_follows_torch_default_and_overrules_it(default_validate_args):
    bad = with_a_bad_entry("loc", torch.nan)
    default_validate_args(False)
    bg.GMRF(*bad)
    bg.GMRF(*bad, validate_args=None)
    with pytest.raises(ValueError, match=r"loc .* to satisfy the constraint finite numbers"):
        bg.GMRF(*bad, validate_args=True)
    default_validate_args(True)
    with pytest.raises(ValueError, match="loc"):
        bg.GMRF(*bad)
    bg.GMRF(*bad, validate_args=False)


def test_validate_args_checks_the_value_of_log_prob(q):
    value = q.sample()
    value[0, 1, 1] = torch.nan
    strict, lax = (bg.GMRF(q.loc, q.precision_cholesky, validate_args=v) for v in (True, False))
    for distribution in (strict, strict.expand((5, 2))):
        with pytest.raises(ValueError, match="within the support"):
            distribution.log_prob(value)
    for distribution in (lax, lax.expand((5, 2))):
        assert distribution.log_prob(value)[..., 0].isnan().all()
        assert distribution.log_prob(value)[..., 1].isfinite().all()
