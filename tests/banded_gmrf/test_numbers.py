"""Fields whose precision is nearly singular are right, whatever the dtype, or refused; singular ones are refused."""

import math

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS, dense, smooth_cholesky

SIZE = 32


def matern_variance(correlation_range, smoothness, site):
    """In closed form: cosines are the eigenvectors of a Laplacian with zero flux at its edges."""
    k, sites = torch.arange(SIZE, dtype=torch.float64), torch.tensor(site)
    cosines = torch.cos(math.pi * k * (sites[:, None] + 0.5) / SIZE) * (2 / SIZE) ** 0.5
    cosines[:, 0] = SIZE**-0.5
    frequency = 2 - 2 * torch.cos(math.pi * k / SIZE)
    kappa2, alpha = 8 * smoothness / correlation_range**2, smoothness + 1
    tau2 = math.gamma(smoothness) / (math.gamma(alpha) * 4 * math.pi * kappa2**smoothness)
    spectrum = tau2 * (kappa2 + frequency[:, None] + frequency) ** alpha
    return float((cosines[0, :, None].square() * cosines[1].square() / spectrum).sum())


def matern(correlation_range, smoothness, dtype=torch.float64):
    return bg.matern_precision((SIZE, SIZE), correlation_range, smoothness, dtype=dtype)


def centred(cholesky):
    return bg.GMRF(torch.zeros(cholesky.grid, dtype=cholesky.dtype), cholesky)


# Rounding of Λ changes variances by ε = 2e-16 times its condition number, 8e6 to 2e12 here, or less.
@pytest.mark.parametrize(
    ("correlation_range", "smoothness", "variance", "tolerance"),
    [(160.0, 1, 39.29, 1e-6), (20.0, 2, 1.105, 1e-8), (80.0, 2, 9.829, 1e-5), (160.0, 2, 39.27, 1e-3)],
)
def test_smooth_matern_fields_in_both_dtypes(correlation_range, smoothness, variance, tolerance):
    exact = matern_variance(correlation_range, smoothness, (16, 16))
    assert exact == pytest.approx(variance, rel=1e-3)
    L = bg.StencilCholesky.from_precision(matern(correlation_range, smoothness))
    assert float(centred(L).variance[16, 16]) == pytest.approx(exact, rel=tolerance)
    # Rounding of L changes variances by ε = 1e-7 times the square root of that condition number.
    single = centred(L.to(torch.float32)).variance[16, 16]
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(exact, rel=2e-3)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular.*\.to\(torch.float32\)"):
        bg.StencilCholesky.from_precision(matern(correlation_range, smoothness, torch.float32))


@pytest.mark.parametrize("correlation_range", [3.0, 10.0, 20.0])
def test_matern_fields_that_float32_can_tell(correlation_range):
    L = bg.StencilCholesky.from_precision(matern(correlation_range, 1, torch.float32))
    exact = matern_variance(correlation_range, 1, (16, 16))
    assert float(centred(L).variance[16, 16]) == pytest.approx(exact, rel=2e-3)


def test_a_field_too_smooth_for_float64_is_refused():
    # What float64 has of its precision is a field of variance 58.3, not 39.3.
    assert matern_variance(160.0, 3, (16, 16)) == pytest.approx(39.27, rel=1e-4)
    with pytest.raises(torch.linalg.LinAlgError, match="singular up to rounding: its condition number is about"):
        bg.StencilCholesky.from_precision(matern(160.0, 3))


def laplacian(grid, periodic):
    n = math.prod(grid)
    sites = torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(n, len(grid))
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for axis, size in enumerate(grid):
        next_sites = sites.clone()
        next_sites[:, axis] += 1
        inside = next_sites[:, axis] < size
        next_sites[:, axis] %= size
        number = torch.tensor([math.prod(grid[a + 1 :]) for a in range(len(grid))])
        for i, j, kept in zip((sites @ number).tolist(), (next_sites @ number).tolist(), inside.tolist(), strict=True):
            if kept or periodic:
                matrix[[i, j], [i, j]] += 1
                matrix[i, j] -= 1
                matrix[j, i] -= 1
    return matrix


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("grid", [(6,), (50,), (4, 4), (5, 7), (8, 8), (16, 16), (3, 4, 5)])
def test_laplacians_are_refused(grid, periodic):
    matrix = laplacian(grid, periodic)
    for power in (matrix, matrix @ matrix):
        for scale in (1.0, 0.37, 1e5 / 3, 1e-12):
            precision = bg.StencilPrecision.from_matrix(scale * power, grid)
            for dtype in (torch.float64, torch.float32):
                with pytest.raises(torch.linalg.LinAlgError, match=r"singular.*A ridge .* makes such a field proper"):
                    bg.StencilCholesky.from_precision(precision.to(dtype))
    bg.StencilCholesky.from_precision(bg.StencilPrecision.from_matrix(matrix + 1e-6 * torch.eye(len(matrix)), grid))


def test_a_ring_of_six_is_refused_as_both_errors():
    ring = laplacian((6,), True)
    assert torch.equal(ring.diagonal(), torch.full((6,), 2.0, dtype=torch.float64))
    for error in (ValueError, torch.linalg.LinAlgError):
        with pytest.raises(error, match=r"at site \(5,\)"):
            bg.StencilCholesky.from_precision(bg.StencilPrecision.from_matrix(ring, (6,)))


def test_the_bad_element_of_a_batch_is_named():
    proper, singular = torch.eye(6, dtype=torch.float64), laplacian((6,), True)
    precision = bg.StencilPrecision.from_matrix(torch.stack([proper, singular, proper]), (6,))
    with pytest.raises(torch.linalg.LinAlgError, match=r"of batch element \(1,\)"):
        bg.StencilCholesky.from_precision(precision)


@pytest.mark.parametrize(
    "precision",
    [
        bg.thin_plate_precision((32, 32), 1.0, 1e-10),
        bg.car_precision((32, 32), 1 - 1e-10),
        bg.StencilPrecision(
            torch.tensor([1e16, 1.0, 1e-9, 1e200], dtype=torch.float64), torch.zeros(0, 4).double(), bg.Stencil([], 1)
        ),
        bg.StencilPrecision(torch.tensor([1e16, 1.0, 1e-9]).double(), torch.tensor([[1e7, 1e-5, 0]]).double(), bg.Stencil([1])),
    ],
    ids=["thin plate", "car", "scales", "scales that are coupled"],
)
def test_what_is_proper_is_taken(precision):
    assert bg.StencilCholesky.from_precision(precision).log_diag.isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, -torch.inf])
def test_entries_that_are_not_finite_are_refused(bad):
    precision = bg.thin_plate_precision((3, 4), 1.0, 1.0)
    diag, off_diag = precision.diag.expand(2, 3, 4).clone(), precision.off_diag.clone()
    diag[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"infinite or NaN entry of batch element \(1,\) in the column of site \(2, 3\)"):
        bg.StencilCholesky.from_precision(bg.StencilPrecision(diag, off_diag, precision.stencil))
    off_diag[0, 0, 1] = bad
    with pytest.raises(ValueError, match=r"infinite or NaN entry in the column of site \(0, 1\)"):
        bg.StencilCholesky.from_precision(bg.StencilPrecision(precision.diag, off_diag, precision.stencil))


def test_covariances_of_sites_that_are_copies_are_refused():
    a = torch.randn(12, 40, dtype=torch.float64)
    a[5] = a[4]
    for dtype, scale in ((torch.float64, 1.0), (torch.float32, 1e3)):
        with pytest.raises(
            torch.linalg.LinAlgError, match=r"not positive definite at site \(0, 0\) and its 3 neighbours: .*singular"
        ):
            bg.StencilCholesky.from_covariance((scale * a @ a.T).to(dtype), STENCILS["3x3"], (3, 4))
    samples = torch.randn(50, 3, 4)
    samples[:, 1, 1] = 2 * samples[:, 1, 0]
    with pytest.raises(torch.linalg.LinAlgError, match=r"the covariance of samples, with ridge 0.0, is not positive definite"):
        bg.StencilCholesky.from_samples(samples, STENCILS["3x3"])


def test_tools_on_smooth_factors_in_float32_round_only_their_result():
    """The factor's own numbers are taken as they are: whatever float64 makes of them, float32 rounds."""
    L = smooth_cholesky((24, 9), torch.float32)
    q, exact = centred(L), centred(L.to(torch.float64))
    eps = {"rtol": 2e-7, "atol": 0}
    torch.testing.assert_close(q.variance.double(), exact.variance, **eps)
    nearest, expected = L.nearest(STENCILS["3x3"]), L.to(torch.float64).nearest(STENCILS["3x3"])
    torch.testing.assert_close(nearest.diag.double(), expected.diag, rtol=1e-6, atol=0)
    p = bg.GMRF(q.loc + 0.01, nearest)
    precise = bg.GMRF(p.loc.double(), nearest.to(torch.float64))
    torch.testing.assert_close(bg.kl_divergence(q, p).double(), bg.kl_divergence(exact, precise), **eps)
    torch.testing.assert_close(q.leading_eigenpairs(3).eigenvalues.double(), exact.leading_eigenpairs(3).eigenvalues, **eps)
    x = torch.randn(24, 9)
    evidence = q.posterior(x, 0.1).log_evidence
    torch.testing.assert_close(evidence, exact.posterior(x.double(), 0.1).log_evidence, rtol=1e-9, atol=0)
    matrix = dense(L)
    torch.testing.assert_close(q.variance.double().flatten(), (matrix @ matrix.mT).inverse().diagonal(), rtol=1e-4, atol=0)
