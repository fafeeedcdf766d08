"""What each kernel is launched with, by the size of the problem: the one place where speed is chosen.

No GPU was to be had when these numbers were written: they follow from bytes in flight and from the registers that the compiler
reports, and the times are not measured.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton

from ..stencils import Offsets
from .wavefronts import plan

# --- Tiles of the kernels without recursion (gather.py, outer.py) ---

# (sites of a thread that has no blocks, coefficients of each that it loads before it needs the first), for one sample and for
# several. One: with 64 registers a multiprocessor holds a thousand threads, and 64 bytes under way in each are 64 KiB, where
# the memory of an H100 delivers 25 KB to each multiprocessor in a microsecond. Two sites rather than four, because neighbours'
# values, which such a thread loads one by one, keep the L1 cache the busier the further apart the threads' sites are.
# Several: the loads of samples are many times those of coefficients, and their sums need the registers.
_SITES_AND_AHEAD = {
    torch.float16: ((2, 16), (1, 8)),
    torch.bfloat16: ((2, 16), (1, 8)),
    torch.float32: ((2, 8), (2, 4)),
    torch.float64: ((2, 4), (1, 4)),
}

# Samples whose sums a thread of `gather` holds at once; fewer where samples times offsets were more than this, for which the
# kernel takes more than ten seconds to compile.
_SAMPLES = 4
_MOST_SAMPLES_TIMES_OFFSETS = 96

# Stencils of more offsets have no blocks: the compiler, which loads as early as it can, would spill registers.
_MOST_OFFSETS_IN_BLOCKS = 40

# Threads of a program: eight programs fill the 2048 threads of a multiprocessor.
_MOST_WARPS = 8

# Sums that `outer` holds at once: b is loaded once for so many offsets.
_GROUP = 8

# Parts of a likelihood that are added at once, if there are so many tiles.
_PARTS = 1024

# Narrower tiles would only be more kernels to compile.
_LEAST_COLUMNS = 8

# What a program costs beyond its sites, in sites: it decides between many small tiles that fit and few large ones that do not.
_PROGRAM_SITES = 128


@dataclass(frozen=True)
class Tile:
    """Sites and samples of one program of `gather` and `outer`.

    Args:
        rows, columns: of sites, powers of two.
        samples: that a program of `gather` takes at once.
        ahead: coefficients of each site that a program of `gather` loads before it needs the first.
        group: offsets that a program of `outer` takes at once.
        sites: of a block, where the tensors stand in aligned blocks, of which a thread has one.
        sites_one_by_one: of a thread where they do not.
        count: tiles that cover the grid.
        sample_blocks: programs of `gather` for one tile.
        parts: of a likelihood, one from each tile, that are added at once.
    """

    rows: int
    columns: int
    samples: int
    ahead: int
    group: int
    sites: int
    sites_one_by_one: int
    count: int
    sample_blocks: int
    parts: int

    def warps(self, sites: int) -> int:
        """Warps of a program, for blocks of so many sites."""
        return max(1, self.rows * self.columns // (32 * (sites if sites > 1 else self.sites_one_by_one)))


@functools.cache
def tile(grid: tuple[int, ...], samples: int, offsets: int, dtype: torch.dtype) -> Tile:
    """The tile for a grid, so many samples and offsets, and coefficients of ``dtype``.

    Strides have no part in it: they must not change a sum's order.
    """
    several = samples > 1
    per_thread, ahead = _SITES_AND_AHEAD[dtype][several]
    most = _MOST_WARPS * 32 * per_thread
    total_rows, total_columns = math.prod(grid[:-1]), grid[-1]

    def shape(columns):
        """Rows, columns, and the number of tiles."""
        rows = min(triton.next_power_of_2(total_rows), most // columns)
        return rows, columns, triton.cdiv(total_rows, rows) * triton.cdiv(total_columns, columns)

    def cost(shape):
        rows, columns, count = shape
        return count * (rows * columns + _PROGRAM_SITES), abs(columns - 64)

    widest = min(max(_LEAST_COLUMNS, triton.next_power_of_2(total_columns)), most)
    shapes = [shape(1 << i) for i in range(widest.bit_length()) if 1 << i >= min(32, widest)]
    rows, columns, count = min(shapes, key=cost)
    taken = _SAMPLES if several else 1
    while taken > 1 and taken * offsets > _MOST_SAMPLES_TIMES_OFFSETS:
        taken //= 2
    return Tile(
        rows=rows,
        columns=columns,
        samples=taken,
        ahead=ahead,
        group=_GROUP,
        sites=_VECTOR_BYTES // max(4, dtype.itemsize) if offsets <= _MOST_OFFSETS_IN_BLOCKS else 1,
        sites_one_by_one=per_thread,
        count=count,
        sample_blocks=triton.cdiv(samples, taken),
        parts=min(_PARTS, triton.next_power_of_2(count)),
    )


# --- Wavefronts (solve.py) ---

# Stages of a loop whose loads are copied asynchronously into shared memory, and in bands, whose steps take longer; what the
# copies of a program may take of it; and the fewest bytes that are copied so.
_STAGES = 4
_STAGES_IN_BANDS = 3
_COPIED_BYTES = 72 * 1024
_COPY_BYTES = 4

# Bytes of coefficients that a lane copies by one load of several offsets. With a load for each the compiler takes ten times as
# long; it schedules larger ones worse.
_GROUP_BYTES = 128

# Lanes of a program: one warp, whose lanes pass values to each other by shuffles.
_LANES = 32

# Bytes of coefficients of one offset that a lane loads at once: the widest load there is.
_VECTOR_BYTES = 16

# 32-bit registers for a lane's coefficients of a step, its windows, and four more values for each site of a block. With this
# many the compiler finds room for the rest in the 255 of a thread; 16-bit coefficients loaded one by one need more of a rest.
_WAVEFRONT_REGISTERS = 180
_WAVEFRONT_REGISTERS_ONE_BY_ONE = 150

# Warps that can issue at once on the 132 multiprocessors of an H100: with fewer programs than that, items are not put together.
_WARPS_AT_WORK = 4 * 132

# A flag costs its band a write to the L2 cache and the wait for it; each step between flags keeps the next band a step behind,
# where a band of 32 rows begins 64 steps or so after the one before anyway.
_STEPS_PER_FLAG = 8


@dataclass(frozen=True)
class Wavefronts:
    """Work of one program of `solve`.

    Args:
        sites: of a block, which a lane solves in a step.
        lanes: of a program.
        items: pairs of an image and a sample that a program solves at once.
        row_lanes: lanes for the rows of one plane of an item.
        band: rows of a band; 0 where a program solves all rows of its items.
        steps_per_flag: steps of a band between two flags.
        stages: of the loop over steps, where its loads can be copied asynchronously; 1 where they are not.
        group: offsets whose coefficients are copied by one load.
    """

    sites: int
    lanes: int
    items: int
    row_lanes: int
    band: int
    steps_per_flag: int
    stages: int
    group: int


@functools.cache
def wavefronts(offsets: Offsets, grid: tuple[int, int, int], items: int, dtype: torch.dtype) -> Wavefronts:
    """How to solve for offsets of three components, a grid (D, H, W), so many pairs of an image and a sample, and coefficients
    of ``dtype``."""
    depth, height, width = grid
    sites = _block_sites(offsets, width, dtype)
    order = plan(offsets, sites, one_plane=False)
    # A lane may begin another row when it has paused for so long that nothing of the two rows can meet.
    row_lanes = min(height, triton.cdiv(triton.cdiv(width, sites) + order.idle, order.slopes[1]))
    band = 0
    if depth * row_lanes > _LANES:
        band = row_lanes = triton.cdiv(height, triton.cdiv(height, _LANES))
    fit = _LANES // (row_lanes if band else depth * row_lanes)
    taken = min(fit, max(1, items // _WARPS_AT_WORK))
    stages = _stages(len(offsets), sites, dtype, band)
    group = max(1, _GROUP_BYTES // (sites * dtype.itemsize))
    steps_per_flag = _STEPS_PER_FLAG if band else 0
    return Wavefronts(sites, _LANES, taken, row_lanes, band, steps_per_flag, stages, group)


def _stages(offsets: int, sites: int, dtype: torch.dtype, band: int) -> int:
    """Stages of the loop: one where loads are too small to be copied, or what is copied would need too much shared memory."""
    stages = _STAGES_IN_BANDS if band else _STAGES
    step = _LANES * sites * (offsets * dtype.itemsize + 2 * max(4, dtype.itemsize))
    # One stage computes, all others copy.
    return stages if sites * dtype.itemsize >= _COPY_BYTES and (stages - 1) * step <= _COPIED_BYTES else 1


def _block_sites(offsets: Offsets, width: int, dtype: torch.dtype) -> int:
    """Sites of a block: as many as a load of coefficients brings, unless they need too many registers or the row has fewer."""
    sites = min(_VECTOR_BYTES // dtype.itemsize, triton.next_power_of_2(width))
    while sites > 1 and not _fits(offsets, width, dtype, sites):
        sites //= 2
    return sites


def _fits(offsets: Offsets, width: int, dtype: torch.dtype, sites: int) -> bool:
    words = 2 if dtype == torch.float64 else 1
    one_by_one = dtype.itemsize == 2 and width % sites > 0
    limit = _WAVEFRONT_REGISTERS_ONE_BY_ONE if one_by_one else _WAVEFRONT_REGISTERS
    return words * sites * (plan(offsets, sites, one_plane=False).blocks_kept + len(offsets) + 4) <= limit
