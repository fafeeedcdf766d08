import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.analysis import spectra
from tests.cases import FACTORS, STENCILS, dense, random_cholesky, smooth_cholesky
from tests.dense import random_factor

# Inverting the dense precision loses a multiple of cond(Λ) ≈ 10² roundings of float64 (10⁻¹⁶).
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random_gmrf(name, grid, batch=(), dtype=torch.float64):
    return bg.GMRF(torch.zeros(grid, dtype=dtype), random_cholesky(STENCILS[name], grid, batch, dtype))


def dense_eigenvalues(q, k):
    """The k largest eigenvalues of Σ in descending order, (*batch, k)."""
    L = dense(q.precision_cholesky)
    return 1 / torch.linalg.eigvalsh(L @ L.mT)[..., :k]


@pytest.mark.parametrize(("name", "grid"), [case for case in FACTORS if torch.Size(case[1]).numel() > 1])
def test_eigenpairs_equal_the_dense_ones(name, grid):
    q = random_gmrf(name, grid, batch=(2, 1))
    n = q.event_shape.numel()
    for k in {1, min(3, n - 1), n - 1}:
        values, vectors, residuals = q.leading_eigenpairs(k)
        assert (values.shape, vectors.shape, residuals.shape) == ((2, 1, k), (2, 1, k, *grid), (2, 1, k))
        torch.testing.assert_close(values, dense_eigenvalues(q, k), **CLOSE)
        v = vectors.flatten(3)
        torch.testing.assert_close(v @ v.mT, torch.eye(k, dtype=v.dtype).expand(2, 1, k, k), **CLOSE)
        torch.testing.assert_close(v @ q.covariance_matrix, values.unsqueeze(-1) * v, **CLOSE)
        assert (residuals < 1e-10).all()
        assert torch.equal(q.leading_eigenpairs(k).eigenvectors, vectors)


def test_gradients_of_eigenvalues_equal_the_dense_ones():
    stencil, grid = STENCILS["5x5"], (4, 3)
    tensors = random_factor(stencil.offsets, grid, batch=(2,))
    L = bg.StencilCholesky(*(t.requires_grad_() for t in tensors), stencil)
    q = bg.GMRF(torch.zeros(grid, dtype=torch.float64), L)
    pairs = q.leading_eigenpairs(4)
    assert not pairs.eigenvectors.requires_grad
    cotangent = torch.randn_like(pairs.eigenvalues)
    actual = torch.autograd.grad(pairs.eigenvalues, tensors, cotangent)
    expected = torch.autograd.grad(dense_eigenvalues(q, 4), tensors, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q = random_gmrf("3x3", (4, 3), (2,), dtype)
    pairs = q.leading_eigenpairs(5)
    assert {t.dtype for t in pairs} == {dtype}
    eps = torch.finfo(dtype).eps  # computed in float64, then rounded
    torch.testing.assert_close(pairs.eigenvalues.double(), dense_eigenvalues(q, 5), rtol=eps, atol=0)


def test_batches_that_are_empty_or_expanded():
    assert random_gmrf("3x3", (4, 3), (0,)).leading_eigenpairs(2).eigenvectors.shape == (0, 2, 4, 3)
    q = random_gmrf("3x3", (4, 3))
    expanded = q.expand((5,)).leading_eigenpairs(2)
    assert torch.equal(expanded.eigenvalues, q.leading_eigenpairs(2).eigenvalues.expand(5, 2))
    assert expanded.eigenvectors.shape == (5, 2, 4, 3)


def test_a_large_residual_warns(monkeypatch):
    monkeypatch.setattr(spectra, "_TOLERANCE", 0.0)
    with pytest.warns(RuntimeWarning, match=r"an eigenpair has a relative residual of .*, above 0.0"):
        random_gmrf("3x3", (4, 3)).leading_eigenpairs(2)


@pytest.mark.parametrize("k", [0, 12])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k is {k}, expected at least 1 and less than the grid's 12 sites"):
        random_gmrf("3x3", (4, 3)).leading_eigenpairs(k)


def test_numbers_that_are_no_integers():
    q = random_gmrf("3x3", (4, 3))
    for call in (q.leading_eigenpairs, lambda k: q.project_on_leading(q.loc, k)):
        with pytest.raises(TypeError, match=r"k is 2.5, expected an integer"):
            call(2.5)
    with pytest.raises(TypeError, match=r"degree is 9.5, expected an integer"):
        q.project_on_leading(q.loc, 2, degree=9.5)


def test_projections_on_large_grids_are_refused(monkeypatch):
    q = random_gmrf("3x3", (4, 3))
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 12 * (2 * 3) ** 2)
    assert q.project_on_leading(q.loc, 2).isfinite().all()
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 12 * (2 * 3) ** 2 - 1)
    with pytest.raises(ValueError, match=r"project_on_leading needs n \(r \+ 1\)² W² ≤ 2⁴⁰, which the grid \(4, 3\) exceeds"):
        q.project_on_leading(q.loc, 2)


@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_counts_of_eigenvalues_equal_the_dense_ones(name, grid, block_sites, monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    q = random_gmrf(name, grid, batch=(2, 1))
    eigenvalues = torch.linalg.eigvalsh(q.precision_matrix)
    n = eigenvalues.shape[-1]
    for k in {0, n // 3, n - 1}:
        threshold = 0.5 * (eigenvalues[..., k] + eigenvalues[..., k - 1] if k else eigenvalues[..., 0])
        assert torch.equal(spectra.count_eigenvalues_below(q.precision_cholesky, threshold), torch.full((2, 1), k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "grid"), [case for case in FACTORS if torch.Size(case[1]).numel() > 1])
def test_projections_weigh_eigenvectors_by_one_and_zero(name, grid, dtype):
    q = random_gmrf(name, grid, batch=(2,), dtype=dtype)
    n, degree = q.event_shape.numel(), 100
    L = dense(q.precision_cholesky)
    eigenvalues, vectors = torch.linalg.eigh(L @ L.mT)
    units = torch.eye(n, dtype=dtype).reshape(n, 1, *grid).expand(n, 2, *grid)
    for k in {1, n // 2, n - 1}:
        projected = q.project_on_leading(units, k, degree)
        assert projected.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        weights = vectors.mT @ projected.double().flatten(2).movedim(0, -1) @ vectors
        weight = weights.diagonal(dim1=-2, dim2=-1)
        # The series ends where its terms have fallen to 10⁻³; in float32 rounding is less than that.
        torch.testing.assert_close(weights - torch.diag_embed(weight), torch.zeros_like(weights), rtol=0, atol=2e-3)
        assert ((weight > -2e-3) & (weight < 1 + 2e-3)).all()
        angle = (1 - 2 * eigenvalues / spectra._largest_eigenvalue_bound(q.precision_cholesky)[:, None]).arccos()
        assert ((weight - 1).abs()[angle < angle[:, k - 1 : k] - 12 / degree] < 2e-3).all()
        assert (weight.abs()[angle > angle[:, k : k + 1] + 12 / degree] < 2e-3).all()


def test_projections_have_gradients_in_what_is_projected():
    q = random_gmrf("5x5", (4, 3))
    x, cotangent = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(q.project_on_leading(x, 4, degree=50), x, cotangent)
    # A symmetric operator; sums of 50 products in another order.
    torch.testing.assert_close(gradient, q.project_on_leading(cotangent, 4, degree=50), **CLOSE)


def test_projections_of_batches_that_are_empty_or_expanded():
    assert random_gmrf("3x3", (4, 3), (0,)).project_on_leading(torch.zeros(4, 3).double(), 2, degree=3).shape == (0, 4, 3)
    q, x = random_gmrf("3x3", (4, 3)), torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(q.expand((5,)).project_on_leading(x, 2), q.project_on_leading(x, 2), **CLOSE)


@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eigenvalues_that_are_all_one_have_a_cut(dtype, block_sites, monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    zeros = torch.zeros(4, 3, dtype=dtype)
    factor = bg.StencilCholesky(zeros, zeros.expand(len(STENCILS["3x3"]), 4, 3), STENCILS["3x3"])
    projected = bg.GMRF(zeros, factor).project_on_leading(torch.ones(4, 3, dtype=dtype), 5)
    assert projected.isfinite().all()


def test_projections_of_smooth_fields_in_float32():
    size, k = 12, 30
    q = bg.GMRF(torch.zeros(size, size, dtype=torch.float64), smooth_cholesky((size, size), nugget=1e-2))
    single = bg.GMRF(q.loc.float(), bg.StencilCholesky(q.log_diag.float(), q.off_diag.float(), q.stencil))
    x = q.sample((3,))
    # Rounding of 6·10⁻⁸ grows at most like the number of steps, 2,000.
    expected = q.project_on_leading(x, k)
    torch.testing.assert_close(single.project_on_leading(x.float(), k).double(), expected, rtol=0, atol=2e-4 * x.abs().max())


def test_a_degree_too_low_warns():
    q = bg.GMRF(torch.zeros(12, 12, dtype=torch.float64), smooth_cholesky((12, 12), nugget=1e-2))
    with pytest.warns(RuntimeWarning, match="a degree of 9 is too low .*: expected at least "):
        q.project_on_leading(q.sample(), 1, degree=9)


@pytest.mark.parametrize(
    ("x", "k", "degree", "message"),
    [
        (torch.zeros(3, 4), 2, 9, r"x has shape \(3, 4\), expected \(..., 4, 3\)"),
        (torch.zeros(4, 3), 12, 9, "k is 12, expected at least 1 and less than the grid's 12 sites"),
        (torch.zeros(4, 3), 2, 0, "degree is 0, expected at least 1"),
    ],
)
def test_bad_projections(x, k, degree, message):
    with pytest.raises(ValueError, match=message):
        random_gmrf("3x3", (4, 3), dtype=torch.float32).project_on_leading(x, k, degree)
