"""Matérn fields that are anisotropic, masked, or different from site to site, against dense float64 linear algebra."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from scipy.special import kv
from torch.func import grad, hessian, jvp, vmap

import banded_gmrf as bg
from banded_gmrf.precisions import matern
from tests.cases import dense_precision

# torch itself calls what it deprecates, the first time that forward mode maps over tangents.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

# Sums of some ten terms of few roundings each.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}

GRIDS = [
    ((7,), 0.5),
    ((5,), 1.5),
    ((1,), 0.5),
    ((5, 4), 1),
    ((3, 7), 2),
    ((1, 4), 1),
    ((1, 1), 1),
    ((3, 2, 4), 0.5),
    ((2, 1, 3), 1.5),
]


def dense_matern(grid, R, smoothness, variance, mask):
    """Λ from its energy, gradient by gradient: R (*grid, d, d), variance (*grid), mask (*grid)."""
    d, n = len(grid), math.prod(grid)
    alpha = round(smoothness + d / 2)
    sites = list(itertools.product(*(range(size) for size in grid)))
    raster = {site: i for i, site in enumerate(sites) if mask[site]}
    K = torch.eye(n, dtype=torch.float64)
    for site in raster:
        for signs in itertools.product((-1, 1), repeat=d):
            gradient = torch.zeros(d, n, dtype=torch.float64)
            for axis, sign in enumerate(signs):
                there = (*site[:axis], site[axis] + sign, *site[axis + 1 :])
                if there in raster:
                    gradient[axis, raster[there]] = sign
                    gradient[axis, raster[site]] = -sign
            K = K + gradient.T @ (R[site] / (8 * smoothness)) @ gradient / 2**d
    root_det = torch.linalg.det(R / (8 * smoothness)).sqrt()
    tau = (math.gamma(smoothness) / (math.gamma(alpha) * (4 * math.pi) ** (d / 2) * root_det * variance)).sqrt().flatten()
    precision = tau[:, None] * torch.linalg.matrix_power(K, alpha) * tau
    land = ~mask.flatten()
    precision[land] = 0
    precision[land, land] = 1 / variance.flatten()[land]
    return precision


def random_mask(grid, generator):
    mask = torch.rand(grid, generator=generator) < 0.75
    mask.view(-1)[0] = True
    return mask


def everywhere(R, variance, grid):
    return R.expand(*grid, *R.shape[-2:]), torch.as_tensor(variance, dtype=torch.float64).expand(grid)


def rotation(angle, ratio):
    cos, sin = math.cos(angle), math.sin(angle)
    Q = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return Q @ torch.diag(torch.tensor([1.0, ratio**2], dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "smoothness"), GRIDS)
def test_the_precision_is_that_of_its_energy(grid, smoothness, masked):
    d, generator = len(grid), torch.Generator().manual_seed(1)
    mask = random_mask(grid, generator) if masked else torch.ones(grid, dtype=torch.bool)
    given = {"mask": mask} if masked else {}
    A = torch.randn(d, d, dtype=torch.float64, generator=generator)
    H = A @ A.T + 0.5 * torch.eye(d)
    per_axis = [2.0, 5.0, 3.0][:d]
    for precision, R in [
        (bg.matern_precision(grid, 4.0, smoothness, 2.5, **given), 16 * torch.eye(d).double()),
        (bg.matern_precision(grid, per_axis, smoothness, 2.5, **given), torch.tensor(per_axis).double().square().diag()),
        (bg.matern_precision(grid, 3.0, smoothness, 2.5, anisotropy=H, **given), 9 * H),
    ]:
        expected = dense_matern(grid, *everywhere(R, 2.5, grid)[:1], smoothness, *everywhere(R, 2.5, grid)[1:], mask)
        torch.testing.assert_close(dense_precision(precision), expected, **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "smoothness"), GRIDS)
def test_fields_of_parameters(grid, smoothness, masked):
    d, generator = len(grid), torch.Generator().manual_seed(2)
    mask = random_mask(grid, generator) if masked else torch.ones(grid, dtype=torch.bool)
    given = {"mask": mask} if masked else {}
    ranges = 2 + torch.rand(d, *grid, dtype=torch.float64, generator=generator)
    variance = 1 + torch.rand(grid, dtype=torch.float64, generator=generator)
    A = torch.randn(*grid, d, d, dtype=torch.float64, generator=generator)
    H = A @ A.mT + 0.5 * torch.eye(d)
    for precision, R in [
        (
            bg.matern_precision(grid, ranges[0], smoothness, variance, stationary=False, **given),
            ranges[0][..., None, None].square() * torch.eye(d),
        ),
        (
            bg.matern_precision(grid, tuple(ranges), smoothness, variance, stationary=False, **given),
            ranges.movedim(0, -1).square().diag_embed(),
        ),
        (
            bg.matern_precision(grid, ranges[0], smoothness, variance, anisotropy=H, stationary=False, **given),
            ranges[0][..., None, None].square() * H,
        ),
    ]:
        torch.testing.assert_close(dense_precision(precision), dense_matern(grid, R, smoothness, variance, mask), **CLOSE)


def test_batches_of_parameters_and_masks():
    grid, generator = (3, 4), torch.Generator().manual_seed(3)
    ranges, variance = torch.tensor([2.0, 5.0]).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    angle, ratio = torch.tensor([0.3, 1.0]).double(), 0.5
    mask = torch.stack([random_mask(grid, generator) for _ in range(2)])
    precision = bg.matern_precision(grid, ranges, 1, variance, anisotropy=(angle, ratio), mask=mask)
    several = bg.matern_precision(grid, (ranges, 3.0), 1, variance, mask=mask)
    isotropic = bg.matern_precision(grid, ranges, 1, variance, mask=mask)
    H = torch.stack([rotation(float(a), ratio) for a in angle])
    fields = bg.matern_precision(
        grid, ranges[:, None, None], 1, variance[..., None, None], anisotropy=H[:, None, None], mask=mask, stationary=False
    )
    for batch in (precision, several, isotropic, fields):
        assert batch.batch_shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        alone = {"smoothness": 1, "variance": variance[i, 0], "mask": mask[j]}
        expected = bg.matern_precision(grid, ranges[j], anisotropy=(angle[j], ratio), **alone)
        torch.testing.assert_close(dense_precision(precision[i, j]), dense_precision(expected), **CLOSE)
        torch.testing.assert_close(dense_precision(fields[i, j]), dense_precision(expected), **CLOSE)
        expected = dense_precision(bg.matern_precision(grid, (ranges[j], 3.0), **alone))
        torch.testing.assert_close(dense_precision(several[i, j]), expected, **CLOSE)
        torch.testing.assert_close(
            dense_precision(isotropic[i, j]), dense_precision(bg.matern_precision(grid, ranges[j], **alone)), **CLOSE
        )
    assert bg.matern_precision(grid, ranges[:0], 1, mask=mask[0]).batch_shape == (0,)
    assert bg.matern_precision(grid, (ranges[:0], 1.0), 1).batch_shape == (0,)


def test_one_field_described_in_several_ways():
    grid = (4, 5)
    along = dense_precision(bg.matern_precision(grid, (6.0, 3.0), 1, 2.0))
    for other in [
        bg.matern_precision(grid, 6.0, 1, 2.0, anisotropy=(0.0, 0.5)),
        bg.matern_precision(grid, 3.0, 1, 2.0, anisotropy=(math.pi / 2, 2.0)),
        bg.matern_precision(grid, 3.0, 1, 2.0, anisotropy=[[4.0, 0.0], [0.0, 1.0]]),
        bg.matern_precision(grid, (torch.full(grid, 6.0), 3.0), 1, 2.0, stationary=False),
    ]:
        torch.testing.assert_close(dense_precision(other), along, **CLOSE)
    turned = dense_precision(bg.matern_precision(grid, 6.0, 1, anisotropy=(0.7, 0.3)))
    torch.testing.assert_close(
        dense_precision(bg.matern_precision(grid, 6.0, 1, anisotropy=rotation(0.7, 0.3))), turned, **CLOSE
    )
    plain = dense_precision(bg.matern_precision(grid, 3.0, 2))
    for other in [
        bg.matern_precision(grid, (3.0, 3.0), 2),
        bg.matern_precision(grid, 3.0, 2, mask=torch.ones(grid, dtype=torch.bool)),
        bg.matern_precision(grid, 3.0, 2, stationary=False),
    ]:
        torch.testing.assert_close(dense_precision(other), plain, **CLOSE)


def test_the_direction_of_an_ellipse():
    """The correlation at a vector h is that at its length √(hᵀR⁻¹h), far from the edges and of pixels that see no lattice."""
    grid, centre = (41, 41), 20 * 41 + 20
    precision = bg.matern_precision(grid, 16.0, 1, anisotropy=(math.pi / 4, 0.5))
    covariance = dense_precision(precision).inverse()[centre].reshape(grid)
    correlation = covariance / covariance[20, 20]
    inverse = torch.linalg.inv(256 * rotation(math.pi / 4, 0.5))
    for h in [(6, 6), (-3, 3), (0, 6), (6, 0), (9, 3)]:
        h = torch.tensor(h)
        scaled = math.sqrt(8) * float((h.double() @ inverse @ h.double()).sqrt())
        # 0.03 as for the isotropic field: edges and lattice.
        assert float(correlation[tuple(20 + h)]) == pytest.approx(scaled * kv(1, scaled), abs=0.03)
    assert float(covariance[20, 20]) == pytest.approx(1, abs=0.05)
    assert correlation[26, 26] > correlation[26, 14] + 0.2


@pytest.mark.parametrize("anisotropy", [None, (0.6, 0.4)])
def test_land_separates_seas(anisotropy):
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[torch.arange(5), torch.tensor([1, 2, 3, 2, 3])] = False  # its corners touch: no way through
    precision = bg.matern_precision((5, 6), 4.0, 1, 2.5, mask=mask, anisotropy=anisotropy)
    covariance = dense_precision(precision).inverse().reshape(5, 6, 5, 6)
    west = torch.zeros(5, 6, dtype=torch.bool)
    west[:, :3] = mask[:, :3].cumprod(1).bool()
    west[2, :3] = True
    east = mask & ~west
    assert (covariance[west][:, east] == 0).all()
    assert (covariance[west][:, west].abs() > 1e-3).all()
    assert (covariance[~mask][:, mask] == 0).all()
    torch.testing.assert_close(covariance[~mask][:, ~mask], 2.5 * torch.eye(5, dtype=torch.float64))
    # As a field on its own: the first two columns of rows 1 to 3 of a sea without any coast inside.
    alone = bg.matern_precision((1, 3), 4.0, 1, 2.5, anisotropy=anisotropy)
    strait = torch.zeros(3, 3, dtype=torch.bool)
    strait[1] = True
    within = dense_precision(bg.matern_precision((3, 3), 4.0, 1, 2.5, anisotropy=anisotropy, mask=strait))[3:6, 3:6]
    torch.testing.assert_close(within, dense_precision(alone), **CLOSE)


@pytest.mark.parametrize("nu", [1, 2])
def test_how_far_the_lattice_is_from_the_continuum(nu):
    """The semivariogram ratios of the docstring, on a torus so large that a range does not see its size."""
    k = 2 * np.pi * np.arange(512) / 512
    laplacian = (2 - 2 * np.cos(k))[:, None] + 2 - 2 * np.cos(k)
    figures = {1: {39: (1.19, 1.09, 1.03), 10: (1.29, 1.16, 1.07)}, 2: {39: (1.02,), 10: (1.19,)}}
    for correlation_range, ratios in figures[nu].items():
        kappa2 = 8 * nu / correlation_range**2
        spectrum = 4 * math.pi * nu * kappa2**nu / (kappa2 + laplacian) ** (nu + 1)
        torus = np.fft.ifft2(spectrum).real
        lags = np.array([1, 2, 5][: len(ratios)])
        scaled = math.sqrt(8 * nu) * lags / correlation_range
        continuum = 1 - 2 ** (1 - nu) / math.gamma(nu) * scaled**nu * kv(nu, scaled)
        np.testing.assert_allclose((torus[0, 0] - torus[0, lags]) / continuum, ratios, atol=0.006)
        # The rows of Λ are this spectrum's, in the middle of a grid.
        row = np.fft.ifft2(1 / spectrum).real
        inner = dense_precision(bg.matern_precision((9, 9), float(correlation_range), nu))[40].reshape(9, 9).numpy()
        np.testing.assert_allclose(inner, np.roll(row, (4, 4), (0, 1))[:9, :9], rtol=1e-9, atol=1e-9 * inner.max())


FIELD = 2 + torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
KINDS = {
    "isotropic": lambda r, v: bg.matern_precision((3, 4), r, 1, v),
    "masked": lambda r, v: bg.matern_precision((3, 4), r, 2, v, mask=MASK),
    "range per axis": lambda r, v: bg.matern_precision((3, 4), (r, v + 1), 1, v, mask=MASK),
    "angle and ratio": lambda r, v: bg.matern_precision((3, 4), r, 1, v, anisotropy=(r / 5, v / 3)),
    "matrix": lambda r, v: bg.matern_precision(
        (3, 4), r, 1, v, anisotropy=torch.stack([torch.stack([v + 1, r / 9]), torch.stack([r / 9, r])])
    ),
    "field": lambda r, v: bg.matern_precision(
        (3, 4), r * FIELD, 1, v * FIELD, stationary=False, mask=MASK, anisotropy=(FIELD, v / 3)
    ),
}
POINT = torch.tensor([2.5, 1.5], dtype=torch.float64)


def numbers(precision):
    return torch.cat([precision.diag.flatten(), precision.off_diag.flatten()])


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_under_each_transformation(kind):
    def function(point):
        return numbers(KINDS[kind](*point))

    torch.autograd.gradcheck(function, POINT.clone().requires_grad_(), check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda point: function(point).sin().sum(), POINT.clone().requires_grad_())
    expected = torch.autograd.functional.jacobian(function, POINT)
    direction = torch.tensor([0.3, -0.7], dtype=torch.float64)
    torch.testing.assert_close(jvp(function, (POINT,), (direction,))[1], expected @ direction, **CLOSE)
    torch.testing.assert_close(grad(lambda point: function(point).sum())(POINT), expected.sum(0), **CLOSE)
    several = torch.stack([POINT, 1.1 * POINT])
    torch.testing.assert_close(vmap(function)(several), torch.stack([function(point) for point in several]), **CLOSE)
    torch.testing.assert_close(
        vmap(hessian(lambda point: function(point).sum()))(several)[0],
        hessian(lambda point: function(point).sum())(POINT),
        **CLOSE,
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["grid", "mask"])
@pytest.mark.parametrize(
    "transformed", [grad, hessian, lambda f: lambda r: vmap(grad(f))(r[None])[0]], ids=str.split("grad hessian vmap")
)
def test_the_first_call_for_a_grid_may_be_under_a_transformation(transformed, mask):
    def function(correlation_range):
        return numbers(bg.matern_precision(MASK.shape, correlation_range, 1, mask=mask)).sin().sum()

    at = torch.tensor(2.5, dtype=torch.float64)
    matern._laplacian_powers.cache_clear()
    first = transformed(function)(at)
    torch.testing.assert_close(first, transformed(function)(at), rtol=0, atol=0)


def test_gradients_of_every_entry_of_fields_and_matrices():
    grid = (2, 3)
    generator = torch.Generator().manual_seed(5)
    field = 2 + torch.rand(grid, dtype=torch.float64, generator=generator)
    A = torch.randn(*grid, 2, 2, dtype=torch.float64, generator=generator)

    def precision(ranges, variance, A):
        return numbers(bg.matern_precision(grid, ranges, 1, variance, anisotropy=A @ A.mT + torch.eye(2), stationary=False))

    torch.autograd.gradcheck(precision, [t.requires_grad_() for t in (field, field.detach() / 2, A)])


@pytest.mark.parametrize("kind", ["masked", "angle and ratio"])
def test_compiled(kind):
    torch.compiler.reset()
    compiled = torch.compile(lambda point: numbers(KINDS[kind](*point)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(POINT), numbers(KINDS[kind](*POINT)), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    # A few roundings of sums in which nothing cancels.
    eps = {"rtol": 30 * torch.finfo(dtype).eps, "atol": 0}
    for given in ({}, {"anisotropy": (torch.tensor(0.4), 0.5)}, {"mask": MASK}):
        precision = bg.matern_precision((3, 4), torch.tensor(2.0, dtype=dtype), 1, dtype=dtype, **given)
        exact = bg.matern_precision((3, 4), 2.0, 1, **given)
        assert precision.diag.dtype == precision.off_diag.dtype == dtype
        torch.testing.assert_close(precision.diag.double(), exact.diag, **eps)


class TestCache:
    """Powers of the Laplacian are kept from call to call."""

    def test_values_do_not_depend_on_it(self, monkeypatch):
        for grid, nu in GRIDS:
            for mask in (None, random_mask(grid, torch.Generator().manual_seed(6))):
                cached = [bg.matern_precision(grid, 3.0, nu, mask=mask) for _ in range(2)]
                with monkeypatch.context() as patch:
                    patch.setattr(matern, "_MAX_CACHED", 0)
                    plain = bg.matern_precision(grid, 3.0, nu, mask=mask)
                for precision in cached:
                    assert precision.stencil == plain.stencil
                    torch.testing.assert_close(numbers(precision), numbers(plain), **CLOSE)

    def test_what_was_made_in_inference_mode_can_be_differentiated_later(self):
        matern._laplacian_powers.cache_clear()
        with torch.inference_mode():
            bg.matern_precision((3, 4), 2.0, 1)
        point = POINT.clone().requires_grad_()
        numbers(KINDS["isotropic"](*point)).sum().backward()
        assert point.grad.isfinite().all()

    def test_results_are_the_callers(self):
        before = numbers(bg.matern_precision((3, 4), 2.0, 1)).clone()
        precision = bg.matern_precision((3, 4), 2.0, 1)
        precision.diag.zero_()
        precision.off_diag.zero_()
        assert torch.equal(numbers(bg.matern_precision((3, 4), 2.0, 1)), before)

    def test_it_is_small(self):
        matern._laplacian_powers.cache_clear()
        bg.matern_precision((300, 300), 2.0, 1)
        assert matern._laplacian_powers.cache_info().currsize == 0
        for n in range(2, 20):
            bg.matern_precision((n,), 2.0, 0.5)
        assert matern._laplacian_powers.cache_info().currsize <= 8

    def test_masks_are_told_apart(self):
        matern._laplacian_powers.cache_clear()
        other = MASK.roll(1, 0)
        for mask in (MASK, other, MASK):
            expected = dense_matern(
                (3, 4), *everywhere(4 * torch.eye(2).double(), 1.0, (3, 4))[:1], 1, torch.ones(3, 4).double(), mask
            )
            torch.testing.assert_close(dense_precision(bg.matern_precision((3, 4), 2.0, 1, mask=mask)), expected, **CLOSE)

    def test_threads(self):
        matern._laplacian_powers.cache_clear()
        grids = [(3, 4), (4, 3), (5, 2)]
        expected = {grid: numbers(bg.matern_precision(grid, 2.0, 1)) for grid in grids}
        matern._laplacian_powers.cache_clear()
        wrong = []

        def work(first):
            order = 5 * (grids[first:] + grids[:first])
            wrong.extend(not torch.equal(numbers(bg.matern_precision(grid, 2.0, 1)), expected[grid]) for grid in order)

        threads = [threading.Thread(target=work, args=(first % 3,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == 90
        assert not any(wrong)


BAD = {
    "two ranges of three": (
        lambda: bg.matern_precision((3, 4), (1.0, 2.0, 3.0), 1),
        ValueError,
        "correlation_range has 3 entries, expected one for each of 2 axes",
    ),
    "one range not positive": (
        lambda: bg.matern_precision((3, 4), (1.0, -2.0), 1),
        ValueError,
        r"correlation_range\[1\] is -2.0, expected finite and positive",
    ),
    "both": (
        lambda: bg.matern_precision((3, 4), (1.0, 2.0), 1, anisotropy=(0.0, 1.0)),
        ValueError,
        "an entry for each axis and anisotropy is given",
    ),
    "field": (
        lambda: bg.matern_precision((3, 4), torch.ones(3), 1, stationary=False),
        ValueError,
        r"correlation_range has shape \(3,\), expected one that broadcasts to \(\*batch, \*\(3, 4\)\)",
    ),
    "field too large": (
        lambda: bg.matern_precision((1, 4), 1.0, 1, torch.ones(3, 4), stationary=False),
        ValueError,
        r"variance has shape \(3, 4\), expected one that broadcasts",
    ),
    "field of a range": (
        lambda: bg.matern_precision((3, 4), -torch.ones(3, 4), 1, stationary=False),
        ValueError,
        "correlation_range is .*, expected finite and positive",
    ),
    "ratio": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=(0.0, 0.0)),
        ValueError,
        r"anisotropy\[1\] is 0.0, expected finite and positive",
    ),
    "angle": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=(math.inf, 1.0)),
        ValueError,
        r"anisotropy\[0\] is inf, expected a finite angle",
    ),
    "angle of three axes": (
        lambda: bg.matern_precision((3, 4, 2), 1.0, 0.5, anisotropy=(0.0, 1.0)),
        ValueError,
        "anisotropy has 2 entries for 3 axes",
    ),
    "matrix of another size": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=torch.eye(3)),
        ValueError,
        r"anisotropy has shape \(3, 3\), expected \(\*batch, 2, 2\)",
    ),
    "list": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=[0.1, 0.5]),
        ValueError,
        r"anisotropy has shape \(2,\), expected \(\*batch, 2, 2\), or a tuple",
    ),
    "negative direction": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=[[1.0, 2.0], [2.0, 1.0]]),
        ValueError,
        "anisotropy is .*, expected symmetric and positive definite",
    ),
    "not symmetric": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=[[1.0, 0.5], [0.0, 1.0]]),
        ValueError,
        "expected symmetric and positive definite",
    ),
    "not finite": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, anisotropy=[[math.nan, 0.0], [0.0, 1.0]]),
        ValueError,
        "expected symmetric and positive definite",
    ),
    "mask of numbers": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, mask=torch.ones(3, 4)),
        TypeError,
        "mask is torch.float32, expected torch.bool",
    ),
    "mask of another shape": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, mask=torch.ones(4, 3) > 0),
        ValueError,
        r"mask has shape \(4, 3\), expected \(\*batch, 3, 4\)",
    ),
    "no site": (lambda: bg.matern_precision((3, 4), 1.0, 1, mask=torch.zeros(3, 4) > 0), ValueError, "mask has no true site"),
    "no site in one": (
        lambda: bg.matern_precision((3, 4), 1.0, 1, mask=torch.stack([MASK, MASK & ~MASK])),
        ValueError,
        "mask has no true site",
    ),
    "under vmap": (
        lambda: vmap(lambda r: bg.matern_precision((3, 4), r, 1).diag)(torch.tensor([1.0, -1.0])),
        ValueError,
        r"correlation_range is \[1.0, -1.0\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build()


def test_what_float64_cannot_tell_is_still_refused():
    for given in ({}, {"anisotropy": (0.5, 0.9)}, {"mask": torch.ones(32, 32, dtype=torch.bool)}, {"stationary": False}):
        with pytest.raises(torch.linalg.LinAlgError, match="singular up to rounding"):
            bg.StencilCholesky.from_precision(bg.matern_precision((32, 32), 160.0, 3, **given))


@pytest.mark.parametrize(
    ("options", "shortest"),
    [
        ({"correlation_range": 0.3}, "0.3"),
        ({"correlation_range": (5.0, 0.5)}, "0.5"),
        ({"correlation_range": torch.tensor([4.0, 0.9])}, "0.9"),
        ({"correlation_range": 2.0, "anisotropy": (0.0, 0.25)}, "0.5"),
        ({"correlation_range": torch.full((6, 7), 2.0).index_fill(0, torch.tensor(3), 0.2), "stationary": False}, "0.2"),
    ],
)
def test_a_range_that_no_grid_has_is_told(options, shortest):
    with pytest.warns(UserWarning, match=rf"correlation_range is {shortest} at its shortest"):
        precision = bg.matern_precision((6, 7), smoothness=1, **options)
    # What it tells of is so: far less variance than the 1 that was asked for.
    middle = 3 * 7 + 3
    assert dense_precision(precision).inverse()[..., middle, middle].min() < 0.8


def test_ranges_outside_of_a_mask_are_not_looked_at():
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[3] = False
    short = torch.full((6, 7), 2.0).index_fill(0, torch.tensor(3), 0.2)
    bg.matern_precision((6, 7), short, 1, mask=mask, stationary=False)


def test_a_short_range_is_told_under_vmap():
    with pytest.warns(UserWarning, match=r"correlation_range is 0\.5 at its shortest"):
        torch.vmap(lambda r: bg.matern_precision((4, 5), r, 1).diag)(torch.tensor([3.0, 0.5]))
