"""Autoregressions of first order and separable precisions, against dense float64 linear algebra."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import banded_gmrf as bg
from tests.cases import dense_precision
from tests.dense import random_factor

# torch itself calls what it deprecates, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

# Products of a few numbers each.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def ar1_covariance(length, correlation, variance=1.0):
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    return variance * torch.as_tensor(correlation, dtype=torch.float64) ** apart


@pytest.mark.parametrize("length", [1, 2, 3, 8])
@pytest.mark.parametrize("correlation", [0.0, 0.7, -0.9, 0.999])
def test_the_covariance_of_an_autoregression_falls_geometrically(length, correlation):
    precision = bg.ar1_precision(length, correlation, 2.5)
    assert precision.grid == (length,)
    # Its condition number is at most 4 / (1 - |correlation|)² = 4e6.
    covariance = dense_precision(precision).inverse()
    torch.testing.assert_close(covariance, ar1_covariance(length, correlation, 2.5), rtol=1e-9, atol=1e-9)


def test_batches_dtypes_and_derivatives_of_an_autoregression():
    correlations, variances = torch.tensor([0.5, -0.2]).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    batch = bg.ar1_precision(4, correlations, variances)
    assert batch.batch_shape == (3, 2)
    for i in range(3):
        for j in range(2):
            expected = dense_precision(bg.ar1_precision(4, correlations[j], variances[i, 0]))
            torch.testing.assert_close(dense_precision(batch[i, j]), expected, **CLOSE)
    assert bg.ar1_precision(4, correlations[:0]).batch_shape == (0,)
    assert bg.ar1_precision(4, 0.5, dtype=torch.float32).diag.dtype == torch.float32

    def numbers(correlation, variance):
        precision = bg.ar1_precision(4, correlation, variance)
        return torch.cat([precision.diag, precision.off_diag[0]])

    point = torch.tensor(0.6).double(), torch.tensor(1.5).double()
    torch.autograd.gradcheck(numbers, [t.clone().requires_grad_() for t in point], check_forward_ad=True)
    one = torch.ones((), dtype=torch.float64)
    slope = jvp(lambda c: numbers(c, point[1]), (point[0],), (one,))[1].sum()
    torch.testing.assert_close(grad(lambda c: numbers(c, point[1]).sum())(point[0]), slope, **CLOSE)
    several = torch.tensor([0.1, -0.4, 0.8]).double()
    torch.testing.assert_close(
        vmap(lambda c: numbers(c, point[1]))(several), torch.stack([numbers(c, point[1]) for c in several]), **CLOSE
    )


def random_precision(stencil, grid, batch=()):
    """Positive definite by its diagonal, with NaN where entries do not exist."""
    generator = torch.Generator().manual_seed(len(grid))
    log_diag, off_diag = random_factor(stencil.offsets, grid, batch, generator=generator)
    return bg.StencilPrecision(log_diag.exp() + 2 * len(stencil), off_diag, stencil)


ONE, PLANE = bg.Stencil([1, 3]), bg.Stencil([(0, 1), (1, -2), (1, 0)])
PAIRS = {
    "line and line": ((ONE, (5,)), (ONE, (4,))),
    "line and plane": ((ONE, (4,)), (PLANE, (3, 4))),
    "plane and line": ((PLANE, (2, 3)), (ONE, (5,))),
    "one site": ((ONE, (1,)), (PLANE, (2, 3))),
    "smaller than its stencil": ((PLANE, (1, 2)), (ONE, (2,))),
    "diagonal": ((bg.Stencil([], 1), (3,)), (PLANE, (2, 3))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_separable_precision_is_the_kronecker_product(name):
    first, second = (random_precision(*part) for part in PAIRS[name])
    product = bg.separable_precision(first, second)
    assert product.grid == (*first.grid, *second.grid)
    expected = torch.kron(dense_precision(first), dense_precision(second))
    torch.testing.assert_close(dense_precision(product), expected, **CLOSE)
    L = bg.StencilCholesky.from_precision(product)
    torch.testing.assert_close(2 * L.logdet(), torch.linalg.slogdet(expected).logabsdet, **CLOSE)


def test_batches_of_separable_precisions():
    first, second = random_precision(ONE, (3,), (2, 1)), random_precision(PLANE, (2, 3), (4,))
    product = bg.separable_precision(first, second)
    assert product.batch_shape == (2, 4)
    for i in range(2):
        for j in range(4):
            expected = torch.kron(dense_precision(first[i, 0]), dense_precision(second[j]))
            torch.testing.assert_close(dense_precision(product[i, j]), expected, **CLOSE)
    assert bg.separable_precision(first[:0], second[0]).batch_shape == (0, 1)


def test_space_and_time():
    prior = bg.separable_precision(bg.ar1_precision(3, 0.8), bg.matern_precision((4, 5), 3.0, 1, 2.0))
    space = dense_precision(bg.matern_precision((4, 5), 3.0, 1, 2.0)).inverse().contiguous()
    covariance = torch.kron(ar1_covariance(3, 0.8), space)
    torch.testing.assert_close(dense_precision(prior).inverse(), covariance, rtol=1e-10, atol=1e-12)


def test_derivatives_of_a_separable_precision():
    def numbers(point):
        matern = bg.matern_precision((2, 3), point[1], 1, point[2])
        precision = bg.separable_precision(bg.ar1_precision(3, point[0]), matern)
        return torch.cat([precision.diag.flatten(), precision.off_diag.flatten()])

    point = torch.tensor([0.6, 2.5, 1.5]).double()
    torch.autograd.gradcheck(numbers, point.clone().requires_grad_(), check_forward_ad=True)
    several = torch.stack([point, 0.9 * point])
    torch.testing.assert_close(vmap(numbers)(several), torch.stack([numbers(one) for one in several]), **CLOSE)
    compiled = torch.compile(numbers, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(point), numbers(point), **CLOSE)


BAD = {
    "length": (lambda: bg.ar1_precision(0, 0.5), ValueError, "length is 0, expected at least 1"),
    "length of another type": (lambda: bg.ar1_precision(2.5, 0.5), TypeError, "length is 2.5, expected an integer"),
    "correlation": (lambda: bg.ar1_precision(3, 1.0), ValueError, "correlation is 1.0, expected less than 1 in magnitude"),
    "one of them": (
        lambda: bg.ar1_precision(3, [0.5, -1.5]),
        ValueError,
        r"correlation is \[0.5, -1.5\], expected less than 1",
    ),
    "NaN": (lambda: bg.ar1_precision(3, float("nan")), ValueError, "correlation is nan, expected less than 1"),
    "variance": (lambda: bg.ar1_precision(3, 0.5, 0.0), ValueError, "variance is 0.0, expected finite and positive"),
    "no precision": (lambda: bg.separable_precision(torch.eye(3), LINE), TypeError, "first is a Tensor, expected a Stencil"),
    "no second one": (lambda: bg.separable_precision(LINE, 2.0), TypeError, "second is a float, expected a StencilPrecision"),
    "axes": (
        lambda: bg.separable_precision(SHEET, SHEET),
        ValueError,
        "first has 2 axes and second 2, expected 3 together at most",
    ),
    "dtypes": (
        lambda: bg.separable_precision(LINE, SHEET.to(torch.float32)),
        TypeError,
        "second is torch.float32, first is torch.float64",
    ),
    "batches": (
        lambda: bg.separable_precision(bg.ar1_precision(3, torch.zeros(2)), bg.ar1_precision(3, torch.zeros(3))),
        ValueError,
        r"second has batch shape \(3,\)",
    ),
    "devices": (lambda: bg.separable_precision(LINE, SHEET.to("meta")), ValueError, "second is on meta"),
}
LINE, SHEET = bg.ar1_precision(3, 0.5), bg.matern_precision((2, 3), 2.0, 1)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build()
