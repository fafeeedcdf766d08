"""Factors from covariances and samples, against dense float64 linear algebra."""

import itertools

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf import construction, estimation
from tests.cases import FACTORS, STENCILS, dense
from tests.dense import exists, neighbours, random_factor

# Blocks of at most 13 sites with condition numbers below 1e3: some hundred roundings, amplified by as much.
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-11}, torch.float32: {"rtol": 2e-3, "atol": 2e-3}}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCE[actual.dtype])


def random_covariance(n, batch=()):
    """Positive definite with eigenvalues between 1 and about 50."""
    a = torch.randn(*batch, n, 2 * n, dtype=torch.float64)
    return a @ a.mT / n + torch.eye(n, dtype=torch.float64)


def optimal_factor(covariance, stencil, grid):
    """The closed form, column by column, as the paper has it: (n, n)."""
    raster = {site: i for i, site in enumerate(itertools.product(*(range(n) for n in grid)))}
    columns = {site: [i] for site, i in raster.items()}
    for _, here, there in neighbours(stencil.offsets, grid):
        columns[here].append(raster[there])
    L = torch.zeros_like(covariance)
    for j, s in enumerate(columns.values()):
        first = covariance[s][:, s].inverse()[:, 0]
        L[s, j] = first / first[0].sqrt()
    return L


def kl(covariance, L):
    """KL(N(0, Σ) ‖ N(0, (L Lᵀ)⁻¹)) in nats, dense."""
    n = len(covariance)
    whitened = L.mT @ covariance @ L
    return 0.5 * (whitened.trace() - n - torch.linalg.slogdet(whitened).logabsdet)


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_from_covariance_equals_the_closed_form(name, grid):
    stencil = STENCILS[name]
    covariance = random_covariance(torch.Size(grid).numel(), batch=(2,))
    L = bg.StencilCholesky.from_covariance(covariance, stencil, grid)
    assert L.batch_shape == (2,)
    for matrix, expected in zip(dense(L), covariance, strict=True):
        assert_close(matrix, optimal_factor(expected, stencil, grid))
    assert (L.off_diag[:, ~exists(stencil.offsets, grid)] == 0).all()


@pytest.mark.parametrize(("stencil", "grid"), [(bg.Stencil.box((6,)), (7,)), (bg.Stencil.box((2, 3)), (3, 4))])
def test_a_stencil_that_reaches_every_later_site_gives_the_exact_factor(stencil, grid):
    covariance = random_covariance(torch.Size(grid).numel())
    L = bg.StencilCholesky.from_covariance(covariance, stencil, grid).to_dense()
    assert_close(L @ L.mT, covariance.inverse())


def test_no_factor_near_the_optimal_one_has_a_smaller_divergence():
    stencil, grid = STENCILS["5x5"], (5, 4)
    covariance = random_covariance(20)
    L = bg.StencilCholesky.from_covariance(covariance, stencil, grid)
    log_diag, off_diag = L.log_diag.clone().requires_grad_(), L.off_diag.clone().requires_grad_()
    best = kl(covariance, dense(bg.StencilCholesky(log_diag, off_diag, stencil)))
    for gradient in torch.autograd.grad(best, (log_diag, off_diag)):
        assert_close(gradient, torch.zeros_like(gradient))
    for _ in range(5):
        other = bg.StencilCholesky(
            log_diag + 0.1 * torch.randn_like(log_diag), off_diag + 0.1 * torch.randn_like(off_diag), stencil
        )
        assert kl(covariance, dense(other)) > best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_covariance_of_a_function_equals_that_of_its_matrix(dtype, monkeypatch):
    monkeypatch.setattr(construction, "_CHUNK_ELEMENTS", 3 * 2 * 25)  # three sites at a time
    stencil, grid = STENCILS["volume"], (3, 2, 4)
    ranges = torch.tensor([0.7, 1.5], dtype=dtype)[:, None, None, None]
    calls = []

    def covariance(a, b):
        calls.append((a.shape, b.shape))
        return torch.exp(-(a - b).to(dtype).square().sum(-1).sqrt() / ranges)

    L = bg.StencilCholesky.from_covariance(covariance, stencil, grid)
    assert calls == [((1, 1, 1, 3), (1, 1, 1, 3)), *[((3, 5, 1, 3), (3, 1, 5, 3))] * 8]
    sites = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    matrix = covariance(sites[None, :, None], sites[None, None])[:, 0]
    expected = bg.StencilCholesky.from_covariance(matrix, stencil, grid)
    assert L.dtype == dtype
    assert L.batch_shape == (2,)
    assert_close(L.log_diag, expected.log_diag)
    assert_close(L.off_diag, expected.off_diag)
    assert_close(L.to_dense(), bg.StencilCholesky.from_covariance(matrix.double(), stencil, grid).to_dense())


@pytest.mark.parametrize(("name", "grid"), [("5x5", (4, 3)), ("line with a gap", (5,)), ("volume", (2, 2, 3)), ("5x5", (1, 1))])
def test_gradients_of_from_covariance(name, grid):
    stencil = STENCILS[name]

    def factor(a):
        covariance = a @ a.mT + torch.eye(len(a), dtype=a.dtype)
        L = bg.StencilCholesky.from_covariance(covariance, stencil, grid)
        return L.log_diag, L.off_diag

    n = torch.Size(grid).numel()
    torch.autograd.gradcheck(factor, torch.randn(n, n, dtype=torch.float64).requires_grad_())


def test_half_precision_is_computed_in_float32():
    stencil, grid = STENCILS["3x3"], (3, 4)
    covariance = random_covariance(12).bfloat16()
    L = bg.StencilCholesky.from_covariance(covariance, stencil, grid)
    expected = bg.StencilCholesky.from_covariance(covariance.float(), stencil, grid)
    assert L.dtype == torch.bfloat16
    assert torch.equal(L.off_diag, expected.off_diag.bfloat16())


def test_views_and_empty_batches():
    stencil, grid = STENCILS["3x3"], (2, 3)
    covariance = random_covariance(12)
    view = covariance[::2, ::2]
    assert not view.is_contiguous()
    L = bg.StencilCholesky.from_covariance(view, stencil, grid)
    assert_close(L.to_dense(), optimal_factor(view, stencil, grid))
    empty = bg.StencilCholesky.from_covariance(covariance.new_zeros(0, 2, 6, 6), stencil, grid)
    assert empty.batch_shape == (0, 2)


BAD_COVARIANCES = [
    pytest.param(*case, id=case[-1])
    for case in [
        (torch.eye(11), ValueError, r"covariance has shape \(11, 11\), expected \(\*batch, 12, 12\) for grid \(3, 4\)"),
        (torch.eye(12).int(), TypeError, "covariance is torch.int32, expected float16"),
        (torch.eye(12).numpy(), TypeError, "covariance is a ndarray, expected a torch.Tensor or a function"),
        (
            torch.eye(12) - 2 * torch.nn.functional.one_hot(torch.tensor(5), 12).diag(),
            ValueError,
            r"covariance is not positive definite at site \(0, 0\) and its 3 neighbours",
        ),
        (
            torch.stack([torch.eye(12), torch.full((12, 12), torch.nan)]),
            ValueError,
            r"covariance is not positive definite of batch element \(1,\) at site \(0, 0\)",
        ),
        (lambda a, b: 0.0, TypeError, r"covariance\(a, b\) is a float, expected a torch.Tensor"),
        (
            lambda a, b: torch.zeros(3),
            ValueError,
            r"covariance\(a, b\) has shape \(3,\) for a single pair of sites, expected \(\*batch, 1, 1, 1\)",
        ),
        (
            lambda a, b: (a - b).float().sum(-1)[:, :1, :1],
            ValueError,
            r"covariance\(a, b\) has shape \(12, 1, 1\), expected \(12, 5, 5\)",
        ),
    ]
]


@pytest.mark.parametrize(("covariance", "error", "message"), BAD_COVARIANCES)
def test_bad_covariances(covariance, error, message):
    with pytest.raises(error, match=message):
        bg.StencilCholesky.from_covariance(covariance, STENCILS["3x3"], (3, 4))


def test_bad_stencils_and_grids():
    with pytest.raises(TypeError, match="stencil is a tuple, expected a Stencil"):
        bg.StencilCholesky.from_covariance(torch.eye(12), STENCILS["3x3"].offsets, (3, 4))
    for grid in ((12,), (3, 0)):
        with pytest.raises(ValueError, match=r"grid is \(.*\), expected 2 axes of at least one site"):
            bg.StencilCholesky.from_covariance(torch.eye(12), STENCILS["3x3"], grid)


def sample_covariance(samples, ndim, loc=None):
    """(*batch, n, n), divided by the number of samples."""
    x = (samples - (samples.mean(0) if loc is None else loc)).flatten(-ndim).movedim(0, -2)
    return x.mT @ x / len(samples)


@pytest.mark.parametrize(("name", "grid"), FACTORS)
@pytest.mark.parametrize("with_loc", [False, True])
def test_from_samples_is_from_covariance_of_their_covariance(name, grid, with_loc):
    stencil = STENCILS[name]
    samples = 100 + torch.randn(40, 2, *grid, dtype=torch.float64)
    loc = torch.full(grid, 101.0, dtype=torch.float64) if with_loc else None
    L = bg.StencilCholesky.from_samples(samples, stencil, loc=loc)
    assert L.batch_shape == (2,)
    expected = bg.StencilCholesky.from_covariance(sample_covariance(samples, stencil.ndim, loc), stencil, grid)
    assert_close(L.log_diag, expected.log_diag)
    assert_close(L.off_diag, expected.off_diag)


def test_from_samples_is_a_regression_of_each_site():
    stencil, grid = STENCILS["3x3"], (4, 3)
    samples = torch.randn(30, *grid, dtype=torch.float64)
    L = bg.StencilCholesky.from_samples(samples, stencil)
    columns = {}
    for k, here, there in neighbours(stencil.offsets, grid):
        columns.setdefault(here, []).append((k, there))
    for site, entries in columns.items():
        regressors = torch.stack([samples[:, *there] for _, there in entries] + [torch.ones(30).double()], 1)
        fit = torch.linalg.lstsq(regressors, samples[:, *site][:, None])
        deviation = (samples[:, *site] - (regressors @ fit.solution)[:, 0]).square().mean().sqrt()
        assert_close(L.diag[site], 1 / deviation)
        coefficients = torch.stack([L.off_diag[k][site] for k, _ in entries])
        assert_close(coefficients, -fit.solution[:-1, 0] / deviation)


def test_the_likelihood_has_its_maximum_there():
    stencil, grid = STENCILS["5x5"], (4, 5)
    samples = torch.randn(40, *grid, dtype=torch.float64)
    for ridge in (0.0, 0.3):
        L = bg.StencilCholesky.from_samples(samples, stencil, loc=torch.zeros(grid).double(), ridge=ridge)
        log_diag, off_diag = L.log_diag.clone().requires_grad_(), L.off_diag.clone().requires_grad_()
        nats = bg.negative_log_likelihood(samples, log_diag, off_diag, stencil).mean()
        loss = nats + 0.5 * ridge * (log_diag.exp().square().sum() + off_diag.square().sum())
        for gradient in torch.autograd.grad(loss, (log_diag, off_diag)):
            assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("stationary", [False, True])
def test_a_stream_of_chunks_equals_one_tensor(stationary, monkeypatch):
    stencil, grid = STENCILS["3x3"], (4, 3)
    samples = 10 + torch.randn(30, 2, *grid)
    expected = bg.StencilCholesky.from_samples(samples, stencil, stationary=stationary)
    for chunks in (samples.split([7, 1, 22]), iter(samples.split(11))):
        L = bg.StencilCholesky.from_samples(chunks, stencil, stationary=stationary)
        assert_close(L.to_dense(), expected.to_dense())
    monkeypatch.setattr(estimation, "_CHUNK_ELEMENTS", 50)
    assert_close(bg.StencilCholesky.from_samples(samples, stencil, stationary=stationary).to_dense(), expected.to_dense())


def stationary_factor(samples, stencil, loc):
    """By least squares for each site on its own: a row for each sample and place where its neighbours exist."""
    grid = samples.shape[1:]
    sites = list(itertools.product(*(range(n) for n in grid)))
    entries = {site: {} for site in sites}
    for k, here, there in neighbours(stencil.offsets, grid):
        entries[here][k] = there
    log_diag = torch.zeros(grid, dtype=torch.float64)
    off_diag = torch.zeros(len(stencil), *grid, dtype=torch.float64)
    centred = samples - loc
    for site in sites:
        pattern = sorted(entries[site])
        places = [other for other in sites if set(pattern) <= set(entries[other])]
        target = torch.cat([centred[:, *place] for place in places])
        regressors = torch.stack(
            [torch.cat([centred[:, *entries[place][k]] for place in places]) for k in pattern] or [torch.zeros_like(target)], 1
        )
        coefficients = torch.linalg.lstsq(regressors, target[:, None], driver="gelsd").solution
        deviation = (target - (regressors @ coefficients)[:, 0]).square().mean().sqrt()
        log_diag[site] = -deviation.log()
        for k, coefficient in zip(pattern, coefficients[:, 0], strict=False):
            off_diag[k][site] = -coefficient / deviation
    return log_diag, off_diag


@pytest.mark.parametrize(
    ("name", "grid"), [("5x5", (6, 7)), ("line with a gap", (7,)), ("diagonal", (2, 3)), ("volume", (3, 4, 3))]
)
@pytest.mark.parametrize("with_loc", [False, True])
def test_stationary_coefficients_are_pooled_where_the_neighbours_exist(name, grid, with_loc):
    stencil = STENCILS[name]
    samples = 3 + torch.randn(9, *grid, dtype=torch.float64)
    loc = torch.linspace(2, 4, grid[-1], dtype=torch.float64).expand(grid) if with_loc else None
    L = bg.StencilCholesky.from_samples(samples, stencil, loc=loc, stationary=True)
    log_diag, off_diag = stationary_factor(samples, stencil, samples.mean() if loc is None else loc)
    assert_close(L.log_diag, log_diag)
    assert_close(L.off_diag, off_diag)


@pytest.mark.parametrize("stationary", [False, True])
def test_gradients_of_from_samples(stationary):
    stencil = STENCILS["line with a gap"]

    def factor(samples):
        L = bg.StencilCholesky.from_samples(samples, stencil, stationary=stationary)
        return L.log_diag, L.off_diag

    torch.autograd.gradcheck(factor, torch.randn(6, 2, 5, dtype=torch.float64).requires_grad_())


def test_samples_of_a_factor_give_it_back():
    generator = torch.Generator().manual_seed(0)
    stencil, grid, count = STENCILS["3x3"], (5, 4), 20_000
    L = bg.StencilCholesky(*random_factor(stencil.offsets, grid, generator=generator, nan_outside=False), stencil)
    samples = L.solve(torch.randn(count, *grid, dtype=torch.float64, generator=generator), transpose=True)
    estimate = bg.StencilCholesky.from_samples(samples, stencil)
    # Standard errors are at most L_jj sqrt((1 + coefficient²) / count), about 0.015; five of them.
    torch.testing.assert_close(dense(estimate), dense(L), rtol=0, atol=0.08)


def test_one_sample_and_no_batch_elements():
    stencil, grid = STENCILS["3x3"], (4, 5)
    one = bg.StencilCholesky.from_samples(torch.randn(1, *grid), stencil, ridge=1.0, loc=torch.zeros(grid))
    assert one.log_diag.isfinite().all()
    assert bg.StencilCholesky.from_samples(torch.zeros(9, 0, *grid), stencil).batch_shape == (0,)


def samples_of(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


BAD_SAMPLES = [
    pytest.param(*case, id=case[-1])
    for case in [
        (samples_of(4), {}, ValueError, r"samples has shape \(4,\), expected \(S, \*batch, \*grid\)"),
        (samples_of(0, 3, 4), {}, ValueError, r"samples has shape \(0, 3, 4\), expected .* at least one sample"),
        (samples_of(9, 3, 4).int(), {}, TypeError, "samples is torch.int32, expected float16"),
        (5, {}, TypeError, "samples is a int, expected a torch.Tensor or an iterable of them"),
        ([], {}, ValueError, "samples has no chunks, expected at least one"),
        ([samples_of(9, 3, 4), None], {}, TypeError, "samples is a NoneType, expected a torch.Tensor"),
        ([samples_of(9, 3, 4), samples_of(9, 4, 3)], {}, ValueError, r"samples has shape \(9, 4, 3\) after \(9, 3, 4\)"),
        ([samples_of(9, 3, 4), samples_of(9, 3, 4).double()], {}, TypeError, "samples is torch.float64, its first chunk is"),
        (samples_of(9, 3, 4), {"loc": samples_of(4, 3)}, ValueError, r"loc has shape \(4, 3\), expected \(..., 3, 4\)"),
        (samples_of(9, 3, 4), {"loc": samples_of(3, 4).double()}, TypeError, "loc is torch.float64, samples is torch.float32"),
        (
            samples_of(9, 3, 4),
            {"loc": samples_of(2, 3, 4)},
            ValueError,
            r"loc has batch shape \(2,\), samples has batch shape \(\)",
        ),
        (samples_of(9, 3, 4), {"ridge": -1.0}, ValueError, "ridge is -1.0, expected a finite number that is not negative"),
        (
            samples_of(5, 3, 4),
            {},
            ValueError,
            "samples has 5 observations of a site with 4 neighbours, expected at least 6",
        ),
        (
            samples_of(1, 3, 4),
            {"stationary": True, "loc": samples_of(3, 4)},
            ValueError,
            "samples has 4 observations of a site with 4 neighbours, expected at least 5",
        ),
        (
            samples_of(9, 3, 4),
            {},
            ValueError,
            r"the covariance of samples, with ridge 0.0, is not positive definite at site \(0, 0\) and its 3 neighbours",
        ),
        (
            samples_of(9, 3, 4),
            {"stationary": True},
            ValueError,
            r"the covariance of samples, with ridge 0.0, is not positive definite at site \(., .\) and its . neighbours",
        ),
    ]
]


@pytest.mark.parametrize(("samples", "options", "error", "message"), BAD_SAMPLES)
def test_bad_samples(samples, options, error, message):
    with pytest.raises(error, match=message):
        bg.StencilCholesky.from_samples(samples, STENCILS["3x3"], **options)
