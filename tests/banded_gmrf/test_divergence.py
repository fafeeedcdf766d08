import pytest
import torch
from torch.distributions import kl_divergence

import banded_gmrf as bg
from banded_gmrf.analysis import divergence
from tests.cases import STENCILS, dense, random_cholesky
from tests.dense import random_factor

# The dense trace loses a multiple of cond(Λ) ≈ 10² roundings of float64 (10⁻¹⁶).
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

PAIRS = [
    ("3x3", "3x3", (5, 4)),
    ("3x3", "5x5", (5, 4)),
    ("5x5", "3x3", (2, 7)),
    ("diagonal", "skewed", (5, 6)),
    ("skewed", "diagonal", (1, 6)),
    ("line", "line with a gap", (9,)),
    ("line with a gap", "line", (2,)),
    ("volume", "bands of a box", (3, 2, 4)),
]


def random_gmrf(name, grid, batch=(), loc_batch=()):
    return bg.GMRF(torch.randn(*loc_batch, *grid, dtype=torch.float64), random_cholesky(STENCILS[name], grid, batch))


def dense_kl(q, p):
    """½ (tr Λ_p Σ_q - n + mᵀ Λ_p m + log |Λ_q| - log |Λ_p|), m the difference of the means."""
    Q, P = (dense(d.precision_cholesky) @ dense(d.precision_cholesky).mT for d in (q, p))
    m = (q.loc.double() - p.loc.double()).flatten(-len(q.event_shape))
    trace = (P @ torch.linalg.inv(Q)).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance = torch.einsum("...i,...ij,...j", m, P, m)
    return 0.5 * (trace - m.shape[-1] + distance + torch.logdet(Q) - torch.logdet(P))


@pytest.mark.parametrize("block_sites", [1, 32])
@pytest.mark.parametrize(("of", "to", "grid"), PAIRS)
def test_kl_equals_the_dense_one(of, to, grid, block_sites, monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", block_sites)
    for batches in (((), (), (), ()), ((2,), (), (), (3, 1)), ((), (2,), (3, 1), (2,))):
        q, p = random_gmrf(of, grid, *batches[:2]), random_gmrf(to, grid, *batches[2:])
        actual = kl_divergence(q, p)
        assert actual.shape == torch.broadcast_shapes(*batches)
        torch.testing.assert_close(actual, dense_kl(q, p), **CLOSE)
        assert (kl_divergence(q, q).abs() < 1e-10).all()


@pytest.mark.parametrize("method", ["exact", "monte_carlo"])
def test_gradients_equal_the_dense_ones(method, monkeypatch):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)
    grid, tensors, distributions = (4, 3), [], []
    for name in ("5x5", "3x3"):
        own = [torch.randn(grid, dtype=torch.float64), *random_factor(STENCILS[name].offsets, grid, batch=(2,))]
        loc, *factor = (t.requires_grad_() for t in own)
        tensors += own
        distributions.append(bg.GMRF(loc, bg.StencilCholesky(*factor, STENCILS[name])))
    q, p = distributions
    torch.manual_seed(1)
    actual = divergence.kl_divergence(q, p, method, num_samples=3)
    expected = dense_kl(q, p)
    if method == "monte_carlo":
        torch.manual_seed(1)
        signs = torch.randint(2, (3, 2, *grid)).double().flatten(-2) * 2 - 1
        Q, P = dense(q.precision_cholesky), dense(p.precision_cholesky)
        estimate = (P.mT @ torch.linalg.solve_triangular(Q.mT, signs.unsqueeze(-1), upper=True)).square().sum((-2, -1)).mean(0)
        trace = (torch.cholesky_inverse(Q) @ P @ P.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        expected = expected + 0.5 * (estimate - trace)
    torch.testing.assert_close(actual, expected, **CLOSE)
    for a, e in zip(*(torch.autograd.grad(v.sum(), tensors) for v in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_monte_carlo_agrees_with_the_exact_value_and_is_exact_for_equal_factors(monkeypatch):
    q, p = random_gmrf("5x5", (5, 4), (2,)), random_gmrf("3x3", (5, 4))
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 300 * 40)
    estimates = torch.stack([divergence.kl_divergence(q, p, "monte_carlo", num_samples=400) for _ in range(10)])
    # Five standard errors, estimated from the ten estimates themselves.
    assert ((estimates.mean(0) - kl_divergence(q, p)).abs() < 5 * estimates.std(0) / 10**0.5).all()
    same = bg.GMRF(p.loc + 1, p.precision_cholesky)
    torch.testing.assert_close(divergence.kl_divergence(same, p, "monte_carlo", 1), kl_divergence(same, p), **CLOSE)


def test_large_grids_are_estimated(monkeypatch):
    q, p = random_gmrf("3x3", (5, 4)), random_gmrf("5x5", (5, 4))
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 20 * (3 * 4) ** 2)
    assert kl_divergence(q, p) == divergence.kl_divergence(q, p, "exact")
    monkeypatch.setattr("banded_gmrf.recursions.covariances._EXACT_OPERATIONS", 20 * (3 * 4) ** 2 - 1)
    assert kl_divergence(q, p) != divergence.kl_divergence(q, p, "exact")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q, p = (bg.GMRF(torch.randn(5, 4).to(dtype), random_cholesky(STENCILS[n], (5, 4), (2,), dtype)) for n in ("3x3", "5x5"))
    actual = kl_divergence(q, p)
    assert actual.dtype == torch.float32
    # Computed in float32: cond(Λ) ≈ 10² times its rounding, 10⁻⁷.
    torch.testing.assert_close(actual.double(), dense_kl(q, p), rtol=1e-4, atol=1e-4)


def test_bad_arguments():
    q = random_gmrf("3x3", (5, 4), (2,))
    for other, error, message in (
        (random_gmrf("3x3", (4, 5)), ValueError, r"q has grid \(5, 4\), p has grid \(4, 5\)"),
        (random_gmrf("3x3", (5, 4), (3,)), ValueError, r"q has batch shape \(2,\), .* with \(3,\) of p"),
        (
            bg.GMRF(torch.zeros(5, 4), bg.StencilCholesky(torch.zeros(5, 4), torch.zeros(4, 5, 4), q.stencil)),
            TypeError,
            "q is torch.float64, p is torch.float32",
        ),
    ):
        with pytest.raises(error, match=message):
            kl_divergence(q, other)
    for pair, message in (((q, 3), "p is a int, expected a GMRF"), ((None, q), "q is a NoneType, expected a GMRF")):
        with pytest.raises(TypeError, match=message):
            divergence.kl_divergence(*pair)
    with pytest.raises(ValueError, match="method is 'closed', expected 'auto', 'exact' or 'monte_carlo'"):
        divergence.kl_divergence(q, q, "closed")
    with pytest.raises(ValueError, match="num_samples is 0, expected at least 1"):
        divergence.kl_divergence(q, q, "monte_carlo", 0)
