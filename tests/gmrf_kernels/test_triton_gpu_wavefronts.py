"""What only a GPU shows of the triangular solves: bands of rows that run at the same time and wait for each other."""

import dataclasses

import pytest
import torch

from gmrf_kernels.checks import accumulate_dtype
from tests.cases import STENCILS
from tests.emulation import DEVICE as CUDA
from tests.emulation import RESIDENT, sized
from tests.gmrf_kernels.operators import TOLERANCE, arguments, assert_same, call, operator

pytest.importorskip("triton")

from gmrf_kernels.triton_kernels import schedule

pytestmark = pytest.mark.gpu

NAMES = ["solve", "solve transposed"]

# No GPU of today holds as many programs at once: 32 on each of its multiprocessors, of which there are fewer than 256.
MORE_THAN_FIT = sized(32 * 256, RESIDENT)


SIZES = sized(
    [((64, 64), 2048), ((1024, 1024), 2), ((1023, 1025), 1), ((64, 64), 1)],
    [((16, 16), 5), ((96, 128), 2), ((67, 301), 1), ((16, 16), 1)],
)


def random(name, offsets, grid, samples, batch, dtype=torch.float32):
    return arguments(name, offsets, grid, samples, batch, dtype, CUDA, nan_outside=False)


def large(name, offsets, grid, batch):
    """Arguments drawn on the GPU, with factors so close to the identity that no solution grows."""
    diag = 1 + torch.rand(batch, *grid, device=CUDA)
    off_diag = torch.empty(batch, len(offsets), *grid, device=CUDA).uniform_(-0.5, 0.5) / len(offsets)
    b = torch.randn(1, batch, *grid, device=CUDA)
    return [diag, off_diag, b, [component for offset in offsets for component in offset], name == "solve transposed", False]


def assert_solves(args, x):
    """L x = b, or Lᵀx = b, up to roundings."""
    diag, off_diag, b, flat, transpose, log = args
    product = operator("matvec")(diag, off_diag, x, flat, transpose, log)
    tolerance = TOLERANCE[accumulate_dtype(off_diag.dtype)]
    torch.testing.assert_close(product, b, rtol=tolerance, atol=10 * tolerance)


@pytest.fixture
def bands(monkeypatch):
    """A function that cuts every image into bands of so many rows, with a flag every so many steps."""
    choose = schedule.wavefronts

    def cut(rows, steps):
        def bands_of_rows(*args):
            return dataclasses.replace(choose(*args), band=rows, row_lanes=rows, items=1, steps_per_flag=steps)

        monkeypatch.setattr(schedule, "wavefronts", bands_of_rows)

    return cut


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 8])
def test_more_bands_than_the_gpu_holds(name, steps, bands):
    """Bands of one row: 40 000 programs, each of which waits for the one before it, and none for ever."""
    args = large(name, STENCILS["5x5"].offsets, (sized(2500, 40), 70), sized(16, 2))
    assert args[2].numel() // 70 > 4 * MORE_THAN_FIT
    expected = call(name, args)
    bands(1, steps)
    for _ in range(sized(3, 1)):
        assert_same(call(name, args), expected)
    assert_solves(args, expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_one_image_with_more_bands_than_the_gpu_holds(name, bands):
    args = large(name, STENCILS["3x3"].offsets, (MORE_THAN_FIT + 1, 9), 1)
    expected = call(name, args)
    bands(1, 4)
    assert_same(call(name, args), expected)
    assert_solves(args, expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("stencil", "grid"),
    [("5x5", (41, 67)), ("5x5", (64, 128)), ("skewed", (37, 50)), ("cross", (33, 33)), ("bands of a box", (5, 19, 24))],
)
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 5), (32, 8)])
def test_bands_give_the_same_bits(name, dtype, stencil, grid, rows, steps, bands):
    args = random(name, STENCILS[stencil].offsets, grid, samples=2, batch=3, dtype=dtype)
    bands(32, 64)
    expected = call(name, args)
    assert_solves(args, expected[0])
    bands(rows, steps)
    for _ in range(sized(5, 1)):
        assert_same(call(name, args), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stencil", ["3x3", "5x5"])
@pytest.mark.parametrize(("grid", "batch"), SIZES)
def test_sizes_of_images(name, stencil, grid, batch):
    args = large(name, STENCILS[stencil].offsets, grid, batch)
    assert_solves(args, call(name, args)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_volume(name):
    args = large(name, STENCILS["bands of a box"].offsets, sized((48, 64, 64), (3, 9, 16)), 1)
    assert_solves(args, call(name, args)[0])


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_one_factor_have_the_bits_of_each_alone(name):
    """One program takes several samples, or one of many images, and neither shows in the result."""
    args = random(name, STENCILS["5x5"].offsets, (33, 40), samples=sized(1000, 6), batch=2)
    (together,) = call(name, args)
    for i in sized((0, 500, 999), (0, 3, 5)):
        alone = [*args[:2], args[2][i : i + 1].contiguous(), *args[3:]]
        assert_same([together[i : i + 1]], call(name, alone))
