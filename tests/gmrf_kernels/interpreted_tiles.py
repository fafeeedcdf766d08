"""Kernels without recursion in Triton's interpreter; `test_triton_interpreter` runs this file in a process of its own."""

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl

from gmrf_kernels.triton_kernels import geometry, schedule, tiles
from gmrf_kernels.triton_kernels.exponential import exp, exp_in_factors
from tests.cases import GRIDS
from tests.gmrf_kernels.operators import (
    HALF,
    NDIM,
    OFFSETS,
    OPERATORS,
    arguments,
    assert_dense,
    assert_same,
    assert_same_when_expanded,
    call,
    sliced,
    strided,
    tensors,
    with_tensors,
)

NAMES = [name for name in OPERATORS if not name.startswith("solve")]

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stencil", OFFSETS)
def test_values(name, stencil):
    odd, one, *_ = GRIDS[NDIM[stencil]]
    assert_dense(name, OFFSETS[stencil], odd, samples=1, batch=3)
    assert_dense(name, OFFSETS[stencil], one, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALF)
def test_sixteen_bit_coefficients(name, dtype):
    assert_dense(name, OFFSETS["3x3"], (5, 7), dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stencil", OFFSETS)
def test_blocks_of_sites(name, stencil):
    """Rows of whole blocks, of two sites in float64 and of four else."""
    grid = {1: (12,), 2: (5, 12), 3: (2, 3, 4)}[NDIM[stencil]]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert_dense(name, OFFSETS[stencil], grid, dtype=dtype)


def test_blocks_are_aligned_pieces_of_memory():
    t = torch.empty(2, 4, 8)
    assert tiles.sites_of_blocks(4, 8, t, None, t[:1].expand(2, 4, 8)) == 4
    assert tiles.sites_of_blocks(2, 6, t[..., 2:]) == 2
    assert tiles.sites_of_blocks(4, 6, t[..., :6]) == 1
    for other in (t[..., 1:5], t[..., 2:6], t.mT, t[..., ::2], torch.empty(2, 4, 9)[..., :8], t[..., :1].expand(2, 4, 8)):
        assert tiles.sites_of_blocks(4, 4, t, other) == 1


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles on each axis, a last block of samples that is not full, and a last group of offsets that is not either."""

    def tile(grid, samples, offsets, dtype):
        depth, height, width = geometry.grid3(grid)
        count = -(-depth * height // 2) * -(-width // 4)
        return schedule.Tile(
            rows=2,
            columns=4,
            samples=2,
            ahead=5,
            group=5,
            sites=2,
            sites_one_by_one=1,
            count=count,
            sample_blocks=-(-samples // 2),
            parts=2,
        )

    monkeypatch.setattr(schedule, "tile", tile)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stencil", "grid"), [("far line", (9,)), ("5x5", (3, 5)), ("5x5", (3, 6)), ("volume", (2, 2, 5)), ("volume", (2, 2, 6))]
)
def test_tiles_smaller_than_the_grid(name, stencil, grid, small_tiles):
    assert_dense(name, OFFSETS[stencil], grid, samples=3, batch=2)


@pytest.mark.parametrize("name", NAMES)
def test_offsets_inside_a_grid_in_64_bits(name, monkeypatch):
    args = arguments(name, OFFSETS["volume"], (2, 3, 5))
    expected = call(name, args)
    with monkeypatch.context() as patched:
        for module in ("gather", "outer"):
            module = importlib.import_module(f"gmrf_kernels.triton_kernels.{module}")
            patched.setattr(module, "spans_32_bits", lambda *tensors, ndim: True)
        assert_same(call(name, args), expected)


def test_a_grid_that_spans_32_bits():
    base = torch.empty(1, device="meta", dtype=torch.float16)
    below = base.expand(4, 3, 2**30).as_strided((4, 3, 2**30), (2**40, 2**30 - 1, 1))
    above = base.expand(4, 3, 2**30).as_strided((4, 3, 2**30), (2**40, 2**30, 1))
    assert not geometry.spans_32_bits(base.expand(7, 5), below[:, :2], ndim=2)
    assert geometry.spans_32_bits(base.expand(7, 5), above, ndim=2)
    assert geometry.spans_32_bits(below, ndim=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [strided, sliced])
@pytest.mark.parametrize(("stencil", "grid"), [("5x5", (3, 4)), ("volume", (2, 2, 3))])
def test_strides(name, layout, stencil, grid):
    args = arguments(name, OFFSETS[stencil], grid)
    assert_same(call(name, with_tensors(args, [layout(t) for t in tensors(args)])), call(name, args))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_expanded_arguments(name, axis):
    args = arguments(name, OFFSETS["3x3"], (3, 5), samples=4, batch=3, nan_outside=False)
    assert_same_when_expanded(name, args, axis)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("samples", "batch"), [(0, 2), (2, 0), (0, 0)])
def test_empty_batches_and_no_samples(name, samples, batch):
    assert_dense(name, OFFSETS["5x5"], (3, 4), samples=samples, batch=batch)


def test_more_tiles_than_are_added_at_once(small_tiles):
    assert_dense("nll", OFFSETS["far line"], (70,))


@triton.jit
def _exp_of(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, exp(tl.load(x_ptr + index)))


def exp_in_a_kernel(x):
    y = torch.empty_like(x)
    _exp_of[(1,)](x, y, SIZE=len(x))
    return y


@triton.jit
def _factors_of(x_ptr, first_ptr, second_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    first, second = exp_in_factors(tl.load(x_ptr + index))
    tl.store(first_ptr + index, first)
    tl.store(second_ptr + index, second)


def factors_in_a_kernel(x):
    first, second = torch.empty_like(x), torch.empty_like(x)
    _factors_of[(1,)](x, first, second, SIZE=len(x))
    return first, second


def test_the_exponential_in_two_factors():
    """Also where their product is no number of float32, and a quotient may still be one."""
    x = torch.linspace(-173, 176, 2**17)
    first, second = factors_in_a_kernel(x)
    assert (second.frexp().mantissa == 0.5).all()
    assert (first > torch.finfo(torch.float32).tiny).all()
    exact = x.double().exp()
    product = first.double() * second.double()
    assert ((product - exact).abs() / exact).max() < 1.25 * torch.finfo(torch.float32).eps


def test_the_two_factors_at_their_ends():
    first, second = factors_in_a_kernel(torch.tensor([math.inf, 1e30, -math.inf, -1e30, math.nan, 0.0, -0.0, 0.0]))
    product = first.double() * second.double()
    expected = torch.tensor([math.inf, math.inf, 0.0, 0.0, math.nan, 1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)


def test_the_exponential_in_float32_is_within_units_in_the_last_place():
    """For all x whose exponential is a number above 0, denormal numbers among them. Of the interpreter's fused operations the
    product is rounded, so that it is off by 1.13 units where a GPU is by 0.88."""
    x = torch.cat([torch.linspace(-104, 88.7228, 2**17), torch.linspace(-1, 1, 2**16), torch.randn(2**16) * 1e-4])
    exact = x.double().exp()
    unit = torch.finfo(torch.float32).eps * torch.exp2(exact.log2().floor().clamp(min=-126))
    assert ((exp_in_a_kernel(x).double() - exact).abs() / unit).max() < 1.25


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:underflow encountered")  # NumPy says so
@pytest.mark.parametrize(
    ("x", "exact"),
    [
        (0.0, 1.0),
        (88.73, math.inf),
        (1e30, math.inf),
        (math.inf, math.inf),
        (-104.0, 0.0),
        (-1e30, 0.0),
        (-math.inf, 0.0),
        (math.nan, math.nan),
    ],
)
def test_the_exponential_at_its_ends(x, exact):
    for dtype in (torch.float32, torch.float64):
        x_here = torch.full((2,), x, dtype=dtype)
        if dtype == torch.float32 or abs(x) not in (88.73, 104.0):
            torch.testing.assert_close(exp_in_a_kernel(x_here), torch.full_like(x_here, exact), rtol=0, atol=0, equal_nan=True)
