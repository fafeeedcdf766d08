import math

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf import diagnostics
from gmrf_kernels import standard_normal
from tests.cases import STENCILS, dense, random_cholesky, smooth_cholesky

# The same sums in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def random_gmrf(name="5x5", grid=(6, 5), batch=(), dtype=torch.float64):
    return bg.GMRF(torch.randn(grid, dtype=torch.float64).to(dtype), random_cholesky(STENCILS[name], grid, batch, dtype))


def test_whitened_moments_are_those_of_white_noise_for_the_right_model_only():
    q = random_gmrf(batch=(3,))
    x = q.sample((4000,))
    mean, mean_square = diagnostics.whitened_moments(q, x)
    assert mean.shape == mean_square.shape == (6, 5)
    # Five standard errors over 12,000 fields; a square of a standard normal number has the variance 2.
    assert (mean.abs() < 5 / 12_000**0.5).all()
    assert ((mean_square - 1).abs() < 5 * (2 / 12_000) ** 0.5).all()
    x[..., 2, 3] += 3 / q.log_diag[:, 2, 3].exp()  # moves that site's whitened residual by 3
    torch.testing.assert_close(diagnostics.whitened_moments(q, x).mean[2, 3], mean[2, 3] + 3, **CLOSE)
    one = random_gmrf()
    y = one.whiten(one.loc + 1)
    torch.testing.assert_close(diagnostics.whitened_moments(one, one.loc + 1), (y, y.square()), **CLOSE)


@pytest.mark.parametrize("grid", [(7,), (6, 5), (3, 4, 5)])
def test_autocorrelation_equals_a_sum_over_pairs(grid):
    fields = torch.randn(4, *grid, dtype=torch.float64)
    actual = diagnostics.autocorrelation(fields, 2, len(grid))
    centred = fields - fields.mean()
    padded = torch.nn.functional.pad(centred, [2, 2] * len(grid), value=torch.nan)
    assert actual.shape == (5,) * len(grid)
    for index in torch.cartesian_prod(*[torch.arange(5)] * len(grid)).reshape(-1, len(grid)).tolist():
        moved = padded[:, *(slice(i, i + size) for i, size in zip(index, grid, strict=True))]
        expected = (centred * moved).nanmean() / centred.square().mean()
        torch.testing.assert_close(actual[tuple(index)], expected, **CLOSE)


def test_autocorrelation_of_a_known_process():
    white = torch.randn(40, 65, 65, dtype=torch.float64)
    # Each entry has a standard error of 1 / √(40 · 65²) ≈ 0.0024; a sum of two neighbours correlates by ½ with the next.
    assert (diagnostics.autocorrelation(white, 3).flatten().sort().values[:-1].abs() < 0.012).all()
    moving = diagnostics.autocorrelation(white[:, 1:] + white[:, :-1], 1)
    expected = torch.tensor([[0, 0.5, 0], [0, 1, 0], [0, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(moving, expected, rtol=0, atol=0.012)


def test_quantiles():
    normal, data = diagnostics.quantiles(torch.randn(4, 50, 500))
    # The standard error of the extreme quantiles, at 0.005 and 0.995, is 0.015 for 100,000 values.
    torch.testing.assert_close(data, normal, rtol=0, atol=0.06)
    values = torch.randperm(10).float().reshape(2, 5)
    assert diagnostics.quantiles(values, 10).data.tolist() == list(range(10))
    assert diagnostics.quantiles(values, 2).data.tolist() == [2, 7]
    assert diagnostics.quantiles(values, 3).normal[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chi_squared_coverage(dtype):
    q = random_gmrf(batch=(2,), dtype=dtype)
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    covered = diagnostics.chi_squared_coverage(q.whiten(q.sample((5000,))), levels, len(q.event_shape))
    expected = torch.tensor(levels, dtype=torch.float64)
    assert ((covered - expected).abs() <= 5 * (expected * (1 - expected) / 10_000).sqrt()).all()
    narrow = bg.GMRF(q.loc, bg.StencilCholesky(q.log_diag - 0.1, q.off_diag * math.exp(-0.1), q.stencil))
    confident = diagnostics.chi_squared_coverage(q.whiten(narrow.sample((5000,))), levels, len(q.event_shape))
    assert (confident[1:4] < covered[1:4] - 0.05).all()


def dense_energy_score(draws, x):
    """Of draws (batch, S, n) and x (..., batch, n)."""
    count = draws.shape[1]
    distances = torch.cdist(draws, draws, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (count * (count - 1))
    return (draws - x.unsqueeze(-2)).norm(dim=-1).mean(-1) - distances / 2


def dense_variogram_score(draws, x, grid, max_lag, order):
    """Pair by pair; of draws (batch, S, n) and x (..., batch, n)."""
    sites = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid))
    i, j = torch.ones(len(sites), len(sites)).tril(-1).nonzero().unbind(1)
    near = ((sites[i] - sites[j]).abs() <= max_lag).all(-1)
    i, j = i[near], j[near]
    weight = 1 / (sites[i] - sites[j]).double().norm(dim=-1)
    seen, drawn = ((fields[..., i] - fields[..., j]).abs().pow(order) for fields in (x, draws))
    return (weight * (seen - drawn.mean(1)).square()).sum(-1)


@pytest.mark.parametrize(("name", "grid"), [("5x5", (6, 5)), ("line", (7,)), ("volume", (3, 4, 3))])
def test_scores_and_their_gradients_equal_the_dense_definitions(name, grid):
    q = random_gmrf(name, grid, batch=(2,))
    tensors = [t.clone().requires_grad_() for t in (q.loc, q.log_diag, q.off_diag, torch.randn(3, 1, *grid).double())]
    loc, log_diag, off_diag, x = tensors
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, STENCILS[name]))
    torch.manual_seed(1)
    energy = diagnostics.energy_score(q, x, num_samples=5)
    torch.manual_seed(1)
    variogram = diagnostics.variogram_score(q, x, max_lag=2, order=0.7, num_samples=5)
    torch.manual_seed(1)
    u = standard_normal((5, 2, *grid), torch.float64).flatten(2).movedim(0, -1)  # (batch, n, 5)
    L = dense(q.precision_cholesky)
    draws = loc.flatten(1).unsqueeze(1) + torch.linalg.solve_triangular(L.mT, u, upper=True).mT
    flat = x.flatten(2)
    for actual, expected in (
        (energy, dense_energy_score(draws, flat)),
        (variogram, dense_variogram_score(draws, flat, grid, max_lag=2, order=0.7)),
    ):
        torch.testing.assert_close(actual, expected, **CLOSE)
        cotangent = torch.randn_like(actual)
        gradients = [torch.autograd.grad(value, tensors, cotangent, retain_graph=True) for value in (actual, expected)]
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)  # |x_i - x_j|^-0.3 enlarges rounding


def test_scores_prefer_the_right_model_and_have_gradients():
    q = bg.GMRF(torch.zeros(8, 8, dtype=torch.float64), smooth_cholesky((8, 8), nugget=1e-2))
    marginal = -0.5 * q.variance.log()  # of a model with the right variances and no correlation
    white = bg.GMRF(q.loc, bg.StencilCholesky(marginal, marginal.new_empty(0, 8, 8), bg.Stencil.square(1)))
    x = q.sample((200,))
    for score in (diagnostics.energy_score, diagnostics.variogram_score):
        assert score(q, x).mean() < score(white, x).mean()
    log_diag = q.log_diag.clone().requires_grad_()
    scaled = bg.GMRF(q.loc, bg.StencilCholesky(log_diag, q.off_diag, q.stencil))
    for score in (diagnostics.energy_score, diagnostics.variogram_score):
        (gradient,) = torch.autograd.grad(score(scaled, x).mean(), log_diag)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    log_diag = torch.zeros(64, 64, dtype=dtype)
    q = bg.GMRF(log_diag, bg.StencilCholesky(log_diag, torch.zeros(0, 64, 64, dtype=dtype), bg.Stencil.square(1)))
    x = 8 * q.sample((3,))
    single = bg.GMRF(q.loc.float(), q.precision_cholesky.to(torch.float32))
    for score, tolerance in ((diagnostics.energy_score, 0.02), (diagnostics.variogram_score, 0.2)):
        value = score(q, x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, score(single, x.float()), rtol=tolerance, atol=0)  # of other samples
    fields = 300 * torch.randn(2, 64, 64).to(dtype)
    assert torch.equal(diagnostics.autocorrelation(fields, 2), diagnostics.autocorrelation(fields.float(), 2))
    assert torch.equal(diagnostics.quantiles(fields).data, diagnostics.quantiles(fields.float()).data)
    assert diagnostics.whitened_moments(q, x).mean_square.dtype == torch.float32


def chain(ratio, size, dtype=torch.float64):
    """x_j = ratio · x_{j+1} + noise along the first axis."""
    log_diag = torch.zeros(size, 3, dtype=dtype)
    off_diag = torch.full((1, size, 3), -ratio, dtype=dtype)
    return bg.GMRF(log_diag, bg.StencilCholesky(log_diag, off_diag, bg.Stencil([(1, 0)])))


def test_samples_that_grow():
    assert (diagnostics.sample_growth(chain(0.5, 40)) < 3).all()
    assert 1e7 < diagnostics.sample_growth(chain(2.0, 30)) < 2.0**30
    assert diagnostics.sample_growth(chain(2.0, 30, torch.float32)) > 1e7
    assert diagnostics.sample_growth(chain(1e8, 30)) > 1e200
    assert diagnostics.sample_growth(chain(1e12, 30)) == torch.inf
    flat, steep = chain(0.5, 30).precision_cholesky, chain(1.5, 30).precision_cholesky
    both = bg.StencilCholesky(flat.log_diag, torch.stack([flat.off_diag, steep.off_diag]), flat.stencil)
    growth = diagnostics.sample_growth(bg.GMRF(flat.log_diag, both))
    assert growth.shape == (2,)
    assert growth[0] < 3
    assert growth[1] > 1e3
    across = bg.StencilCholesky(flat.log_diag.mT, steep.off_diag.mT, bg.Stencil([(0, 1)]))
    assert diagnostics.sample_growth(bg.GMRF(flat.log_diag.mT, across)) > 1e3
    assert diagnostics.sample_growth(random_gmrf("volume", (3, 4, 3))) < 20


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, x: diagnostics.autocorrelation(x, 5), ValueError, r"max_lag is 5, .* the shortest axis of \(6, 5\)"),
        (
            lambda q, x: diagnostics.autocorrelation(x, 1, 3),
            ValueError,
            r"fields has shape \(6, 5\), expected a grid of 3 axes",
        ),
        (lambda q, x: diagnostics.autocorrelation([1.0], 1), TypeError, "fields is a list, expected a torch.Tensor"),
        (lambda q, x: diagnostics.quantiles(x, 31), ValueError, "num is 31, expected between 1 and the number of values, 30"),
        (lambda q, x: diagnostics.quantiles(x * torch.nan), ValueError, "values has NaN or infinite entries"),
        (lambda q, x: diagnostics.quantiles(x.long()), TypeError, "values is torch.int64, expected float16"),
        (lambda q, x: diagnostics.chi_squared_coverage(x, (0.5, 1.1)), ValueError, r"levels is \(0.5, 1.1\)"),
        (
            lambda q, x: diagnostics.chi_squared_coverage(x.masked_fill(x == x.max(), torch.nan)),
            ValueError,
            "fields has NaN or infinite entries, expected finite ones",
        ),
        (lambda q, x: diagnostics.autocorrelation(x * torch.nan, 1), ValueError, "fields has NaN or infinite entries"),
        (lambda q, x: diagnostics.autocorrelation(torch.ones(3, 6, 5), 1), ValueError, "fields has no two values that differ"),
        (lambda q, x: diagnostics.autocorrelation(torch.ones(0, 6, 5), 1), ValueError, "fields has no two values that differ"),
        (lambda q, x: diagnostics.whitened_moments(q, x.expand(0, 6, 5)), ValueError, r"x has shape \(0, 6, 5\), expected at"),
        (
            lambda q, x: diagnostics.whitened_moments(q, x / 0),
            ValueError,
            "x has NaN or infinite entries, expected finite ones",
        ),
        (lambda q, x: diagnostics.leave_one_out(q, x / 0), ValueError, "x has NaN or infinite entries, expected finite ones"),
        (lambda q, x: diagnostics.conditional_score(q, x / 0, x > 0), ValueError, "x has NaN or infinite entries"),
        (lambda q, x: diagnostics.energy_score(q, x * torch.nan), ValueError, "x has NaN or infinite entries"),
        (lambda q, x: diagnostics.variogram_score(q, x / 0), ValueError, "x has NaN or infinite entries"),
        (
            lambda q, x: diagnostics.marginal_coverage(q, x, 0.9),
            TypeError,
            "levels is 0.9, expected a sequence of probabilities",
        ),
        (
            lambda q, x: diagnostics.block_coverage(q, x, 2, 0.9),
            TypeError,
            "levels is 0.9, expected a sequence of probabilities",
        ),
        (
            lambda q, x: diagnostics.chi_squared_coverage(x, 0.9),
            TypeError,
            "levels is 0.9, expected a sequence of probabilities",
        ),
        (lambda q, x: diagnostics.chi_squared_coverage(x, ["90%"]), TypeError, r"levels\[0\] is '90%', expected a number"),
        (lambda q, x: diagnostics.marginal_coverage(q, x, []), ValueError, r"levels is \(\), expected probabilities"),
        (lambda q, x: diagnostics.conformal_scale(q, x, [0.9]), TypeError, r"level is \[0.9\], expected a number"),
        (lambda q, x: diagnostics.sample_growth(q, 0), ValueError, "num_samples is 0, expected at least 1"),
        (lambda q, x: diagnostics.energy_score(q, x, 1), ValueError, "num_samples is 1, expected at least 2"),
        (lambda q, x: diagnostics.variogram_score(q, x, 5), ValueError, "max_lag is 5"),
        (lambda q, x: diagnostics.variogram_score(q, x, order=0), ValueError, "order is 0, expected a positive number"),
    ],
)
def test_bad_arguments(call, error, message):
    q = random_gmrf()
    with pytest.raises(error, match=message):
        call(q, q.sample())
