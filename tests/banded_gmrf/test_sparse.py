"""`SparseGMRF` and what is inferred with it, against dense float64 linear algebra."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from banded_gmrf.recursions import dissection
from tests.cases import FACTORS, STENCILS
from tests.dense import exists

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def random_precision(stencil, grid, batch=()):
    """Diagonally dominant, with NaN where entries do not exist."""
    off_diag = 0.4 * (2 * torch.rand(*batch, len(stencil), *grid, dtype=torch.float64) - 1) / max(1, len(stencil))
    off_diag = off_diag.masked_fill(~exists(stencil.offsets, grid), math.nan)
    return bg.StencilPrecision(1 + torch.rand(*batch, *grid, dtype=torch.float64), off_diag, stencil)


def random_field(name, grid, batch=()):
    """A field, and its dense distribution."""
    q = bg.SparseGMRF(random(*batch, *grid), random_precision(STENCILS[name], grid, batch))
    precision = dense_precision(q.precision)
    return q, MultivariateNormal(q.loc.flatten(len(batch)), precision_matrix=precision, validate_args=False)


def dense_precision(precision):
    """Entry by entry, without the product that the library takes."""
    grid, ndim = precision.grid, precision.stencil.ndim
    n = grid.numel()
    matrix = torch.diag_embed(precision.diag.flatten(-ndim))
    k, row, column = precision.stencil.entries(grid)
    entries = precision.off_diag.flatten(-ndim)[..., k, column]
    flat = matrix.flatten(-2)
    return flat.index_add(-1, row * n + column, entries).index_add(-1, column * n + row, entries).unflatten(-1, (n, n))


@pytest.fixture(autouse=True)
def small_boxes(monkeypatch):
    """Grids of tests are dissected as large ones are."""
    dissection.dissect.cache_clear()
    monkeypatch.setattr(dissection, "_LEAF_SITES", 3)
    yield
    dissection.dissect.cache_clear()


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_fields_equal_the_dense_ones(name, grid):
    n = math.prod(grid)
    q, expected = random_field(name, grid, batch=(2,))
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((2,), grid, True)
    covariance = expected.covariance_matrix
    x = random(3, 2, *grid)
    torch.testing.assert_close(q.log_prob(x), expected.log_prob(x.flatten(2)), **CLOSE)
    torch.testing.assert_close(q.entropy(), expected.entropy(), **CLOSE)
    torch.testing.assert_close(q.variance.flatten(1), expected.variance, **CLOSE)
    torch.testing.assert_close(q.stddev.flatten(1), expected.stddev, **CLOSE)
    last = tuple(size - 1 for size in grid)
    columns = q.covariance_columns([(0,) * len(grid), last])
    torch.testing.assert_close(columns.flatten(2), covariance[..., [0, n - 1]].movedim(-1, 0), **CLOSE)
    torch.testing.assert_close(q.covariance_columns(last), columns[1])
    root = q._factor().solve_root(torch.eye(n, dtype=torch.float64).unsqueeze(1)).movedim(0, -1)  # of the samples
    torch.testing.assert_close(root @ root.mT, covariance, **CLOSE)
    assert q.sample((4,)).shape == (4, 2, *grid)


@pytest.mark.parametrize(("name", "grid"), [("line", (9,)), ("5x5", (5, 7)), ("skewed", (7, 5)), ("volume", (3, 4, 5))])
def test_gradients(name, grid):
    stencil, batch = STENCILS[name], (2,)
    given = random_precision(stencil, grid, batch)
    y, x, z = random(2, *grid), random(3, 2, *grid), random(3, 2, *grid)
    noise = torch.rand(grid, dtype=torch.float64).masked_fill(torch.rand(grid) < 0.4, math.inf)
    noise[(0,) * len(grid)] = 0
    parts = [t.clone().requires_grad_() for t in (random(2, *grid), given.diag, given.off_diag, y)]

    def as_multivariate(loc, diag, off_diag):
        return MultivariateNormal(
            loc.flatten(1), precision_matrix=dense_precision(bg.StencilPrecision(diag, off_diag, stencil)), validate_args=False
        )

    def sparse(loc, diag, off_diag, y):
        q = bg.SparseGMRF(loc, bg.StencilPrecision(diag, off_diag, stencil))
        p = q.posterior(y, noise)
        return [q.log_prob(x), q.entropy(), q.variance, p.mean, p.variance, p.log_evidence, p.log_prob(x.where(noise > 0, y))]

    def dense(loc, diag, off_diag, y):
        q = as_multivariate(loc, diag, off_diag)
        seen, free = noise.flatten() < math.inf, noise.flatten() > 0
        covariance = q.covariance_matrix
        data = MultivariateNormal(
            q.mean[:, seen], covariance[:, seen][..., seen] + noise.flatten()[seen].diag(), validate_args=False
        )
        gain = torch.linalg.solve(data.covariance_matrix, covariance[:, seen]).mT
        mean = q.mean + (gain @ (y.flatten(1)[:, seen] - data.mean).unsqueeze(-1)).squeeze(-1)
        after = covariance - gain @ covariance[:, seen]
        given = MultivariateNormal(mean[:, free], after[:, free][..., free], validate_args=False)
        variance = after.diagonal(dim1=-2, dim2=-1).where(free, 0)
        value = x.where(noise > 0, y).flatten(2)
        return [
            q.log_prob(x.flatten(2)),
            q.entropy(),
            q.variance.unflatten(1, grid),
            mean.unflatten(1, grid),
            variance.unflatten(1, grid),
            data.log_prob(y.flatten(1)[:, seen]),
            given.log_prob(value[..., free]),
        ]

    for actual, expected in zip(sparse(*parts), dense(*parts), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
        weights = random(*actual.shape)
        got, want = (
            torch.autograd.grad((value * weights).sum(), parts, retain_graph=True, materialize_grads=True)
            for value in (actual, expected)
        )
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)

    def samples(*parts):  # the same numbers, moved by their factor
        torch.manual_seed(0)
        q = bg.SparseGMRF(parts[0], bg.StencilPrecision(*parts[1:3], stencil))
        return (q.rsample((2,)) * z[:2]).sum() + (q.posterior(parts[3], noise).rsample((2,)) * z[:2]).sum()

    actual = torch.autograd.grad(samples(*parts), parts)
    direction = [random(*t.shape).where(t.isfinite(), 0) for t in parts]
    step = 1e-6
    ahead, behind = (
        samples(*(t.detach() + sign * step * d for t, d in zip(parts, direction, strict=True))) for sign in (1, -1)
    )
    along = sum((g * d).sum() for g, d in zip(actual, direction, strict=True))
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def test_gradients_do_not_depend_on_when_the_factor_was_made():
    precision = random_precision(STENCILS["3x3"], (4, 5))
    q = bg.SparseGMRF(random(4, 5), precision)
    x = q.sample()
    precision.diag.requires_grad_()
    kept = torch.autograd.grad(q.log_prob(x), precision.diag)
    new = torch.autograd.grad(bg.SparseGMRF(q.loc, precision).log_prob(x), precision.diag)
    torch.testing.assert_close(kept, new)
    p = q.posterior(x, 1.0)
    for value in (q.log_prob(x), q.entropy(), p.mean.sum(), p.log_evidence):
        (first,) = torch.autograd.grad(value, precision.diag, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            first.sum().backward()


def test_one_factorisation_is_kept(monkeypatch):
    made = []
    factorise = dissection.DissectedCholesky._factorise
    monkeypatch.setattr(dissection.DissectedCholesky, "_factorise", lambda self: made.append(1) or factorise(self))
    q, _ = random_field("3x3", (6, 5))
    assert not made
    q.sample(), q.variance, q.log_prob(q.loc), q.expand((2,)).entropy(), q.covariance_columns((0, 0))
    assert len(made) == 1
    p = q.posterior(q.loc, 1.0)
    p.mean, p.variance, p.sample((2,)), p.entropy(), p.log_evidence
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at the first forward derivative
def test_transformations():
    stencil, grid = STENCILS["3x3"], (4, 3)
    given = random_precision(stencil, grid)
    off_diag, x = given.off_diag.nan_to_num(), random(5, *grid)

    def evidence(diag, value):
        q = bg.SparseGMRF(torch.zeros(grid, dtype=torch.float64), bg.StencilPrecision(diag, off_diag, stencil), False)
        p = q.posterior(value, 0.5)
        return (
            q.log_prob(value) + p.log_evidence + p.mean.square().sum() + p.variance.sum() + q.covariance_columns((1, 1)).sum()
        )

    diag = given.diag.clone().requires_grad_()
    (plain,) = torch.autograd.grad(sum(evidence(diag, value) for value in x), diag)
    mapped = torch.vmap(torch.func.grad(evidence), in_dims=(None, 0))(given.diag, x).sum(0)
    torch.testing.assert_close(mapped, plain, **CLOSE)
    torch.testing.assert_close(
        torch.func.jacfwd(evidence)(given.diag, x[0]), torch.func.jacrev(evidence)(given.diag, x[0]), **CLOSE
    )
    step = 1e-6 * random(*grid)
    gradient = torch.func.grad(evidence)
    change = (gradient(given.diag + step, x[0]) - gradient(given.diag - step, x[0])) / 2
    hessian = torch.func.hessian(evidence)(given.diag, x[0]).reshape(12, 12)
    torch.testing.assert_close(hessian @ step.flatten() / 1e-6, change.flatten() / 1e-6, rtol=1e-6, atol=1e-6)


def test_posteriors_equal_those_of_a_field_with_a_factor():
    grid = (5, 6)
    precision = bg.matern_precision(grid, torch.tensor([2.0, 3.0], dtype=torch.float64), 1)
    loc, y = random(2, *grid), random(*grid)
    sparse, banded = bg.SparseGMRF(loc, precision), bg.GMRF(loc, bg.StencilCholesky.from_precision(precision))
    A, e = random(2, *grid), random(2)
    blur = bg.operators.Convolution(torch.rand(3, 3, dtype=torch.float64))
    known = torch.rand(grid) < 0.3
    counts = torch.poisson(loc[0].exp())

    def poisson(x):
        return torch.distributions.Poisson(x.exp()).log_prob(counts)

    ways = [
        lambda q: q.constrain(A, e),
        lambda q: q.condition(known, y),
        lambda q: q.condition(known, y).constrain(A, e),
        lambda q: q.posterior(y, 0.5, operator=blur),
        lambda q: q.posterior(y, 0.5, operator=blur, method="iterative", tolerance=1e-12),
        lambda q: q.posterior(y, 0.5, method="iterative", tolerance=1e-12),
        lambda q: q.posterior(y, noise=bg.GMRF(0 * loc, banded.precision_cholesky), method="iterative", tolerance=1e-12),
        lambda q: q.laplace(poisson),
    ]
    for way in ways:
        actual, expected = way(sparse), way(banded)
        torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(actual.covariance_columns((1, 2)), expected.covariance_columns((1, 2)), rtol=1e-8, atol=1e-8)
        assert actual.sample((3,)).shape == (3, 2, *grid)
    for way in (*ways[:4], ways[-1]):
        actual, expected = way(sparse), way(banded)
        torch.testing.assert_close(actual.variance, expected.variance, **CLOSE)
        torch.testing.assert_close(actual.entropy(), expected.entropy(), **CLOSE)
        if way is not ways[0]:
            torch.testing.assert_close(actual.log_evidence, expected.log_evidence, **CLOSE)


def test_monte_carlo_variances_lie_within_their_errors():
    q, expected = random_field("5x5", (5, 4), batch=(2,))
    estimate = q.marginal_variance("monte_carlo", 2000)
    assert ((estimate.variance - expected.variance.unflatten(1, (5, 4))).abs() <= 5 * estimate.standard_error).all()
    p = q.posterior(q.loc, 0.5)
    estimate = p.marginal_variance("monte_carlo", 2000)
    assert ((estimate.variance - p.variance).abs() <= 5 * estimate.standard_error).all()


def test_samples_have_the_dense_covariance():
    count = 20_000
    q, expected = random_field("3x3", (3, 3))
    posterior = q.posterior(q.loc, 0.5)
    after = torch.linalg.inv(expected.precision_matrix + 2 * torch.eye(9).double())
    for samples, covariance in ((q.sample((count,)), expected.covariance_matrix), (posterior.sample((count,)), after)):
        variance = covariance.diagonal()
        error = 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()
        assert ((samples.flatten(1).T.cov() - covariance).abs() <= error).all()


def intrinsic(grid, order):
    """Fields of which polynomials of lower degree than ``order`` cost nothing."""
    return bg.car_precision(grid, 1.0) if order == 1 else bg.thin_plate_precision(grid, 1.0, 0.0)


@pytest.mark.parametrize(("order", "grid"), [(1, (7, 5)), (1, (8, 9)), (2, (9,)), (2, (70,)), (2, (6, 7))])
def test_intrinsic_fields_under_constraints(order, grid):
    n = math.prod(grid)
    precision = intrinsic(grid, order)
    # A batch, of two scales; constraints on sums and, for the second order, on more than is needed.
    precision = bg.StencilPrecision(
        precision.diag * torch.tensor([1.0, 3.0]).double().reshape(2, *[1] * len(grid)),
        precision.off_diag * torch.tensor([1.0, 3.0]).double().reshape(2, *[1] * (len(grid) + 1)),
        precision.stencil,
    )
    q = bg.SparseGMRF(random(2, *grid), precision)
    A = torch.cat([torch.ones(1, *grid).double(), random(2 * order - 2, *grid)])
    e = random(len(A))
    c = q.constrain(A, e)
    rows = A.flatten(1)
    basis = torch.linalg.svd(rows)[2][len(A) :].mT
    dense = dense_precision(precision)
    inner = basis.mT @ dense @ basis
    start = rows.mT @ torch.linalg.solve(rows @ rows.mT, e)
    pull = basis.mT @ dense @ (q.loc.flatten(1) - start).unsqueeze(-1)
    on_basis = MultivariateNormal(torch.linalg.solve(inner, pull).squeeze(-1), precision_matrix=inner, validate_args=False)
    close = {"rtol": 1e-7, "atol": 1e-7}  # the null space of 70 sites comes from an iteration
    torch.testing.assert_close(c.mean.flatten(1), start + on_basis.mean @ basis.mT, **close)
    covariance = basis @ on_basis.covariance_matrix @ basis.mT
    torch.testing.assert_close(c.variance.flatten(1), covariance.diagonal(dim1=-2, dim2=-1), **close)
    site = tuple(size // 2 for size in grid)
    column = covariance[..., int(torch.arange(n).reshape(grid)[site])]
    torch.testing.assert_close(c.covariance_columns(site).flatten(1), column, **close)
    x = c.sample((4000,))
    torch.testing.assert_close(x.flatten(2) @ rows.mT, e.expand(4000, 2, len(A)), **close)
    torch.testing.assert_close(c.log_prob(x[:3]), on_basis.log_prob(x[:3].flatten(2) @ basis), **close)
    torch.testing.assert_close(c.entropy(), on_basis.entropy(), **close)
    deviation = (x - c.mean).square().mean(0).flatten(1)
    assert ((deviation - c.variance.flatten(1)).abs() <= 5 * c.variance.flatten(1) * math.sqrt(2 / 4000)).all()
    assert c.expand((3, 2)).mean.shape == (3, 2, *grid)


def test_intrinsic_fields_that_are_observed():
    precision = intrinsic((4, 5), 1)
    q, y = bg.SparseGMRF(random(4, 5), precision), random(4, 5)
    noise = torch.full((4, 5), math.inf).double()
    noise[1, 2:4] = 0.5
    p = q.posterior(y, noise)
    after = torch.linalg.inv(dense_precision(precision) + (1 / noise).flatten().diag())
    pull = (y - q.loc).flatten() / noise.flatten()
    torch.testing.assert_close(p.mean.flatten(), q.loc.flatten() + after @ pull, **CLOSE)
    torch.testing.assert_close(p.variance.flatten(), after.diagonal(), **CLOSE)
    p.log_prob(p.sample((2,))), p.entropy(), p.constrain(torch.ones(1, 4, 5).double(), torch.zeros(1).double()).mean
    unseen = q.posterior(y, math.inf)
    for call in (q.sample, q.entropy, lambda: q.log_prob(y), lambda: q.variance, lambda: p.log_evidence, lambda: unseen.mean):
        with pytest.raises(torch.linalg.LinAlgError, match=r"not positive-definite.*see constrain, or where it is observed"):
            call()
    with pytest.raises(torch.linalg.LinAlgError, match="A does not determine all of the 1 directions"):
        q.constrain(torch.eye(20).double().reshape(20, 4, 5)[:1] - 0.05, torch.zeros(1).double())


def test_what_is_not_positive_definite_is_refused():
    precision = random_precision(STENCILS["3x3"], (4, 5), (2,))
    precision.diag[1, 2, 3] = -1
    q = bg.SparseGMRF(random(4, 5), precision)
    with pytest.raises(torch.linalg.LinAlgError, match=r"precision of batch element \(1,\) .*not positive-definite"):
        q.sample()
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        q.constrain(torch.ones(1, 4, 5).double(), torch.zeros(1).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q, expected = random_field("5x5", (5, 4), batch=(2,))
    low = q.to(dtype)
    p = low.posterior(low.loc, 0.5)
    for field in (low, p, low.constrain(torch.ones(1, 5, 4).to(dtype), torch.ones(1).to(dtype))):
        assert field.mean.dtype == field.variance.dtype == field.sample().dtype == dtype
        x = field.sample((3,))
        assert field.log_prob(x).dtype == field.entropy().dtype == field.covariance_columns((0, 0)).dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(low.variance.double().flatten(1), expected.variance, rtol=20 * eps, atol=eps)


def test_batches_and_what_torch_asks_of_objects():
    for batch in ((0,), (2, 0), (3, 1)):
        q, _ = random_field("3x3", (4, 3), batch)
        p = q.posterior(random(4, 3), 1.0)
        for field in (q, p):
            assert field.variance.shape == field.mean.shape == (*batch, 4, 3)
            assert field.entropy().shape == batch
            assert field.log_prob(field.sample((2,))).shape == (2, *batch)
            assert field.covariance_columns([(0, 0)]).shape == (1, *batch, 4, 3)
    wide = q.expand((2, 3, 4))
    torch.testing.assert_close(wide[0, :, 1].log_prob(q.loc[:, 0]), q.log_prob(q.loc)[:, 0])
    assert wide.precision.batch_shape == wide.sample().shape[:3] == (2, 3, 4)
    leaves, spec = torch.utils._pytree.tree_flatten(q)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 3
    torch.testing.assert_close(again.log_prob(q.loc), q.log_prob(q.loc))
    assert not q.detach().precision.diag.requires_grad
    assert repr(q) == "SparseGMRF(batch_shape=(3, 1), event_shape=(4, 3))"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": torch.eye(20)}, TypeError, "precision is a Tensor, expected a StencilPrecision"),
        ({"loc": torch.zeros(5, 4).double()}, ValueError, r"loc has shape \(5, 4\)"),
        ({"loc": torch.zeros(4, 5)}, TypeError, "loc is torch.float32"),
        ({"loc": torch.full((4, 5), math.nan).double()}, ValueError, "loc"),
        ({"loc": torch.zeros(3, 4, 5).double()}, ValueError, r"loc has batch shape \(3,\), .*precision"),
    ],
)
def test_bad_input(change, error, message):
    given = {"loc": random(4, 5), "precision": random_precision(STENCILS["3x3"], (4, 5), (2,))}
    with pytest.raises(error, match=message):
        bg.SparseGMRF(**(given | change))


@pytest.mark.parametrize("banded", [False, True])
def test_noise_is_not_of_a_sparse_precision(banded):
    precision = random_precision(STENCILS["3x3"], (4, 5))
    noise = bg.SparseGMRF(random(4, 5), precision)
    q = bg.GMRF(random(4, 5), bg.StencilCholesky.from_precision(precision)) if banded else noise
    with pytest.raises(TypeError, match="noise is SparseGMRF, expected GMRF"):
        q.posterior(random(4, 5), noise=noise)
    with pytest.raises(TypeError, match="noise is SparseGMRF, expected GMRF"):
        q.posterior(random(4, 5), noise=noise, covariates=random(1, 4, 5), covariate_variance=1.0)
    with pytest.raises(TypeError, match="noise_variance is SparseGMRF, expected a number or a tensor"):
        q.posterior(random(4, 5), noise)


@pytest.mark.parametrize(
    "boolean", [True, torch.ones(4, 5, dtype=torch.bool), np.ones((4, 5), dtype=bool)], ids=["bool", "torch", "numpy"]
)
def test_a_mask_is_no_variance(boolean):
    """It was taken for variances of 0, exact, where it is False: just where nothing was seen."""
    q, _ = random_field("3x3", (4, 5))
    for field in (q, bg.GMRF(q.loc, bg.StencilCholesky.from_precision(q.precision))):
        with pytest.raises(TypeError, match="noise_variance is boolean, expected numbers"):
            field.posterior(random(4, 5), boolean)
        with pytest.raises(TypeError, match="covariate_variance is boolean, expected numbers"):
            field.posterior(random(4, 5), 1.0, covariates=random(1, 4, 5), covariate_variance=True)
    with pytest.raises(TypeError, match="correlation_range is boolean, expected numbers"):
        bg.matern_precision((4, 5), True, 1)


def test_numbers_that_are_not_finite():
    precision = random_precision(STENCILS["3x3"], (4, 5))
    precision.off_diag[1, 0, 2] = math.inf
    with pytest.raises(ValueError, match="precision has NaN or infinite entries, expected finite ones"):
        bg.SparseGMRF(random(4, 5), precision)
    q, _ = random_field("3x3", (4, 5))
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(q.loc * math.nan)
    for method, count in (("best", 1), ("exact", 0)):
        with pytest.raises(ValueError, match=r"method is 'best', expected|num_samples is 0, expected at least 1"):
            q.marginal_variance(method, count)


def test_fields_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("banded_gmrf.inference.priors._MAX_OPERATIONS", 100)
    q, _ = random_field("3x3", (6, 5))
    p = q.posterior(q.loc, 1.0, method="iterative")
    for call in (q.sample, q.entropy, lambda: p.log_evidence, lambda: q.posterior(q.loc, 1.0, method="direct")):
        with pytest.raises(ValueError, match=r"needs about .* operations and .* numbers for the grid \(6, 5\)"):
            call()
