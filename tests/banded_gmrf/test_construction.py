"""Factors from covariances, samples and precisions, against dense float64 linear algebra."""

import itertools
import math
import warnings

import pytest
import scipy.sparse
import torch

import banded_gmrf as bg
from banded_gmrf.construction import covariance as nearest_to_covariance
from banded_gmrf.construction import precision as elimination
from banded_gmrf.construction import samples as estimation
from banded_gmrf.diagnostics import sample_growth
from tests.cases import FACTORS, STENCILS, dense, dense_precision, random_cholesky
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
    L = dense(bg.StencilCholesky.from_covariance(covariance, stencil, grid))
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
    monkeypatch.setattr(nearest_to_covariance, "_CHUNK_ELEMENTS", 3 * 2 * 25)  # three sites at a time
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
    assert_close(dense(L).to(dtype), dense(bg.StencilCholesky.from_covariance(matrix.double(), stencil, grid)))


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
    assert_close(dense(L), optimal_factor(view, stencil, grid))
    empty = bg.StencilCholesky.from_covariance(covariance.new_zeros(0, 2, 6, 6), stencil, grid)
    assert empty.batch_shape == (0, 2)


BAD_COVARIANCES = [
    pytest.param(*case, id=case[-1])
    for case in [
        (torch.eye(11), ValueError, r"covariance has shape \(11, 11\), expected \(\*batch, 12, 12\) for grid \(3, 4\)"),
        (torch.ones(12), ValueError, r"covariance has shape \(12,\), expected \(\*batch, 12, 12\)"),
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
        assert_close(dense(L), dense(expected))
    monkeypatch.setattr(estimation, "_CHUNK_ELEMENTS", 50)
    assert_close(dense(bg.StencilCholesky.from_samples(samples, stencil, stationary=stationary)), dense(expected))


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


def smooth_images(count, size, width):
    """Stationary, smoother than a factor with few neighbours can be: white noise, convolved with itself shifted a few times."""
    x = torch.randn(count, size + 2 * width, size + 2 * width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for axis in (-2, -1):
        for _ in range(2 * width):
            x = x.narrow(axis, 1, x.shape[axis] - 1) + x.narrow(axis, 0, x.shape[axis] - 1)
    x = x / x.std()
    return x + 0.01 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def growth(L):
    return sample_growth(bg.GMRF(torch.zeros(L.grid, dtype=torch.float64), L), 64)


def test_a_stationary_factor_whose_samples_grow_warns_and_is_mended():
    stencil, samples = bg.Stencil.cross(2), smooth_images(8, 32, 4)
    state = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match=r"samples of the stationary factor grow [0-9.e+]+-fold across the grid") as warned:
        likeliest = bg.StencilCholesky.from_samples(samples, stencil, stationary=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = bg.StencilCholesky.from_samples(samples, stencil, stationary=True, stable="project")
        stable = bg.StencilCholesky.from_samples(samples, stencil, stationary=True, ridge=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert warned[0].filename == __file__
    assert growth(likeliest) > 100
    # Twofold for the samples that it was mended with; the standard error of a line's root mean square is about 1 / √128.
    assert growth(mended) < 3
    assert growth(stable) < 3

    def nats(L):
        return bg.GMRF(samples.mean().expand(L.grid), L).log_prob(samples).mean()

    assert nats(likeliest) > nats(mended) > nats(stable)
    # Off-diagonals fell by one rate for each step in t, and the diagonal is the most likely one for them.
    ratio = (mended.off_diag / mended.diag) / (likeliest.off_diag / likeliest.diag)
    exists = stencil.mask(L_grid := mended.grid)
    times = torch.tensor([sum(s * o for s, o in zip(stencil.slopes, offset, strict=True)) for offset in stencil.offsets])
    rates = -ratio.log() / times[:, None, None]
    assert_close(rates[exists], rates[exists][:1].expand(exists.sum()))
    y = bg.GMRF(samples.mean().expand(L_grid), mended).whiten(samples)[:, exists.all(0)]
    assert_close(y.square().mean(), torch.ones((), dtype=torch.float64))


def test_only_the_batch_elements_that_grow_are_mended():
    stencil, rough = bg.Stencil.cross(2), torch.randn(8, 24, 24, dtype=torch.float64)
    samples = torch.stack([rough, smooth_images(8, 24, 4)], 1)
    mended = bg.StencilCholesky.from_samples(samples, stencil, stationary=True, stable="project")
    for number in range(2):
        alone = bg.StencilCholesky.from_samples(samples[:, number], stencil, stationary=True, stable="project")
        assert_close(mended[number].off_diag, alone.off_diag)
    assert_close(mended.off_diag[0], bg.StencilCholesky.from_samples(rough, stencil, stationary=True).off_diag)
    one = torch.vmap(
        lambda samples: bg.StencilCholesky.from_samples(samples, stencil, stationary=True, stable="project").off_diag, in_dims=1
    )
    assert_close(one(samples), mended.off_diag)
    empty = bg.StencilCholesky.from_samples(samples[:, :0], stencil, stationary=True, stable="project")
    assert empty.batch_shape == (0,)


def test_gradients_of_a_mended_factor():
    stencil = bg.Stencil.cross(2)
    samples = smooth_images(3, 12, 3).requires_grad_()

    def off_diag(samples):
        return bg.StencilCholesky.from_samples(samples, stencil, stationary=True, stable="project").off_diag

    direction, step = torch.randn_like(samples), 1e-6
    ahead, behind = (off_diag(samples.detach() + sign * step * direction) for sign in (1, -1))
    weights = torch.randn_like(ahead)
    (gradient,) = torch.autograd.grad((off_diag(samples) * weights).sum(), samples)
    expected = ((ahead - behind) * weights).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-5)


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
        (samples_of(9, 3, 4) * torch.nan, {"ridge": 1.0}, ValueError, "samples has NaN or infinite entries"),
        ([samples_of(9, 3, 4), samples_of(9, 3, 4) + torch.inf], {}, ValueError, "samples has NaN or infinite entries"),
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
        (
            samples_of(9, 3, 4),
            {"stationary": True, "stable": True},
            ValueError,
            "stable is True, expected None or 'project'",
        ),
        (samples_of(9, 3, 4), {"stable": "project"}, ValueError, "stable is 'project', expected None for a factor that is not"),
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
        (
            torch.full((9, 3, 4), 0.1),
            {"stationary": True},
            ValueError,
            r"at site \(2, 3\) and its 0 neighbours: it is singular, with a variance of 0 at the site, as where",
        ),
    ]
]


@pytest.mark.parametrize(("samples", "options", "error", "message"), BAD_SAMPLES)
def test_bad_samples(samples, options, error, message):
    with pytest.raises(error, match=message):
        bg.StencilCholesky.from_samples(samples, STENCILS["3x3"], **options)


def precisions(grid):
    """One of each kind, positive definite and in float64."""
    d = len(grid)
    generator = torch.Generator().manual_seed(0)
    coupling = torch.randn(2, torch.Size(grid).numel(), torch.Size(grid).numel(), dtype=torch.float64, generator=generator)
    return {
        "matern": bg.matern_precision(grid, torch.tensor([2.0, 5.0]), 2 - d / 2),
        "car": bg.car_precision(grid, torch.tensor([[0.5], [-0.9]]), torch.tensor([1.0, 2.0, 3.0]), neighbours_of(d)),
        "thin plate": bg.thin_plate_precision(grid, 2.0, 0.1),
        "dense": bg.StencilPrecision.from_matrix(coupling @ coupling.mT + torch.eye(coupling.shape[-1]), grid),
    }


def neighbours_of(ndim):
    """Skewed, the last offset not in the last row that is reached by the nearest ones."""
    return bg.Stencil({1: [1, 3], 2: [(0, 1), (1, -2)], 3: [(0, 0, 1), (0, 1, -1), (1, 0, 0)]}[ndim])


PRECISION_GRIDS = [(9,), (5, 7), (2, 3), (3, 4, 3)]


@pytest.mark.parametrize("grid", PRECISION_GRIDS)
@pytest.mark.parametrize("name", ["matern", "car", "thin plate", "dense"])
def test_from_precision_is_the_cholesky_factor(name, grid):
    precision = precisions(grid)[name]
    matrix = dense_precision(precision)
    assert_close(matrix, matrix.mT)
    L = bg.StencilCholesky.from_precision(precision)
    assert L.batch_shape == matrix.shape[:-2]
    assert_close(dense(L), torch.linalg.cholesky(matrix))
    assert (L.off_diag[..., ~exists(L.stencil.offsets, grid)] == 0).all()


@pytest.mark.parametrize("name", ["3x3", "5x5", "cross", "bands of a box"])
def test_no_offset_of_the_exact_factor_is_superfluous(name):
    stencil = STENCILS[name]
    grid = {2: (7, 6), 3: (4, 4, 4)}[stencil.ndim]
    off_diag = torch.rand(len(stencil), *grid, dtype=torch.float64) - 0.5
    precision = bg.StencilPrecision(torch.full(grid, 30.0).double(), off_diag, stencil)
    L = bg.StencilCholesky.from_precision(precision)
    assert (L.off_diag.flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("block", [1, 5, 32])
def test_the_factor_does_not_depend_on_the_blocks(block, monkeypatch):
    monkeypatch.setattr(elimination, "_MIN_BLOCK_SITES", block)
    for precision in (bg.matern_precision((11, 3), 4.0, 1.0), bg.car_precision((4, 7), 0.9, neighbours=neighbours_of(2))):
        assert_close(dense(bg.StencilCholesky.from_precision(precision)), torch.linalg.cholesky(dense_precision(precision)))


@pytest.mark.parametrize("grid", PRECISION_GRIDS)
@pytest.mark.parametrize("name", ["matern", "car", "thin plate"])
@pytest.mark.filterwarnings("ignore:the factor with .* times the variance")  # a thin plate in a small box
def test_from_precision_with_a_stencil_is_from_covariance_of_the_inverse(name, grid):
    precision = precisions(grid)[name]
    for radius in (1, 2):
        stencil = bg.Stencil.box((radius,) * len(grid))
        L = bg.StencilCholesky.from_precision(precision, stencil)
        expected = bg.StencilCholesky.from_covariance(dense_precision(precision).inverse(), stencil, grid)
        assert_close(L.log_diag, expected.log_diag)
        assert_close(L.off_diag, expected.off_diag)


@pytest.mark.parametrize(
    ("name", "other"), [("5x5", "3x3"), ("3x3", "5x5"), ("next row only", "skewed"), ("volume", "bands of a box")]
)
def test_the_nearest_factor_with_another_stencil(name, other):
    stencil = STENCILS[other]
    grid = {2: (5, 6), 3: (3, 2, 4)}[stencil.ndim]
    L = random_cholesky(STENCILS[name], grid, batch=(2, 1)).expand((2, 3))
    nearest = L.nearest(stencil)
    expected = bg.StencilCholesky.from_covariance((dense(L) @ dense(L).mT).inverse(), stencil, grid)
    assert nearest.batch_shape == L.batch_shape
    assert_close(dense(nearest), dense(expected))


def test_a_smooth_field_loses_no_digits_from_row_to_row():
    grid, stencil = (30, 12), STENCILS["5x5"]
    precision = bg.matern_precision(grid, 40.0, 1.0)
    L = bg.StencilCholesky.from_precision(precision, stencil)
    expected = bg.StencilCholesky.from_covariance(dense_precision(precision).inverse(), stencil, grid)
    # Both come from covariances whose blocks have a condition number of about 1e6.
    torch.testing.assert_close(L.log_diag, expected.log_diag, rtol=0, atol=1e-8)


@pytest.mark.parametrize("grid", [(1, 2), (5, 7), (64, 9), (3, 3, 3), (500,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_intrinsic_fields_have_no_factor(grid, dtype):
    for precision in (bg.car_precision(grid, 1.0, dtype=dtype), bg.thin_plate_precision(grid, 2.0, 0.0, dtype=dtype)):
        with pytest.raises(torch.linalg.LinAlgError, match="makes such a field proper"):
            bg.StencilCholesky.from_precision(precision)


def test_a_stencil_that_changes_the_variance_warns():
    stencil, precision = bg.Stencil.box((1, 1, 1)), bg.thin_plate_precision((3, 4, 3), 2.0, 0.1)
    with pytest.warns(RuntimeWarning, match=r"the factor with 13 offsets has \d+\.\d+ times the variance") as caught:
        L = dense(bg.StencilCholesky.from_precision(precision, stencil))
    ratio = float((L @ L.mT).inverse().trace() / dense_precision(precision).inverse().trace())
    assert abs(ratio - 1) > 0.2
    assert f"{ratio:.2f} times" in str(caught[0].message)
    assert caught[0].filename == __file__
    ridges = torch.tensor([10.0, 0.1])  # the first keeps its variance
    with pytest.warns(RuntimeWarning, match=f"{ratio:.2f} times"):
        bg.StencilCholesky.from_precision(bg.thin_plate_precision((3, 4, 3), 2.0, ridges), stencil)
    bg.StencilCholesky.from_precision(bg.thin_plate_precision((3, 4, 3), 2.0, 10.0), stencil)


def test_a_precision_in_float32():
    precision = bg.matern_precision((5, 7), 3.0, 1.0, dtype=torch.float32)
    for stencil in (None, STENCILS["3x3"]):
        L = bg.StencilCholesky.from_precision(precision, stencil)
        assert L.dtype == torch.float32
        expected = bg.StencilCholesky.from_precision(bg.matern_precision((5, 7), 3.0, 1.0), stencil)
        assert_close(dense(L).float(), dense(expected))


@pytest.mark.parametrize("stencil", [None, STENCILS["3x3"]])
def test_gradients_of_from_precision(stencil):
    def factor(correlation_range, variance):
        L = bg.StencilCholesky.from_precision(bg.matern_precision((4, 3), correlation_range, 1.0, variance), stencil)
        return L.log_diag, L.off_diag

    parameters = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    torch.autograd.gradcheck(factor, [parameter.requires_grad_() for parameter in parameters])


def test_entries_of_a_precision_that_do_not_exist_are_ignored():
    stencil, grid = STENCILS["5x5"], (3, 4)
    _, off_diag = random_factor(stencil.offsets, grid)
    assert off_diag.isnan().any()
    diag = torch.full(grid, 9.0, dtype=torch.float64)
    expected = bg.StencilPrecision(diag, off_diag.nan_to_num(), stencil)
    precision = bg.StencilPrecision(diag, off_diag, stencil)
    assert_close(precision.to_dense(), dense_precision(expected))
    assert_close(dense(bg.StencilCholesky.from_precision(precision)), torch.linalg.cholesky(dense_precision(expected)))


@pytest.mark.parametrize("grid", PRECISION_GRIDS)
def test_a_precision_from_a_matrix(grid):
    expected = precisions(grid)["thin plate"]
    matrix = dense_precision(expected)
    sparse = scipy.sparse.csr_array(matrix.numpy())
    stored_twice = torch.cat([matrix.to_sparse().indices(), matrix.to_sparse().indices()], 1)
    halves = torch.cat([matrix.to_sparse().values() / 2] * 2)
    uncoalesced = torch.sparse_coo_tensor(stored_twice, halves, matrix.shape, check_invariants=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its compressed layouts a beta
        tensors = [matrix.to_sparse(), matrix.to_sparse_csr(), matrix.to_sparse_csc(), uncoalesced]
    for source in (matrix, *tensors, sparse, sparse.tocoo(), scipy.sparse.csc_matrix(sparse)):
        precision = bg.StencilPrecision.from_matrix(source, grid)
        assert precision.stencil == expected.stencil
        assert torch.equal(dense_precision(precision), matrix)
    assert_close(expected.to_dense(), matrix)
    x = torch.randn(2, *grid, dtype=torch.float64)
    assert_close(precision.matvec(x).flatten(1), x.flatten(1) @ matrix)


def test_gradients_reach_the_values_of_a_sparse_tensor():
    matrix = dense_precision(precisions((3, 4))["thin plate"])
    values = matrix.to_sparse().values().clone().requires_grad_()
    sparse = torch.sparse_coo_tensor(matrix.to_sparse().indices(), values, matrix.shape, check_invariants=True)
    dense_matrix = matrix.clone().requires_grad_()
    gradients = []
    for source, leaf in ((sparse, values), (dense_matrix, dense_matrix)):
        L = bg.StencilCholesky.from_precision(bg.StencilPrecision.from_matrix(source, (3, 4)))
        gradients += torch.autograd.grad(L.logdet(), leaf)
    assert torch.equal(gradients[0], gradients[1][matrix != 0])


def test_matern_fields_have_their_variance_and_correlation():
    # Far from the edges; what is left is the difference between the lattice and the continuous field.
    line = bg.matern_precision((201,), 20.0, 0.5, 3.0).to_dense().inverse()
    torch.testing.assert_close(line[100, 100].item(), 3.0, rtol=0.01, atol=0)
    distance = torch.arange(101).double()
    torch.testing.assert_close(line[100, 100:] / line[100, 100], torch.exp(-2 * distance / 20), rtol=0, atol=0.01)
    plane = bg.matern_precision((41, 41), 12.0, 1.0, 3.0).to_dense().inverse()[20 * 41 + 20]
    torch.testing.assert_close(plane[20 * 41 + 20].item(), 3.0, rtol=0.05, atol=0)
    scaled = math.sqrt(8.0) * torch.arange(1, 13).double() / 12
    correlation = plane[20 * 41 + 21 : 20 * 41 + 33] / plane[20 * 41 + 20]
    torch.testing.assert_close(correlation, scaled * torch.special.modified_bessel_k1(scaled), rtol=0, atol=0.03)


def test_a_conditional_autoregression_has_the_conditionals_it_is_defined_by():
    grid = (3, 4)
    matrix = bg.car_precision(grid, 0.8, 2.0).to_dense()
    adjacent = torch.zeros(12, 12, dtype=torch.float64)
    for _, here, there in neighbours(bg.Stencil.cross(1).offsets, grid):
        a, b = here[0] * 4 + here[1], there[0] * 4 + there[1]
        adjacent[a, b] = adjacent[b, a] = 1
    degree = adjacent.sum(1)
    assert_close(1 / matrix.diagonal(), 2.0 / degree)
    weights = torch.eye(12) - matrix / matrix.diagonal()[:, None]
    assert_close(weights, 0.8 * adjacent / degree[:, None])


@pytest.mark.parametrize("grid", [(5,), (4, 5), (3, 4, 3), (1, 4), (2, 2)])
def test_planes_bend_no_plate(grid):
    ridge = 1e-3
    matrix = bg.thin_plate_precision(grid, 2.0, ridge).to_dense()
    axes = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    for plane in (torch.ones(grid).double(), *axes):
        assert_close(matrix @ plane.flatten(), ridge * plane.flatten())
    curved = torch.stack(axes).square().sum(0).flatten()
    # Second differences of 2 along each axis, wherever three sites are in line.
    lines = sum(torch.Size(grid).numel() // n * max(n - 2, 0) for n in grid)
    torch.testing.assert_close(curved @ matrix @ curved - ridge * curved.square().sum(), torch.tensor(8.0 * lines).double())


BAD_PRECISIONS = [
    pytest.param(*case, id=case[-1])
    for case in [
        (
            lambda: bg.StencilCholesky.from_precision(torch.eye(12)),
            TypeError,
            "precision is a Tensor, expected a StencilPrecision",
        ),
        (
            lambda: bg.StencilCholesky.from_precision(bg.thin_plate_precision((3, 4), 1.0, 1.0), STENCILS["line"]),
            ValueError,
            "stencil has 1 axes, the grid has 2",
        ),
        (
            lambda: bg.StencilCholesky.from_precision(
                bg.StencilPrecision.from_matrix(-torch.eye(12).expand(2, 12, 12), (3, 4))
            ),
            ValueError,
            r"precision is not positive definite of batch element \(0,\) at site \(0, 0\)",
        ),
        (
            lambda: bg.StencilCholesky.from_precision(
                bg.StencilPrecision.from_matrix(torch.arange(11, -1, -1.0).diag(), (3, 4))
            ),
            ValueError,
            r"precision is not positive definite at site \(2, 3\)",
        ),
        (lambda: bg.StencilPrecision.from_matrix(torch.eye(12), (3, 5)), ValueError, r"matrix has shape \(12, 12\), expected"),
        (
            lambda: bg.StencilPrecision.from_matrix(torch.ones(2, 3, 3).to_sparse(), (3,)),
            ValueError,
            r"matrix has shape \(2, 3, 3\), expected \(n, n\) for a sparse tensor",
        ),
        (lambda: bg.StencilPrecision.from_matrix([[1.0]], (1,)), TypeError, "matrix is a list, expected a torch.Tensor"),
        (lambda: bg.StencilPrecision.from_matrix(torch.eye(2).int(), (2,)), TypeError, "matrix is torch.int32"),
        (
            lambda: bg.StencilPrecision(torch.ones(3, 4), torch.ones(3, 3, 4), STENCILS["3x3"]),
            ValueError,
            "off_diag has 3 offsets, the stencil has 4",
        ),
        (lambda: bg.matern_precision((3, 4), 2.0, 0.5), ValueError, r"smoothness is 0.5, expected .* whole with 2/2 added"),
        (lambda: bg.matern_precision((3, 4), 0.0, 1.0), ValueError, "correlation_range is 0.0, expected finite and positive"),
        (lambda: bg.matern_precision((3, 4), 2.0, 1.0, [1, -1]), ValueError, r"variance is \[1.0, -1.0\], expected finite"),
        (lambda: bg.car_precision((3, 4), 1.1), ValueError, "dependence is 1.1.*, expected at most 1 in magnitude"),
        (lambda: bg.car_precision((3, 1), 0.5, 1.0, bg.Stencil([(0, 1)])), ValueError, r"site \(0, 0\) .* has no neighbours"),
        (
            lambda: bg.car_precision((3, 4), 0.5, 1.0, bg.Stencil([1])),
            ValueError,
            "neighbours has 1 axes, the grid has 2",
        ),
        (lambda: bg.car_precision((3, 4), 0.5, 1.0, 4), TypeError, "neighbours is a int, expected a Stencil"),
        (lambda: bg.thin_plate_precision((3, 4), 0.0, 1.0), ValueError, "bending is 0.0, expected finite and positive"),
        (lambda: bg.thin_plate_precision((3, 4), 1.0, -1.0), ValueError, "ridge is -1.0, expected finite and not negative"),
    ]
]


@pytest.mark.parametrize(("build", "error", "message"), BAD_PRECISIONS)
def test_bad_precisions(build, error, message):
    with pytest.raises(error, match=message):
        build()
