"""Coverage of means over blocks, and conformal scales, against dense float64 linear algebra and by their guarantees."""

import math

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.diagnostics import block_coverage, conformal_scale
from tests.banded_gmrf.test_conditioning import random_gmrf
from tests.cases import dense, smooth_cholesky

LEVELS = (0.0, 0.3, 0.5, 0.9, 1.0)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dense_block_coverage(q, covariance, x, sizes):
    """Block by block; of a model without batch, with covariance (n, n)."""
    grid, z = q.event_shape, []
    blocks = [[range(a, min(a + size, n)) for a in range(0, n, size)] for n, size in zip(grid, sizes, strict=True)]
    for ranges in torch.cartesian_prod(*(torch.arange(len(b)) for b in blocks)).reshape(-1, len(grid)).tolist():
        weights = torch.zeros(grid, dtype=torch.float64)
        weights[torch.meshgrid(*(torch.tensor(list(b[i])) for b, i in zip(blocks, ranges, strict=True)), indexing="ij")] = 1
        w = weights.flatten() / weights.sum()
        z.append(((x - q.mean).flatten(-len(grid)) @ w).abs() / (w @ covariance @ w).sqrt())
    inside = torch.special.erf(torch.stack(z) / math.sqrt(2))
    return torch.stack([(inside <= level).double().mean() for level in LEVELS])


@pytest.mark.parametrize(
    ("name", "grid", "block"),
    [("5x5", (6, 5), 2), ("3x3", (5, 4), (3, 1)), ("line", (7,), 3), ("volume", (3, 4, 3), (1, 9, 2)), ("3x3", (1, 1), 1)],
)
def test_block_coverage_equals_the_dense_one(name, grid, block):
    q, x = random_gmrf(name, grid), 2 * random(3, 2, *grid)
    L = dense(q.precision_cholesky)
    sizes = [block] * len(grid) if isinstance(block, int) else block
    expected = dense_block_coverage(q, torch.linalg.inv(L @ L.mT), x, sizes)
    assert torch.equal(block_coverage(q, x, block, LEVELS, "exact"), expected)
    several = random_gmrf(name, grid, batch=(2,))
    each = [block_coverage(several[i], x[:, i], block, LEVELS) for i in range(2)]
    torch.testing.assert_close(block_coverage(several, x, block, LEVELS), torch.stack(each).mean(0))


def test_block_coverage_of_posteriors_and_by_samples(monkeypatch):
    q = random_gmrf("3x3", (6, 4))
    known = torch.zeros(6, 4, dtype=torch.bool)
    known[:2] = True
    x = q.sample()
    p = q.condition(known, x)
    fields = p.sample((2000,))
    coverage = block_coverage(p, fields, 2, LEVELS)
    # One field's fraction has a standard deviation of at most ½. The blocks that are known are left out.
    assert ((coverage - torch.tensor(LEVELS)).abs() <= 5 * 0.5 / 2000**0.5).all()
    monkeypatch.setattr("banded_gmrf.diagnostics.coverage._CHUNK_ELEMENTS", 2400)
    by_samples = block_coverage(p, fields, 2, LEVELS, "monte_carlo", num_samples=4000)
    assert (by_samples - coverage).abs().max() < 0.03  # standard deviations are right to 1 / √8000, times 5
    torch.testing.assert_close(block_coverage(p, fields, 2, LEVELS), coverage)
    monkeypatch.setattr("banded_gmrf.diagnostics.coverage._MAX_EXACT_BLOCKS", 0)
    assert not torch.equal(block_coverage(p, fields, 2, LEVELS, num_samples=20), coverage)


def test_blocks_see_correlations_that_sites_do_not():
    q = bg.GMRF(torch.zeros(8, 8, dtype=torch.float64), smooth_cholesky((8, 8), nugget=1e-2))
    marginal = -0.5 * q.variance.log()
    white = bg.GMRF(q.loc, bg.StencilCholesky(marginal, marginal.new_empty(0, 8, 8), bg.Stencil.square(1)))
    x = q.sample((500,))
    assert block_coverage(white, x, 4, (0.9,)) < 0.7
    assert abs(block_coverage(q, x, 4, (0.9,)) - 0.9) < 0.05


def wrong(q, factor):
    """The model with standard deviations that are smaller by a factor."""
    return bg.GMRF(q.loc, bg.StencilCholesky(q.log_diag + math.log(factor), q.off_diag * factor, q.stencil))


@pytest.mark.parametrize("region", ["ellipsoid", "intervals"])
def test_the_scale_mends_a_model_that_is_too_sure(region):
    q = random_gmrf("3x3", (5, 4))
    x = q.sample((4000,))
    scale = conformal_scale(q, x, 0.8, region)
    assert scale.shape == ()
    assert scale.dtype == torch.float64
    assert abs(scale - 1) < 0.05
    torch.testing.assert_close(conformal_scale(wrong(q, 3.0), x, 0.8, region), 3 * scale)


@pytest.mark.parametrize(("count", "level"), [(9, 0.9), (19, 0.95), (4, 0.5), (30, 0.77), (1, 0.5)])
def test_the_rank_is_that_of_split_conformal_prediction(count, level):
    """Of a grid of one site both regions are the same interval, and the score that decides has rank ⌈(m + 1) level⌉."""
    q, x = random_gmrf("diagonal", (1, 1)), random(count, 1, 1)
    z = ((x - q.loc) / q.stddev).abs().flatten().sort().values
    rank = math.ceil(round((count + 1) * level, 9))
    quantile = torch.special.ndtri(torch.tensor(0.5 * (1 + level), dtype=torch.float64))
    for region in ("ellipsoid", "intervals"):
        torch.testing.assert_close(conformal_scale(q, x, level, region), z[rank - 1] / quantile, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("region", ["ellipsoid", "intervals"])
def test_the_guarantee_holds_on_average_for_a_wrong_model(region):
    q = random_gmrf("3x3", (4, 3))
    model, level, m, trials = wrong(q, 2.0), 0.7, 9, 400
    calibration, new = q.sample((trials, m)), q.sample((trials,))
    held = 0.0
    for fields, field in zip(calibration, new, strict=True):
        scale = conformal_scale(model, fields, level, region)
        # A scale of at most 1 on the new field alone, after widening, is that field being covered.
        wide = wrong(model, 1 / float(scale))
        if region == "intervals":
            held += bg.diagnostics.marginal_coverage(wide, field, (level,)).item()
        else:
            held += bg.diagnostics.chi_squared_coverage(wide.whiten(field), (level,)).item()
    # At least the level, at most 1 / (m + 1) more; five standard errors of a mean of numbers in [0, 1].
    assert level - 5 * 0.5 / trials**0.5 < held / trials < level + 0.1 + 5 * 0.5 / trials**0.5


def test_models_of_their_own_and_known_sites():
    q = random_gmrf("3x3", (4, 3), batch=(6,))
    x = q.sample((2,))
    alone = [conformal_scale(q, x[i], 0.5, "ellipsoid") for i in range(2)]
    both = conformal_scale(q, x, 0.5, "ellipsoid")
    assert min(alone) <= both <= max(alone)
    known = torch.rand(4, 3) < 0.5
    p = q.condition(known, x[0])
    y = p.sample()
    z = ((y - p.mean) / p.stddev).abs()[:, ~known]
    score = z.flatten().sort().values[math.ceil(7 * 0.5 / 6 * z.numel()) - 1]
    torch.testing.assert_close(conformal_scale(p, y, 0.5), score / 0.6744897501960817)
    squares = 2 * (p.log_prob(p.mean) - p.log_prob(y))
    dof = (~known).sum().double() / 2
    radii = [float(s / 2) ** 0.5 for s in squares.sort().values]
    half = torch.special.gammainc(dof, (radii[3] / conformal_scale(p, y, 0.5, "ellipsoid")) ** 2)
    torch.testing.assert_close(half, torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, x: conformal_scale(q, x, 0.9), ValueError, "x has 3 fields, expected at least 9 for a level of 0.9"),
        (lambda q, x: conformal_scale(q, x, 0.95), ValueError, "x has 3 fields, expected at least 19 for a level of 0.95"),
        (lambda q, x: conformal_scale(q, x, 1.0), ValueError, "level is 1.0, expected more than 0 and less than 1"),
        (lambda q, x: conformal_scale(q, x, 0.5, "box"), ValueError, "region is 'box', expected 'ellipsoid' or 'intervals'"),
        (lambda q, x: conformal_scale(q, x[..., :2], 0.5), ValueError, r"x has shape \(3, 4, 2\), expected \(..., 4, 3\)"),
        (lambda q, x: conformal_scale(q, x * torch.nan, 0.5), ValueError, "x has NaN or infinite entries"),
        (lambda q, x: block_coverage(q, x, 0), ValueError, "block is 0, expected at least one site along each of 2 axes"),
        (lambda q, x: block_coverage(q, x, (1, 2, 3)), ValueError, r"block is \(1, 2, 3\), expected at least one site along"),
        (lambda q, x: block_coverage(q, x, (1.5, 2)), TypeError, "block is 1.5, expected an integer"),
        (lambda q, x: block_coverage(q, x, 2, (2.0,)), ValueError, r"levels is \(2.0,\), expected probabilities"),
        (lambda q, x: block_coverage(q, x, 2, method="fast"), ValueError, "method is 'fast', expected 'auto', 'exact' or"),
        (lambda q, x: block_coverage(q, x, 2, num_samples=1), ValueError, "num_samples is 1, expected at least 2"),
        (lambda q, x: block_coverage(q, x.int(), 2), TypeError, "x is torch.int32"),
        (lambda q, x: block_coverage(q, [1.0], 2), TypeError, "x is a list"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(random_gmrf("3x3", (4, 3)), random(3, 4, 3))
