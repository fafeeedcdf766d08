"""Factors from covariances, against dense float64 linear algebra."""

import itertools

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf import construction
from tests.cases import FACTORS, STENCILS, dense
from tests.dense import exists, neighbours

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
    monkeypatch.setattr(construction, "_BLOCK_ELEMENTS", 3 * 2 * 25)  # three sites at a time
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
