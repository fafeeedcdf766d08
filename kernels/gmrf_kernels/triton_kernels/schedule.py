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

# Sites of a thread, for one sample and for several. One: a load of 16 bytes of float32 or float64 coefficients, so that two
# loads in flight of each of a thousand threads cover the latency of the memory; 4 bytes of 16-bit coefficients, because
# neighbours' values, which a thread loads one by one, keep the L1 cache the busier the further apart the threads' sites are.
# Several: as many as leave room for the sums.
_SITES_PER_THREAD = {torch.float16: (2, 1), torch.bfloat16: (2, 1), torch.float32: (4, 2), torch.float64: (2, 1)}

# Samples whose sums a thread of `gather` holds at once: with f = 7 they take at most 80 registers.
_SAMPLES = 4

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
        group: offsets that a program of `outer` takes at once.
        warps: of the program.
        count: tiles that cover the grid.
        sample_blocks: programs of `gather` for one tile.
        parts: of a likelihood, one from each tile, that are added at once.
    """

    rows: int
    columns: int
    samples: int
    group: int
    warps: int
    count: int
    sample_blocks: int
    parts: int


@functools.cache
def tile(grid: tuple[int, ...], samples: int, dtype: torch.dtype) -> Tile:
    """The tile for a grid and coefficients of ``dtype``. Strides have no part in it: they must not change a sum's order."""
    several = samples > 1
    per_thread = _SITES_PER_THREAD[dtype][several]
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
    return Tile(
        rows=rows,
        columns=columns,
        samples=taken,
        group=_GROUP,
        warps=max(1, rows * columns // (32 * per_thread)),
        count=count,
        sample_blocks=triton.cdiv(samples, taken),
        parts=min(_PARTS, triton.next_power_of_2(count)),
    )


# --- Wavefronts (solve.py) ---

_LANES = 32


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
    """

    sites: int
    lanes: int
    items: int
    row_lanes: int
    band: int
    steps_per_flag: int


@functools.cache
def wavefronts(
    offsets: Offsets, grid: tuple[int, int, int], items: int, dtype: torch.dtype, vector_dtype: torch.dtype
) -> Wavefronts:
    """How `solve` goes about a stencil, a grid (D, H, W) and as many pairs of an image and a sample."""
    depth, height, width = grid
    sites = 4
    order = plan(offsets, sites, one_plane=False)
    row_lanes = min(height, -(-(-(-width // sites) + order.idle) // order.slopes[1]))
    if depth * row_lanes <= _LANES:
        return Wavefronts(sites, _LANES, _LANES // (depth * row_lanes), row_lanes, 0, 0)
    band = triton.cdiv(height, triton.cdiv(height, _LANES))
    return Wavefronts(sites, _LANES, _LANES // band, band, band, 8)
