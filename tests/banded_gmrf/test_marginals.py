import math

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.analysis import marginals
from banded_gmrf.recursions import covariances
from banded_gmrf.recursions.strips import block_rows
from gmrf_kernels import standard_normal
from tests.cases import FACTORS, STENCILS, dense, random_cholesky, smooth_cholesky
from tests.dense import random_factor

# Inverting the dense precision loses a multiple of cond(Λ) ≈ 10² roundings of float64 (10⁻¹⁶).
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def dense_covariance(cholesky):
    L = dense(cholesky)
    return torch.linalg.inv(L @ L.mT)


def centred(cholesky):
    return bg.GMRF(torch.zeros(cholesky.grid, dtype=cholesky.dtype), cholesky)


@pytest.fixture(params=[1, 8], ids=["rows", "blocks of rows"])
def block_sites(request, monkeypatch):
    """Small grids are one block otherwise."""
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", request.param)


@pytest.mark.usefixtures("block_sites")
@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_exact_variance_equals_the_dense_one(name, grid):
    L = random_cholesky(STENCILS[name], grid, batch=(2, 1))
    variance, standard_error = centred(L).marginal_variance("exact")
    expected = dense_covariance(L).diagonal(dim1=-2, dim2=-1).reshape(2, 1, *grid)
    torch.testing.assert_close(variance, expected, **CLOSE)
    assert (standard_error == 0).all()


@pytest.mark.usefixtures("block_sites")
@pytest.mark.parametrize("name", ["5x5", "skewed", "volume", "line with a gap", "diagonal"])
@pytest.mark.parametrize("further", [0, 2])
def test_scan_visits_the_covariances_of_all_rows_within_reach(name, further):
    grid = {1: (9,), 2: (6, 3), 3: (4, 2, 3)}[STENCILS[name].ndim]
    L = random_cholesky(STENCILS[name], grid)
    row = math.prod(grid[1:])
    reach = max(o[0] for o in L.stencil.offsets or [(0,)]) + further
    covariance = dense_covariance(L)
    visited = []

    def compare(start, stop, actual):
        sites = slice(start * row, (stop + reach) * row)
        torch.testing.assert_close(actual, covariance[sites, sites], **CLOSE)
        visited.append((start, stop))
        return start

    blocks = block_rows(L.grid)
    assert covariances.scan_covariance(L, reach, compare) == [start for start, _ in blocks]
    assert visited == blocks[::-1]


@pytest.mark.usefixtures("block_sites")
@pytest.mark.parametrize("name", ["3x3", "skewed", "volume", "line with a gap"])
def test_gradients_of_the_exact_variance_equal_the_dense_ones(name):
    stencil = STENCILS[name]
    grid = {1: (9,), 2: (5, 3), 3: (3, 2, 2)}[stencil.ndim]
    tensors = random_factor(stencil.offsets, grid, batch=(2,))
    L = bg.StencilCholesky(*(t.requires_grad_() for t in tensors), stencil)
    actual = centred(L).variance
    expected = dense_covariance(L).diagonal(dim1=-2, dim2=-1).reshape(actual.shape)
    cotangent = torch.randn_like(actual)
    actual = torch.autograd.grad(actual, tensors, cotangent)
    expected = torch.autograd.grad(expected, tensors, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_second_derivatives_of_the_exact_variance(monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)
    stencil = STENCILS["3x3"]
    tensors = [t.requires_grad_() for t in random_factor(stencil.offsets, (3, 2), nan_outside=False)]
    assert torch.autograd.gradgradcheck(lambda *t: centred(bg.StencilCholesky(*t, stencil)).variance, tensors)


# Rounding may grow by cond(Λ) ≈ 10⁵ at most. It grew to 10⁵ from row to row while the recursion did not keep Σ symmetric.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-2)])
def test_rounding_does_not_grow_over_many_rows(monkeypatch, dtype, tolerance):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)
    variance = centred(smooth_cholesky((60, 6), dtype)).variance
    expected = torch.cholesky_inverse(dense(smooth_cholesky((60, 6)))).diagonal().reshape(60, 6)
    torch.testing.assert_close(variance.double(), expected, rtol=tolerance, atol=0)


def test_batches_in_chunks_and_expanded_factors_give_the_same(monkeypatch):
    L = random_cholesky(STENCILS["5x5"], (5, 4), batch=(5, 2))
    whole = centred(L).variance
    monkeypatch.setattr(marginals, "_CHUNK_ELEMENTS", 3 * 12**2)
    # BLAS may sum in another order for another number of matrices.
    torch.testing.assert_close(centred(L).variance, whole, rtol=1e-13, atol=0)
    expanded = bg.StencilCholesky(L.log_diag[0], L.off_diag[:, :1], L.stencil).expand((3, 5, 2))
    single = bg.StencilCholesky(expanded.log_diag.clone(), expanded.off_diag.clone(), L.stencil)
    torch.testing.assert_close(centred(expanded).variance, centred(single).variance, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["5x5", "volume", "line"])
def test_monte_carlo_is_within_its_standard_error(name):
    grid = (4, 3, 2)[: STENCILS[name].ndim]
    q = centred(random_cholesky(STENCILS[name], grid, batch=(3,)))
    exact = q.marginal_variance("exact").variance
    variance, standard_error = q.marginal_variance("monte_carlo", num_samples=2000)
    # 72 estimates are all within 4.5 standard errors but for one time in 2,000; the seed is fixed.
    assert ((variance - exact).abs() < 4.5 * standard_error).all()
    assert (standard_error < math.sqrt(2 / 2000) * variance).all()


def test_the_standard_error_is_that_of_the_estimates():
    # 400 independent estimates at 12 sites; their own standard deviation is known to 1 / √(2 · 400) at each.
    q = centred(random_cholesky(STENCILS["5x5"], (4, 3))).expand((400,))
    q = bg.GMRF(q.loc, q.precision_cholesky)
    variance, standard_error = q.marginal_variance("monte_carlo", num_samples=50)
    ratio = standard_error.mean(0) / variance.std(0)
    assert ((ratio - 1).abs() < 5 / 800**0.5).all()
    assert abs(float(ratio.mean()) - 1) < 0.1


def test_monte_carlo_of_independent_sites_is_exact():
    q = centred(random_cholesky(STENCILS["diagonal"], (3, 4), batch=(2,)))
    torch.testing.assert_close(q.marginal_variance("monte_carlo", num_samples=1), q.marginal_variance("exact"), **CLOSE)


def test_monte_carlo_in_chunks_and_its_gradient(monkeypatch):
    stencil, grid, num_samples = STENCILS["5x5"], (4, 3), 5
    monkeypatch.setattr(marginals, "_CHUNK_ELEMENTS", 2 * 12 * 2)
    tensors = [t.requires_grad_() for t in random_factor(stencil.offsets, grid, batch=(2,))]
    L = bg.StencilCholesky(*tensors, stencil)
    torch.manual_seed(1)
    actual = centred(L).marginal_variance("monte_carlo", num_samples).variance.flatten(-2)
    torch.manual_seed(1)
    u = torch.cat([standard_normal((size, 2, *grid), torch.float64) for size in (2, 2, 1)]).flatten(-2)
    D = dense(L)
    precision = D @ D.mT
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    x = torch.linalg.solve_triangular(D.mT, u.unsqueeze(-1), upper=True)
    expected = 1 / diagonal + (x[..., 0] - (precision @ x)[..., 0] / diagonal).square().mean(0)
    torch.testing.assert_close(actual, expected, **CLOSE)
    cotangent = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad(v, tensors, cotangent) for v in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("name", ["5x5", "volume", "line with a gap"])
def test_precision_diagonal(name):
    L = random_cholesky(STENCILS[name], (4, 3, 2)[: STENCILS[name].ndim], batch=(2,))
    expected = (dense(L) @ dense(L).mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(marginals.precision_diagonal(L).flatten(1), expected, **CLOSE)


def test_variance_is_exact_up_to_the_stated_size(monkeypatch):
    L = bg.StencilCholesky(torch.zeros(512, 512), torch.zeros(24, 512, 512), bg.Stencil.square(7))
    assert covariances.exact_is_affordable(L, 3)
    L = bg.StencilCholesky(torch.zeros(513, 512), torch.zeros(24, 513, 512), bg.Stencil.square(7))
    assert not covariances.exact_is_affordable(L, 3)
    q = centred(random_cholesky(STENCILS["3x3"], (4, 5)))
    monkeypatch.setattr(covariances, "_EXACT_OPERATIONS", 20 * (2 * 5) ** 2)
    assert (q.marginal_variance().standard_error == 0).all()
    monkeypatch.setattr(covariances, "_EXACT_OPERATIONS", 20 * (2 * 5) ** 2 - 1)
    assert (q.marginal_variance().standard_error > 0).all()


def test_bad_arguments():
    q = centred(random_cholesky(STENCILS["3x3"], (4, 5)))
    with pytest.raises(ValueError, match="method is 'takahashi', expected 'auto', 'exact' or 'monte_carlo'"):
        q.marginal_variance("takahashi")
    with pytest.raises(ValueError, match="num_samples is 0, expected at least 1"):
        q.marginal_variance("monte_carlo", num_samples=0)
