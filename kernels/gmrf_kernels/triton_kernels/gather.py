"""Products with L and Lᵀ, and the fused negative log likelihood: each site gathers from its neighbours.

A program owns a tile of sites of one image, for up to four samples, and a thread blocks of sites (`tiles`). It loads each
coefficient of its sites once, coalesced, in vectors where strides and alignment allow it, several offsets before it is
needed, and uses it for all its samples; blocks of neighbouring values of the samples come through the L1 cache, which they need
not share: coefficients are marked to be evicted first. More samples of a shared factor are programs with consecutive numbers,
which run at the same time and find the coefficients in the L2 cache: held in registers for all samples, they would leave no
room for the sums, and looping over the samples in one program would leave most of the GPU idle when there are few images.

Bytes moved through memory for N sites in all images, S samples, coefficients of c bytes and values of v bytes: (K-1)·c·N of the
off-diagonals, less the rows whose neighbour lies off the grid; the diagonal, v·N; the samples, v·S·N; the product, v·S·N.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stencils import Offsets
from . import schedule
from .exponential import exp
from .geometry import grid3, offsets3, on_device_of, spans_32_bits, strides3
from .tiles import (
    distance,
    has_block,
    has_row,
    load_block,
    reads,
    sites_of_blocks,
    stack,
    store_block,
    sum_by_pairs,
    sum_of_block,
    tile_of,
)


def matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L x, or Lᵀx with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(diag, off_diag, x, y, None, offsets, transpose, log)
    return y


def nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (S, B) in nats, and the whitened residual y = Lᵀ residual (S, B, *grid)."""
    samples, batch, *grid = residual.shape
    whitened = torch.empty_like(residual, memory_format=torch.contiguous_format)
    value = residual.new_empty((samples, batch))
    tile = schedule.tile(tuple(grid), samples, len(offsets), off_diag.dtype)
    partial = residual.new_empty((samples, batch, tile.count))
    _launch(log_diag, off_diag, residual, whitened, partial, offsets, transpose=True, log=True)
    if value.numel():
        with on_device_of(residual):
            _finish_nll[(samples * batch,)](
                *(value, partial, tile.count, math.prod(grid)), PARTS=tile.parts, num_warps=max(1, tile.parts // 256)
            )
    return value, whitened


def _launch(
    diag: Tensor, off_diag: Tensor, x: Tensor, y: Tensor, partial: Tensor | None, offsets: Offsets, transpose: bool, log: bool
) -> None:
    """Write the product to the contiguous ``y``, and where there is a ``partial`` each tile's part of the likelihood to it."""
    samples, batch, *grid = x.shape
    if x.numel() == 0:
        return
    ndim = len(grid)
    tile = schedule.tile(tuple(grid), samples, len(offsets), off_diag.dtype)
    sites = sites_of_blocks(tile.sites, grid[-1], diag, off_diag, x)
    neighbours = offsets3(offsets) if transpose else _backward(offsets)
    read = reads(neighbours, sites)
    with on_device_of(x):
        _gather[(batch * tile.count * tile.sample_blocks,)](
            *(diag, diag.stride(0), *strides3(diag, ndim)),
            *(off_diag, off_diag.stride(0), off_diag.stride(1), *strides3(off_diag, ndim)),
            *(x, x.stride(0), x.stride(1), *strides3(x, ndim)),
            *(y, partial),
            *(samples, batch, *grid3(grid)),
            NEIGHBOURS=neighbours,
            BLOCKS=read.blocks,
            UNTIL=read.until,
            VALUES=read.values,
            AT_NEIGHBOUR=not transpose,
            LOG=log,
            ROWS=tile.rows,
            COLS=tile.columns,
            V=sites,
            ONE_PLANE=math.prod(grid[:-2]) == 1,
            SAMPLES=tile.samples,
            AHEAD=tile.ahead,
            INDEX=tl.int64 if spans_32_bits(diag, off_diag, x, y, ndim=ndim) else tl.int32,
            num_warps=tile.warps(sites),
        )


@functools.cache
def _backward(offsets: Offsets) -> Offsets:
    """Where the neighbours lie that have a site as theirs."""
    return tuple(tuple(-component for component in offset) for offset in offsets3(offsets))


@triton.jit(do_not_specialize=["S", "B", "D", "H"])
def _gather(
    diag_ptr,  # (B, D, H, W): the diagonal, or its logarithm where LOG
    diag_b: tl.int64,
    diag_d,
    diag_h,
    diag_w,
    off_ptr,  # (B, K-1, D, H, W)
    off_b: tl.int64,
    off_k: tl.int64,
    off_d,
    off_h,
    off_w,
    x_ptr,  # (S, B, D, H, W)
    x_s: tl.int64,
    x_b: tl.int64,
    x_d,
    x_h,
    x_w,
    y_ptr,  # (S, B, D, H, W), contiguous
    partial_ptr,  # (S, B, tiles), contiguous; None for a product alone
    S,
    B,
    D,
    H,
    W,
    NEIGHBOURS: tl.constexpr,  # where the k-th neighbour of a site lies, (planes, rows, columns)
    BLOCKS: tl.constexpr,  # `Reads` of these
    UNTIL: tl.constexpr,
    VALUES: tl.constexpr,
    AT_NEIGHBOUR: tl.constexpr,  # the entry that meets it is stored there, not at the site
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    V: tl.constexpr,  # sites of a block
    ONE_PLANE: tl.constexpr,  # D is 1
    SAMPLES: tl.constexpr,
    AHEAD: tl.constexpr,  # coefficients of a site whose loads are under way before the first is needed
    INDEX: tl.constexpr,
):
    sample_blocks = tl.cdiv(S, SAMPLES)
    tiles = tl.cdiv(D * H, ROWS) * tl.cdiv(W, COLS)
    program = tl.program_id(0)
    sample = program % sample_blocks * SAMPLES
    tile = program // sample_blocks % tiles
    image = (program // sample_blocks // tiles).to(tl.int64)

    plane, row, column = tile_of(tile, H, W, ROWS, COLS, V, ONE_PLANE, INDEX)
    exists = has_row(plane, row, D, H, 0, 0, ONE_PLANE) & has_block(column, W, 0)  # (ROWS, COLS // V)
    diag_sites = plane * diag_d + row * diag_h + column * diag_w
    off_sites = plane * off_d + row * off_h + column * off_w
    x_sites = plane * x_d + row * x_h + column * x_w

    coefficients = off_ptr + image * off_b + off_sites
    place = (plane, row, column, D, H, W)
    strides = (off_d, off_h, off_w)
    entries = ()
    for k in tl.static_range(min(AHEAD, len(NEIGHBOURS))):
        entries += (_load_entries(coefficients + k * off_k, strides, place, NEIGHBOURS, k, AT_NEIGHBOUR, V, ONE_PLANE),)

    log_diag = load_block(diag_ptr + image * diag_b + diag_sites, exists, V)
    xs = _sample_pointers(x_ptr + image * x_b, x_s, sample, S, SAMPLES)
    values = ()  # of x: of each block, for each sample, V
    for i in tl.static_range(SAMPLES):
        values += load_block(xs[i] + x_sites, exists, V)
    diag = ()
    for j in tl.static_range(V):
        diag += (exp(log_diag[j]) if LOG else log_diag[j],)
    sums = ()  # for each sample V
    for i in tl.static_range(SAMPLES):
        for j in tl.static_range(V):
            sums += (diag[j] * values[i * V + j],)

    for k in tl.static_range(len(NEIGHBOURS)):
        if k + AHEAD < len(NEIGHBOURS):
            ahead = coefficients + (k + AHEAD) * off_k
            entries += (_load_entries(ahead, strides, place, NEIGHBOURS, k + AHEAD, AT_NEIGHBOUR, V, ONE_PLANE),)
        for n in tl.static_range(tl.constexpr(UNTIL[k - 1] if k > 0 else 1), tl.constexpr(UNTIL[k])):
            there = x_sites + distance(x_d, x_h, x_w, BLOCKS[n][0], BLOCKS[n][1], BLOCKS[n][2] * V)
            row_has = has_row(plane, row, D, H, BLOCKS[n][0], BLOCKS[n][1], ONE_PLANE)
            has = row_has & has_block(column, W, BLOCKS[n][2] * V)
            for i in tl.static_range(SAMPLES):
                values += load_block(xs[i] + there, has, V)
        entry = _of_sites(entries[k], column, W, NEIGHBOURS[k][2], AT_NEIGHBOUR, V)
        more = ()
        for i in tl.static_range(SAMPLES):
            for j in tl.static_range(V):
                x = values[(VALUES[k][j] // V * SAMPLES + i) * V + VALUES[k][j] % V]
                more += (tl.fma(entry[j].to(x.dtype), x, sums[i * V + j]),)
        sums = more

    n = tl.cast(D * H, tl.int64) * W
    y_sites = (plane * H + row) * W + column
    ys = _sample_pointers(y_ptr + image * n, B * n, sample, S, SAMPLES)
    for i in tl.static_range(SAMPLES):
        store_block(ys[i] + y_sites, sums[i * V : (i + 1) * V], exists, V)
    if partial_ptr is not None:
        parts = ()
        for i in tl.static_range(SAMPLES):
            of_sites = ()
            for j in tl.static_range(V):
                y = sums[i * V + j]
                of_sites += (tl.where(exists, tl.fma(0.5 * y, y, -log_diag[j]), 0.0),)
            parts += (sum_of_block(of_sites, V),)
        samples = sample + tl.arange(0, SAMPLES)
        partials = partial_ptr + (samples.to(tl.int64) * B + image) * tiles + tile
        tl.store(partials, sum_by_pairs(stack(parts, SAMPLES), ROWS * (COLS // V), SAMPLES), samples < S)


@triton.jit
def _load_entries(
    first,
    strides,
    place,
    NEIGHBOURS: tl.constexpr,
    K: tl.constexpr,
    AT_NEIGHBOUR: tl.constexpr,
    V: tl.constexpr,
    ONE_PLANE: tl.constexpr,
):
    """A coefficient of each site of a block, or with AT_NEIGHBOUR those in the blocks, one or two, of the sites' neighbours.

    0 where the row has no neighbours, or the block of neighbours does not exist.
    """
    plane, row, column, D, H, W = place
    row_has = has_row(plane, row, D, H, NEIGHBOURS[K][0], NEIGHBOURS[K][1], ONE_PLANE)
    if AT_NEIGHBOUR:
        FIRST: tl.constexpr = NEIGHBOURS[K][2] // V
        LAST: tl.constexpr = (NEIGHBOURS[K][2] + V - 1) // V
        entries = ()
        for block in tl.static_range(FIRST, LAST + 1):
            there = distance(strides[0], strides[1], strides[2], NEIGHBOURS[K][0], NEIGHBOURS[K][1], block * V)
            entries += load_block(first + there, row_has & has_block(column, W, block * V), V, ONCE=True)
        return entries
    else:
        # A mask by rows lets a thread load vectors, entries that do not exist among them.
        return load_block(first, row_has & has_block(column, W, 0), V, ONCE=True)


@triton.jit
def _of_sites(entries, column, W, COLUMNS: tl.constexpr, AT_NEIGHBOUR: tl.constexpr, V: tl.constexpr):
    """The coefficient of each site of a block, 0 where it does not exist."""
    sites = ()
    for j in tl.static_range(V):
        if AT_NEIGHBOUR:
            sites += (entries[j + COLUMNS % V],)
        elif (j + COLUMNS) // V == 0:
            sites += (entries[j],)
        else:
            # What is stored where no entry exists, NaN perhaps, is dropped.
            sites += (tl.where(has_block(column, W, (j + COLUMNS) // V * V), entries[j], 0.0),)
    return sites


@triton.jit
def _sample_pointers(pointer, stride, first, S, SAMPLES: tl.constexpr):
    """Where SAMPLES samples begin, from the first one on. A last block that is not full takes the last sample several times:
    the same values are written to the same place."""
    pointers = ()
    for i in tl.static_range(SAMPLES):
        pointers += (pointer + tl.minimum(first + i, S - 1).to(tl.int64) * stride,)
    return pointers


@triton.jit(do_not_specialize=["tiles", "n"])
def _finish_nll(value_ptr, partial_ptr, tiles, n: tl.int64, PARTS: tl.constexpr):
    """value (S, B) from the parts (S, B, tiles), in float64 and in the order of the tiles."""
    HALF_LOG_TWO_PI: tl.constexpr = 0.9189385332046727
    item = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((PARTS,), tl.float64)
    for first in range(0, tiles, PARTS):
        index = first + tl.arange(0, PARTS)
        sums += tl.load(partial_ptr + item * tiles + index, index < tiles, other=0.0).to(tl.float64)
    value = sum_by_pairs(sums, PARTS, 1) + n.to(tl.float64) * HALF_LOG_TWO_PI
    tl.store(value_ptr + item + tl.arange(0, 1), value.to(value_ptr.dtype.element_ty))
