"""Triangular solves in Triton's interpreter; `test_triton_interpreter` runs this file in a process of its own."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from gmrf_kernels.triton_kernels import schedule
from gmrf_kernels.triton_kernels.geometry import grid3, offsets3
from gmrf_kernels.triton_kernels.wavefronts import plan
from tests.cases import STENCILS
from tests.gmrf_kernels.operators import (
    OFFSETS,
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

NAMES = ["solve", "solve transposed"]
SOLVE = sys.modules["gmrf_kernels.triton_kernels.solve"]
# The youngest block that a band reads is older than a step.
FAR_ROWS = {"far rows": ((1, 5), (3, -1)), "gap row": ((0, 1), (2, 0)), "two rows down": ((2, 0), (2, 1))}
ALL = {**OFFSETS, **{name: STENCILS[name].offsets for name in ("next row only", "cross")}, **FAR_ROWS}

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")


@pytest.fixture(autouse=True)
def full_programs(monkeypatch):
    """As many items in a program as fit, as if there were enough of them to keep a GPU at work: it takes less time here."""
    monkeypatch.setattr(schedule, "_WARPS_AT_WORK", 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stencil", "grid"),
    [
        ("far line", (9,)),
        ("far line", (16,)),  # whole blocks
        ("diagonal", (6, 1)),
        ("diagonal", (1, 1)),
        ("3x3", (7, 5)),  # more rows than a lane's turn
        ("5x5", (3, 6)),
        ("skewed", (5, 7)),
        ("next row only", (3, 6)),
        ("cross", (4, 5)),
        ("far rows", (5, 7)),
        ("volume", (3, 4, 5)),
    ],
)
def test_values(name, stencil, grid):
    assert_dense(name, ALL[stencil], grid, samples=2, batch=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "grid"), [(torch.float16, (3, 3)), (torch.bfloat16, (2, 16))])
def test_sixteen_bit_coefficients(name, dtype, grid):
    assert_dense(name, OFFSETS["3x3"], grid, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    assert_dense(name, OFFSETS["3x3"], (2, 8), dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_logarithm_of_the_diagonal(name):
    assert_dense(f"{name} log", OFFSETS["3x3"], (3, 5))


def change(monkeypatch, **fields):
    """Let the schedule choose what it chooses, but for these fields."""
    choose = schedule.wavefronts
    monkeypatch.setattr(schedule, "wavefronts", lambda *args: dataclasses.replace(choose(*args), **fields))


@pytest.mark.parametrize("name", NAMES)
def test_several_items_in_a_program(name, monkeypatch):
    """Samples and images, of which the last program has fewer than fit."""
    change(monkeypatch, items=5)
    assert_dense(name, OFFSETS["3x3"], (3, 4), samples=4, batch=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stencil", "grid", "band"),
    [
        ("far line", (5,), 1),
        ("3x3", (5, 4), 2),
        ("5x5", (4, 3), 1),  # the stencil reaches beyond the band before
        ("5x5", (4, 4), 3),
        ("skewed", (5, 7), 2),
        ("far rows", (5, 3), 1),
        ("gap row", (4, 6), 2),
        ("two rows down", (5, 6), 2),
        ("volume", (3, 3, 2), 2),
    ],
)
def test_bands(name, stencil, grid, band, monkeypatch):
    """Programs run one after the other here, as the order of their tickets allows."""
    expected = call(name, args := arguments(name, ALL[stencil], grid, samples=1, batch=2))
    change(monkeypatch, band=band, row_lanes=band, items=2, steps_per_flag=3)
    with monkeypatch.context() as patched:
        read = watch_bands(patched)
        results = call(name, args)
    assert_same(results, expected)
    assert_waited_for(read, results[0], ALL[stencil], grid, transpose="transposed" in name)


def watch_bands(patched):
    """Let each band see no more than what it has waited for; returns a list, to be filled with (addresses of blocks that a
    band reads of others, the step before which all that it has waited for is done)."""
    read, done = [], [-math.inf]
    bands_read, load = SOLVE._bands_read, SOLVE._load

    def begin(*args):
        done[0] = -math.inf
        return bands_read(*args)

    def wait(seen, needed, *_):
        if not seen < needed:
            return seen
        done[0] = getattr(needed, "handle", SimpleNamespace(data=needed)).data
        return needed

    def record(pointers, *args):
        *_, shared = args
        if shared:
            lanes = args[3].handle.data
            read.append((pointers.handle.data[lanes], done[0]))
        return load(pointers, *args)

    for function in (begin, wait, record):
        place = {"begin": "_bands_read", "wait": "_wait", "record": "_load"}[function.__name__]
        patched.setattr(SOLVE, place, function)
    return read


def assert_waited_for(read, x, offsets, grid, transpose):
    """Each block that was read had been solved in a step that its reader had waited for."""
    depth, height, width = grid3(grid)
    sites = schedule.wavefronts(offsets3(offsets), (depth, height, width), 2, x.dtype).sites
    slopes = plan(offsets3(offsets), sites, one_plane=True).slopes
    for addresses, done in read:
        first = (addresses.astype(int) - x.data_ptr()) // x.itemsize % (depth * height * width)
        plane, row, block = first // width // height, first // width % height, first % width // sites
        if transpose:
            plane, row, block = depth - 1 - plane, height - 1 - row, -(-width // sites) - 1 - block
        assert (slopes[0] * plane + slopes[1] * row + block < done).all()
    assert sum(len(addresses) for addresses, _ in read) > 0 or height == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sites", [1, 8])
def test_blocks_of_other_sizes(name, sites, monkeypatch):
    change(monkeypatch, sites=sites, band=2, row_lanes=2, items=2, steps_per_flag=4)
    assert_dense(name, OFFSETS["skewed"], (3, 6), samples=1)


@pytest.mark.parametrize("name", NAMES)
def test_offsets_inside_a_grid_in_64_bits(name, monkeypatch):
    args = arguments(name, OFFSETS["volume"], (2, 2, 5))
    expected = call(name, args)
    monkeypatch.setattr(SOLVE, "spans_32_bits", lambda *tensors, ndim: True)
    assert_same(call(name, args), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layout", "stencil", "grid"), [(strided, "3x3", (2, 4)), (strided, "volume", (2, 1, 3)), (sliced, "3x3", (2, 4))]
)
def test_strides(name, layout, stencil, grid):
    args = arguments(name, OFFSETS[stencil], grid)
    assert_same(call(name, with_tensors(args, [layout(t) for t in tensors(args)])), call(name, args))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_expanded_arguments(name, axis):
    args = arguments(name, OFFSETS["3x3"], (2, 3), samples=2, batch=3, nan_outside=False)
    assert_same_when_expanded(name, args, axis)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # NumPy says so
@pytest.mark.parametrize("name", NAMES)
def test_a_solution_that_overflows_stays_in_its_image(name, monkeypatch):
    """Lanes of several images pass values to each other: what is infinite in one must not reach another."""
    change(monkeypatch, items=3)
    args = arguments(name, OFFSETS["3x3"], (4, 2), samples=1, batch=3)
    expected = call(name, args)[0]
    args[0][1] = 1e-300
    (actual,) = call(name, args)
    assert not actual[:, 1].isfinite().all()
    assert_same([actual[:, ::2]], [expected[:, ::2]])
