"""Coverage and conditional scores, against dense float64 linear algebra."""

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.diagnostics import conditional_score, leave_one_out, marginal_coverage, sample_growth, whitened_moments
from tests.banded_gmrf.test_conditioning import random_gmrf
from tests.cases import FACTORS, STENCILS, dense
from tests.dense import random_factor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_sites_and_regions_given_the_rest(name, grid):
    q, x = random_gmrf(name, grid, batch=(2,)), random(3, 2, *grid)
    region = torch.rand(2, *grid) < 0.5
    L = dense(q.precision_cholesky)
    precision, residual = L @ L.mT, (x - q.loc).flatten(2)
    expected = torch.einsum("sbi,bij->sbj", residual, precision) / precision.diagonal(dim1=-2, dim2=-1).sqrt()
    torch.testing.assert_close(leave_one_out(q, x).flatten(2), expected, **CLOSE)
    score = conditional_score(q, x, region)
    assert torch.equal(score.degrees_of_freedom, region.flatten(1).sum(1))
    for b in range(2):
        inside, Sigma = region[b].flatten(), torch.linalg.inv(precision[b])
        gain = torch.linalg.solve(Sigma[~inside][:, ~inside], Sigma[~inside][:, inside]).mT
        deviation = residual[:, b, inside] - residual[:, b, ~inside] @ gain.mT
        covariance = Sigma[inside][:, inside] - gain @ Sigma[~inside][:, inside]
        chi = (deviation @ torch.linalg.inv(covariance) * deviation).sum(-1)
        torch.testing.assert_close(score.statistic[:, b], chi, **CLOSE)


def test_sites_given_the_rest_of_other_models():
    grid, x = (4, 3), random(3, 2, 4, 3)
    local = random_gmrf("3x3", grid, batch=(2,))
    low_rank = bg.LowRankGMRF(local.loc, local.precision_cholesky, random(2, 2, *grid))
    sparse = bg.SparseGMRF(local.loc, bg.matern_precision(grid, 2.0, 1))
    for q in (low_rank, sparse):
        precision = low_rank.precision_matrix if q is low_rank else q.precision.to_dense()
        product = torch.einsum("sbi,bij->sbj", (x - q.loc).flatten(2), precision)
        expected = product / precision.diagonal(dim1=-2, dim2=-1).sqrt()
        torch.testing.assert_close(leave_one_out(q, x).flatten(2), expected, **CLOSE)
    # What large factors explain of a sample is far larger than what is left: no difference in float32 has that.
    single = low_rank.to(torch.float32)
    single = bg.LowRankGMRF(single.loc, single.precision_cholesky, 1e4 * single.factors)
    drawn = single.sample((3,))
    expected = leave_one_out(single.to(torch.float64), drawn.double())
    torch.testing.assert_close(leave_one_out(single, drawn).double(), expected, rtol=1e-5, atol=1e-5)
    region = torch.rand(2, *grid) < 0.5
    inside = sparse.precision.to_dense()[0][region[0].flatten()][:, region[0].flatten()]
    product = torch.einsum("i,ij->j", (x - sparse.loc)[0, 0].flatten(), sparse.precision.to_dense()[0])[region[0].flatten()]
    chi = product @ torch.linalg.solve(inside, product)
    torch.testing.assert_close(conditional_score(sparse, x, region).statistic[0, 0], chi, **CLOSE)


def test_scores_of_samples_follow_their_distributions():
    count = 4000
    q = random_gmrf("5x5", (6, 5))
    x = q.sample((count,))
    z = leave_one_out(q, x)
    assert (z.mean(0).abs() < 5 / count**0.5).all()
    assert ((z.var(0) - 1).abs() < 5 * (2 / count) ** 0.5).all()
    region = torch.zeros(6, 5, dtype=torch.bool)
    region[1:4, 2:] = True
    score = conditional_score(q, x, region)
    assert abs(score.statistic.mean() - 9) < 5 * (2 * 9 / count) ** 0.5
    levels = (0.0, 0.5, 0.9, 1.0)
    coverage = marginal_coverage(q, x, levels)
    # One field's fraction has a standard deviation of at most ½.
    assert ((coverage - torch.tensor(levels)).abs() <= 5 * 0.5 / count**0.5).all()
    too_sure = bg.GMRF(q.loc, bg.StencilCholesky(q.log_diag + 1, q.off_diag * torch.e, q.stencil))
    assert marginal_coverage(too_sure, x, (0.9,)) < 0.6


def test_coverage_of_a_posterior_leaves_known_sites_out():
    q = random_gmrf("3x3", (5, 4))
    x = q.sample()
    known = torch.rand(5, 4) < 0.5
    p = q.condition(known, x)
    z = ((x - p.mean) / p.stddev)[~known].abs()
    torch.testing.assert_close(marginal_coverage(p, x, (0.5,)), (z <= 0.6744897501960817).double().mean().reshape(1))
    with pytest.raises(ValueError, match="q has no site of positive variance"):
        marginal_coverage(q.condition(torch.ones(5, 4, dtype=torch.bool), x), x)


def test_gradients():
    stencil, grid = STENCILS["3x3"], (3, 2)
    region = torch.tensor([[True, False], [True, True], [False, True]])

    def function(score):
        return lambda loc, log_diag, off_diag, x: score(
            bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False), x
        )

    tensors = [random(*grid), *random_factor(stencil.offsets, grid, nan_outside=False), random(*grid)]
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function(leave_one_out), tensors)
    assert torch.autograd.gradcheck(function(lambda q, x: conditional_score(q, x, region).statistic), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q = random_gmrf("3x3", (5, 4), batch=(2,), dtype=dtype)
    x = torch.randn(2, 5, 4).to(dtype)
    assert leave_one_out(q, x).dtype == torch.float32
    assert conditional_score(q, x, torch.rand(5, 4) < 0.5).statistic.dtype == torch.float64
    assert marginal_coverage(q, x).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: marginal_coverage(q, random(4)), ValueError, r"x has shape \(4,\), expected \(..., 4, 3\)"),
        (lambda q: marginal_coverage(q, q.loc * torch.nan), ValueError, "x has NaN or infinite entries"),
        (lambda q: marginal_coverage(q, q.loc, (1.5,)), ValueError, r"levels is \(1.5,\), expected probabilities"),
        (lambda q: leave_one_out(q, random(3)), ValueError, r"x has shape \(3,\)"),
        (lambda q: conditional_score(q, random(3), torch.ones(4, 3).bool()), ValueError, r"x has shape \(3,\)"),
        (lambda q: conditional_score(q, q.loc, torch.ones(4, 3)), TypeError, "region is torch.float32, expected a bool tensor"),
        (lambda q: conditional_score(q, q.loc, [True]), TypeError, "region is list, expected a bool tensor"),
        (lambda q: conditional_score(q, q.loc, torch.ones(3).bool()), ValueError, r"region has shape \(3,\), expected"),
        (lambda q: leave_one_out(q.posterior(q.loc, 1.0), q.loc), TypeError, "q is a ConditionalGMRF, expected a GMRF or"),
        (
            lambda q: conditional_score(bg.LowRankGMRF(q.loc, q.precision_cholesky, q.loc[None]), q.loc, q.loc > 0),
            TypeError,
            "q is a LowRankGMRF, expected a GMRF or a SparseGMRF",
        ),
        (lambda q: whitened_moments(q.posterior(q.loc, 1.0), q.loc), TypeError, "q is a ConditionalGMRF, expected a GMRF or"),
        (lambda q: sample_growth(q.posterior(q.loc, 1.0)), TypeError, "q is a ConditionalGMRF, expected a GMRF"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(random_gmrf("3x3", (4, 3)))
