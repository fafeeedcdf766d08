"""Each error names the argument, what was expected and what came."""

import functools
import re

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS

STENCIL = STENCILS["5x5"]
GRID = (4, 5)


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


LOG_DIAG, OFF_DIAG = zeros(2, *GRID), zeros(2, 12, *GRID)
CHOLESKY = bg.StencilCholesky(LOG_DIAG, OFF_DIAG, STENCIL)

BAD_FACTORS = [
    pytest.param(*case, id=case[-1])
    for case in [
        (LOG_DIAG, zeros(2, 11, *GRID), ValueError, "off_diag has 11 offsets, the stencil has 12"),
        (LOG_DIAG, zeros(2, 12, 4, 6), ValueError, r"off_diag has grid \(4, 6\), log_diag has grid \(4, 5\)"),
        (LOG_DIAG, zeros(4, 5), ValueError, r"off_diag has shape \(4, 5\), expected \(\*batch, 12, 4, 5\)"),
        (zeros(5), OFF_DIAG, ValueError, r"log_diag has shape \(5,\), the stencil needs a grid of 2 axes"),
        (zeros(2, 0, 5), zeros(2, 12, 0, 5), ValueError, r"log_diag has the empty grid \(0, 5\)"),
        (
            zeros(3, *GRID),
            OFF_DIAG,
            ValueError,
            r"off_diag has batch shape \(2,\), .* with \(3,\) of log_diag",
        ),
        (LOG_DIAG, OFF_DIAG.double(), TypeError, "off_diag is torch.float64, log_diag is torch.float32"),
        (LOG_DIAG.double(), OFF_DIAG.half(), TypeError, "off_diag is torch.float16, log_diag is torch.float64"),
        (LOG_DIAG.half(), OFF_DIAG, TypeError, "off_diag is torch.float32, log_diag is torch.float16"),
        (LOG_DIAG, OFF_DIAG.to("meta"), ValueError, "off_diag is on meta, log_diag is on cpu"),
        (
            LOG_DIAG.long(),
            OFF_DIAG.long(),
            TypeError,
            "log_diag is torch.int64, expected float16, bfloat16, float32 or float64",
        ),
        (LOG_DIAG, OFF_DIAG.bool(), TypeError, "off_diag is torch.bool, expected float16"),
        (LOG_DIAG.cfloat(), OFF_DIAG.cfloat(), TypeError, "log_diag is torch.complex64, expected float16"),
        (LOG_DIAG.numpy(), OFF_DIAG, TypeError, "log_diag is a ndarray, expected a torch.Tensor"),
        (LOG_DIAG, None, TypeError, "off_diag is a NoneType, expected a torch.Tensor"),
    ]
]

BAD_VECTORS = [  # the message follows the argument's name
    pytest.param(*case, id=case[-1])
    for case in [
        (zeros(2, 5, 4), ValueError, r"has shape \(2, 5, 4\), expected \(..., 4, 5\)"),
        (zeros(5), ValueError, r"has shape \(5,\), expected \(..., 4, 5\)"),
        (zeros(3, *GRID), ValueError, r"has batch shape \(3,\), which does not broadcast with \(2,\)"),
        (zeros(*GRID).double(), TypeError, "is torch.float64, .* is torch.float32"),
        (zeros(*GRID).half(), TypeError, "is torch.float16, .* is torch.float32"),
        (zeros(*GRID).int(), TypeError, "is torch.int32, expected float16, bfloat16, float32 or float64"),
        (zeros(*GRID, device="meta"), ValueError, "is on meta, .* is on cpu"),
        ([[0.0] * 5] * 4, TypeError, "is a list, expected a torch.Tensor"),
    ]
]


@pytest.mark.parametrize(("log_diag", "off_diag", "error", "message"), BAD_FACTORS)
def test_factor(log_diag, off_diag, error, message):
    with pytest.raises(error, match=message):
        bg.StencilCholesky(log_diag, off_diag, STENCIL)
    with pytest.raises(error, match=message):
        bg.negative_log_likelihood(zeros(*GRID), log_diag, off_diag, STENCIL)


@pytest.mark.parametrize(("vector", "error", "message"), BAD_VECTORS)
@pytest.mark.parametrize("transpose", [False, True])
def test_vector(vector, error, message, transpose):
    with pytest.raises(error, match=f"^x {message}"):
        CHOLESKY.matvec(vector, transpose)
    with pytest.raises(error, match=f"^b {message}"):
        CHOLESKY.solve(vector, transpose)


@pytest.mark.parametrize(("vector", "error", "message"), BAD_VECTORS)
def test_loc_value_and_residual(vector, error, message):
    with pytest.raises(error, match=f"^loc {message}"):
        bg.GMRF(vector, CHOLESKY)
    q = bg.GMRF(zeros(*GRID), CHOLESKY)
    for validate_args in (True, False):
        q = bg.GMRF(zeros(*GRID), CHOLESKY, validate_args=validate_args)
        with pytest.raises(error, match=f"^value {message}"):
            q.log_prob(vector)
    with pytest.raises(error, match=f"^value {message}"):
        q.whiten(vector)
    for diagnostic in (bg.diagnostics.whitened_moments, bg.diagnostics.energy_score, bg.diagnostics.variogram_score):
        with pytest.raises(error, match=f"^x {message}"):
            diagnostic(q, vector)
    with pytest.raises(error, match=f"^residual {message}"):
        bg.negative_log_likelihood(vector, LOG_DIAG, OFF_DIAG, STENCIL)


@pytest.mark.parametrize("stencil", [STENCIL.offsets, 5, None])
def test_stencil(stencil):
    message = f"stencil is a {type(stencil).__name__}, expected a Stencil"
    with pytest.raises(TypeError, match=message):
        bg.StencilCholesky(LOG_DIAG, OFF_DIAG, stencil)
    with pytest.raises(TypeError, match=message):
        bg.negative_log_likelihood(zeros(*GRID), LOG_DIAG, OFF_DIAG, stencil)


def test_precision_cholesky():
    with pytest.raises(TypeError, match="precision_cholesky is a Tensor, expected a StencilCholesky"):
        bg.GMRF(zeros(*GRID), torch.eye(20))


def test_stencil_with_other_axes():
    with pytest.raises(ValueError, match=r"log_diag has shape \(4, 5\), the stencil needs a grid of 3 axes"):
        bg.StencilCholesky(zeros(4, 5), zeros(4, 4, 5), STENCILS["volume"])


def test_half_coefficients_take_no_float64():
    L = bg.StencilCholesky(LOG_DIAG.half(), OFF_DIAG.half(), STENCIL)
    with pytest.raises(TypeError, match=r"x is torch.float64, .* is torch.float16"):
        L.matvec(zeros(*GRID).double())


def test_to_scipy_of_a_batch():
    with pytest.raises(ValueError, match=r"without batch axes, got batch shape \(2,\)"):
        CHOLESKY.to_scipy()


def test_expand():
    with pytest.raises(ValueError, match=r"batch_shape is \(3,\), expected an expansion of \(2,\)"):
        CHOLESKY.expand((3,))


@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        ((1.0, 2.0), TypeError, "sites is torch.float32, expected integers"),
        (3, ValueError, r"sites has shape \(\), expected \(2,\) or \(m, 2\)"),
        ([(1, 2, 3)], ValueError, r"sites has shape \(1, 3\), expected \(2,\) or \(m, 2\)"),
        ([(0, 0), (1, 5)], ValueError, r"sites has \[1, 5\], which is not on \(4, 5\)"),
        ((-1, 0), ValueError, r"sites has \[-1, 0\], which is not on \(4, 5\)"),
    ],
)
def test_sites(sites, error, message):
    q = bg.GMRF(zeros(*GRID), CHOLESKY)
    for method in (q.covariance_columns, q.correlation_with):
        with pytest.raises(error, match=message):
            method(sites)


@pytest.mark.parametrize("name", ["covariance_matrix", "precision_matrix"])
def test_dense_matrices_of_large_grids(name):
    q = bg.GMRF(zeros(91, 91), bg.StencilCholesky(zeros(91, 91), zeros(0, 91, 91), STENCILS["diagonal"]))
    with pytest.raises(ValueError, match=rf"{name} takes at most 8192 sites, the grid \(91, 91\) has 8281"):
        getattr(q, name)


def test_backend():
    with pytest.raises(ValueError, match="name is 'gpu', expected one of 'reference'"), bg.use_backend("gpu"):
        pass


BAD_GRIDS = [
    pytest.param(*case, id=str(case[0]))
    for case in [
        (10, TypeError, "grid is 10, expected the number of sites along each of 1 to 3 axes"),
        ("ab", TypeError, "grid is 'ab', expected the number of sites"),
        ((10.5, 3), TypeError, r"grid\[0\] is 10.5, expected an integer"),
        ((4, (5,)), TypeError, r"grid\[1\] is \(5,\), expected an integer"),
        ((), ValueError, r"grid is \(\), expected the number of sites along each of 1 to 3 axes, at least one"),
        ((0, 5), ValueError, r"grid is \(0, 5\), expected the number of sites"),
        ((-1, 5), ValueError, r"grid is \(-1, 5\), expected the number of sites"),
        ((2, 3, 4, 5), ValueError, r"grid is \(2, 3, 4, 5\), expected the number of sites"),
    ]
]


@pytest.mark.parametrize(("grid", "error", "message"), BAD_GRIDS)
def test_grid(grid, error, message):
    for call in (
        lambda: bg.matern_precision(grid, 4.0, 1),
        lambda: bg.car_precision(grid, 0.5),
        lambda: bg.thin_plate_precision(grid, 1.0, 0.1),
        lambda: bg.StencilPrecision.from_matrix(torch.eye(4), grid),
    ):
        with pytest.raises(error, match=message):
            call()


def test_grids_of_other_sequences():
    expected = bg.matern_precision((4, 5), 4.0, 1)
    for grid in ([4, 5], torch.tensor([4, 5]), torch.tensor([4, 5]).numpy()):
        assert torch.equal(bg.matern_precision(grid, 4.0, 1).off_diag, expected.off_diag)
        assert bg.thin_plate_precision(grid, 1.0, 0.1).grid == bg.car_precision(grid, 0.5).grid == (4, 5)
    with pytest.raises(TypeError, match=r"grid\[1\] is 4.5, expected an integer"):
        STENCIL.mask((4, 4.5))


def test_sample_shape():
    q = bg.GMRF(zeros(*GRID), CHOLESKY)
    for field in (q, q.posterior(zeros(*GRID), 1.0), bg.SparseGMRF(zeros(*GRID).double(), bg.matern_precision(GRID, 2.0, 1))):
        with pytest.raises(TypeError, match=r"sample_shape is 5, expected a sequence of integers, as in sample\(\(5,\)\)"):
            field.sample(5)


def test_a_channel_left_in_a_batch_warns():
    field, images = bg.GMRF(zeros(2, *GRID), CHOLESKY), zeros(2, 1, *GRID)
    low_rank = bg.LowRankGMRF(field.loc, CHOLESKY, zeros(2, 1, *GRID))
    sparse = bg.SparseGMRF(zeros(2, *GRID).double(), bg.matern_precision(GRID, 2.0, 1))
    posterior = field.posterior(field.loc, 1.0)
    for name, call in {
        "residual": lambda: bg.negative_log_likelihood(images, LOG_DIAG, OFF_DIAG, STENCIL),
        "value": lambda: field.log_prob(images),
        "loc": lambda: bg.GMRF(images, CHOLESKY),
        "values": lambda: field.condition(torch.ones(GRID, dtype=torch.bool), images),
        "observation": lambda: field.posterior(images, 1.0),
        "x": lambda: bg.diagnostics.marginal_coverage(field, images),
    }.items():
        with pytest.warns(
            UserWarning, match=rf"^{name} has batch shape \(2, 1\), .* \(2,\): they broadcast to all pairs"
        ) as caught:
            call()
        assert all(warning.filename == __file__ for warning in caught)
    for other in (low_rank, posterior):
        with pytest.warns(UserWarning, match=r"^value has batch shape \(2, 1\)"):
            other.log_prob(images)
    with pytest.warns(UserWarning, match=r"^value has batch shape \(2, 1\)"):
        sparse.log_prob(images.double())
    # No channel: all pairs of three images and two distributions, one distribution for all images, and a batch of one.
    assert field.log_prob(zeros(3, 1, *GRID)).shape == (3, 2)
    assert field[0].log_prob(images).shape == (2, 1)
    assert field[:1].log_prob(zeros(1, 1, *GRID)).shape == (1, 1)


def test_channels_taken_for_a_grid_warn():
    generator = torch.Generator().manual_seed(0)
    images, image = (torch.rand(*shape, 3, generator=generator) for shape in ((3, 8, 9), (16, 17)))
    fit = functools.partial(bg.StencilCholesky.from_samples, stationary=True)
    square = bg.Stencil.square(3)
    for colour in (images, image):
        *_, height, width, _ = colour.shape
        expected = (
            rf"has shape {re.escape(str(tuple(colour.shape)))}, of which \({width}, 3\) is taken for the grid. "
            rf".* take the grid \({height}, {width}, 3\), with a stencil of 3 axes"
        )
        with pytest.warns(UserWarning, match=rf"^samples {expected}") as caught:
            fit(colour, square)
        assert "as in samples.movedim(-1, -3): independent fields" in str(caught[0].message)
        with pytest.warns(UserWarning, match=rf"^fields {expected}"):
            bg.diagnostics.autocorrelation(colour, 1)
    with pytest.warns(UserWarning, match=r"of which \(3,\) is taken for the grid"):
        fit(images[0], bg.Stencil([1]))
    # The two ways out: channels first, and a grid of three axes.
    fit(images.movedim(-1, -3), square)
    fit(image.movedim(-1, -3), square)
    fit(images, bg.Stencil.box((1, 1, 2)))
    fit(image[None], bg.Stencil.box((1, 1, 2)))
    bg.diagnostics.autocorrelation(images, 1, ndim=3)
    # As likely many samples of a small grid.
    fit(images[0], square)
    fit(image[0], bg.Stencil([1]))
