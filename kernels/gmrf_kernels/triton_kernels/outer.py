"""The stencil's entries of a bᵀ, summed over samples, and the likelihood's gradient for a factor, which is such a sum.

A program owns a tile of sites of one image. It takes the offsets in groups of GROUP: for each sample it loads the tile of b
once and the blocks of a in which the group's neighbours lie (`tiles`), which come through the L1 cache, and keeps the sums in
registers, in the order of the samples; then it writes the group's entries, each once, in vectors of 16 bytes where alignment
allows it. No coefficient is read.

Bytes moved through memory for N sites in all images, S samples, coefficients of c bytes and values of v bytes: (K-1)·c·N of the
off-diagonals and v·N of the diagonal, written; a and b, 2·v·S·N; for the likelihood log_diag, v·N.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stencils import Offsets
from . import schedule
from .exponential import exp
from .geometry import grid3, offsets3, on_device_of, spans_32_bits, strides3
from .tiles import distance, has_block, has_row, load_block, reads, sites_of_blocks, store_block, tile_of


def outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P(a bᵀ), summed over the S vectors: its diagonal (B, *grid) and off-diagonals (B, K-1, *grid) in ``dtype``."""
    return _launch(a, b, None, None, offsets, dtype)


def nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(scale * value).sum()``, ``scale`` (S, B), for ``log_diag`` and, in ``dtype``, ``off_diag``."""
    return _launch(residual, whitened, scale.contiguous(), log_diag, offsets, dtype)


def _launch(
    a: Tensor, b: Tensor, scale: Tensor | None, log_diag: Tensor | None, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    samples, batch, *grid = a.shape
    ndim = len(grid)
    diag = a.new_empty((batch, *grid))
    off_diag = a.new_empty((batch, len(offsets), *grid), dtype=dtype)
    if batch == 0:
        return diag, off_diag
    tile = schedule.tile(tuple(grid), samples, len(offsets), dtype)
    like_diag = diag if log_diag is None else log_diag
    sites = sites_of_blocks(tile.sites, grid[-1], a, b, like_diag)
    offsets = offsets3(offsets)
    read = [reads(offsets[first : first + tile.group], sites) for first in range(0, len(offsets), tile.group)]
    with on_device_of(a):
        _outer[(batch * tile.count,)](
            *(a, a.stride(0), a.stride(1), *strides3(a, ndim)),
            *(b, b.stride(0), b.stride(1), *strides3(b, ndim)),
            scale,
            *(log_diag, like_diag.stride(0), *strides3(like_diag, ndim)),
            *(diag, off_diag),
            *(samples, batch, *grid3(grid), math.prod(grid)),
            OFFSETS=offsets,
            GROUP=tile.group,
            BLOCKS=tuple(block for r in read for block in r.blocks),
            UNTIL=tuple(itertools.accumulate((len(r.blocks) for r in read), initial=0)),
            VALUES=tuple(values for r in read for values in r.values),
            ROWS=tile.rows,
            COLS=tile.columns,
            V=sites,
            ONE_PLANE=math.prod(grid[:-2]) == 1,
            INDEX=tl.int64 if spans_32_bits(a, b, like_diag, diag, ndim=ndim) else tl.int32,
            num_warps=tile.warps(sites),
        )
    return diag, off_diag


@triton.jit(do_not_specialize=["B", "D", "H"])
def _outer(
    a_ptr,  # (S, B, D, H, W)
    a_s: tl.int64,
    a_b: tl.int64,
    a_d,
    a_h,
    a_w,
    b_ptr,  # (S, B, D, H, W)
    b_s: tl.int64,
    b_b: tl.int64,
    b_d,
    b_h,
    b_w,
    scale_ptr,  # (S, B), contiguous, for the likelihood's gradient; None for the sum alone
    log_diag_ptr,  # (B, D, H, W), likewise
    log_diag_b: tl.int64,
    log_diag_d,
    log_diag_h,
    log_diag_w,
    diag_ptr,  # (B, D, H, W), contiguous
    off_ptr,  # (B, K-1, D, H, W), contiguous
    S,
    B,
    D,
    H,
    W,
    n: tl.int64,
    OFFSETS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,  # `Reads` of the groups of offsets, one after the other
    UNTIL: tl.constexpr,  # how many blocks the groups before each read
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    V: tl.constexpr,  # sites of a block
    ONE_PLANE: tl.constexpr,  # D is 1
    INDEX: tl.constexpr,
):
    tiles = tl.cdiv(D * H, ROWS) * tl.cdiv(W, COLS)
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    plane, row, column = tile_of(tile, H, W, ROWS, COLS, V, ONE_PLANE, INDEX)
    exists = has_row(plane, row, D, H, 0, 0, ONE_PLANE) & has_block(column, W, 0)  # (ROWS, COLS // V)
    sites = (plane * H + row) * W + column
    a_sites = a_ptr + image * a_b + (plane * a_d + row * a_h + column * a_w)
    b_sites = b_ptr + image * b_b + (plane * b_d + row * b_h + column * b_w)
    dtype = diag_ptr.dtype.element_ty

    diag = _zeros(V, (ROWS, COLS // V), dtype)
    total = tl.full((), 0.0, dtype)
    for s in range(S):
        a = load_block(a_sites + s * a_s, exists, V)
        b = _load_scaled(b_sites + s * b_s, scale_ptr, s, B, image, exists, V)
        products = ()
        for j in tl.static_range(V):
            products += (tl.fma(a[j], b[j], diag[j]),)
        diag = products
        if scale_ptr is not None:
            total += tl.load(scale_ptr + tl.cast(s, tl.int64) * B + image)
    if scale_ptr is not None:
        log_diag_sites = log_diag_ptr + image * log_diag_b + (plane * log_diag_d + row * log_diag_h + column * log_diag_w)
        log_diag = load_block(log_diag_sites, exists, V)
        gradient = ()
        for j in tl.static_range(V):
            gradient += (diag[j] * exp(log_diag[j]) - total,)
        diag = gradient
    store_block(diag_ptr + image * n + sites, diag, exists, V)

    entries = off_ptr + image * len(OFFSETS) * n + sites
    for first in tl.static_range(0, len(OFFSETS), GROUP):
        sums = _zeros(min(GROUP, len(OFFSETS) - first) * V, (ROWS, COLS // V), dtype)
        for s in range(S):
            b = _load_scaled(b_sites + s * b_s, scale_ptr, s, B, image, exists, V)
            values = ()
            for m in tl.static_range(tl.constexpr(UNTIL[first // GROUP]), tl.constexpr(UNTIL[first // GROUP + 1])):
                there = a_sites + s * a_s + distance(a_d, a_h, a_w, BLOCKS[m][0], BLOCKS[m][1], BLOCKS[m][2] * V)
                row_has = has_row(plane, row, D, H, BLOCKS[m][0], BLOCKS[m][1], ONE_PLANE)
                values += load_block(there, row_has & has_block(column, W, BLOCKS[m][2] * V), V)
            more = ()
            for i in tl.static_range(min(GROUP, len(OFFSETS) - first)):
                for j in tl.static_range(V):
                    more += (tl.fma(values[VALUES[first + i][j]], b[j], sums[i * V + j]),)
            sums = more
        for i in tl.static_range(min(GROUP, len(OFFSETS) - first)):
            row_has = has_row(plane, row, D, H, OFFSETS[first + i][0], OFFSETS[first + i][1], ONE_PLANE)
            entry = ()
            for j in tl.static_range(V):
                has = row_has & has_block(column, W, (OFFSETS[first + i][2] + j) // V * V)
                entry += (tl.where(has, sums[i * V + j], 0.0).to(off_ptr.dtype.element_ty),)
            store_block(entries, entry, exists, V)
            entries += n


@triton.jit
def _load_scaled(first, scale_ptr, s, B, image, exists, V: tl.constexpr):
    """A block of b, for the likelihood's gradient times the scale of its sample and image."""
    b = load_block(first, exists, V)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + tl.cast(s, tl.int64) * B + image)
        scaled = ()
        for j in tl.static_range(V):
            scaled += (scale * b[j],)
        b = scaled
    return b


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr):
    """So many tensors of zeros."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros(SHAPE, dtype),)
    return zeros
