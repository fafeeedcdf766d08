"""The stencil's entries of a bᵀ, summed over samples, and the likelihood's gradient for a factor, which is such a sum.

A program owns a tile of sites of one image. It takes the offsets in groups of GROUP: for each sample it loads the tile of b
once and the neighbours' values of a, which come through the L1 cache, for every offset of the group, and keeps the sums in
registers, in the order of the samples; then it writes the group's entries, each once, in vectors of 16 bytes where alignment
allows it. No coefficient is read.

Bytes moved through memory for N sites in all images, S samples, coefficients of c bytes and values of v bytes: (K-1)·c·N of the
off-diagonals and v·N of the diagonal, written; a and b, 2·v·S·N; for the likelihood log_diag, v·N.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stencils import Offsets
from . import schedule
from .exponential import exp
from .geometry import grid3, offsets3, on_device_of, spans_32_bits, strides3
from .tiles import distance, inside, tile_of


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
    tile = schedule.tile(tuple(grid), samples, dtype)
    like_diag = diag if log_diag is None else log_diag
    with on_device_of(a):
        _outer[(batch * tile.count,)](
            *(a, a.stride(0), a.stride(1), *strides3(a, ndim)),
            *(b, b.stride(0), b.stride(1), *strides3(b, ndim)),
            scale,
            *(log_diag, like_diag.stride(0), *strides3(like_diag, ndim)),
            *(diag, off_diag),
            *(samples, batch, *grid3(grid), math.prod(grid)),
            OFFSETS=offsets3(offsets),
            GROUP=tile.group,
            ROWS=tile.rows,
            COLS=tile.columns,
            INDEX=tl.int64 if spans_32_bits(a, b, like_diag, diag, ndim=ndim) else tl.int32,
            num_warps=tile.warps,
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INDEX: tl.constexpr,
):
    tiles = tl.cdiv(D * H, ROWS) * tl.cdiv(W, COLS)
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    plane, row, column = tile_of(tile, H, W, ROWS, COLS, INDEX)
    exists = (plane < D) & (column < W)  # (ROWS, COLS)
    sites = (plane * H + row) * W + column
    a_sites = a_ptr + image * a_b + (plane * a_d + row * a_h + column * a_w)
    b_sites = b_ptr + image * b_b + (plane * b_d + row * b_h + column * b_w)

    diag = tl.zeros((ROWS, COLS), diag_ptr.dtype.element_ty)
    total = tl.full((), 0.0, diag.dtype)
    for s in range(S):
        b = tl.load(b_sites + s * b_s, exists, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + tl.cast(s, tl.int64) * B + image)
            b = scale * b
            total += scale
        diag = tl.fma(tl.load(a_sites + s * a_s, exists, other=0.0), b, diag)
    if scale_ptr is not None:
        log_diag_sites = log_diag_ptr + image * log_diag_b + (plane * log_diag_d + row * log_diag_h + column * log_diag_w)
        diag = diag * exp(tl.load(log_diag_sites, exists, other=0.0)) - total
    tl.store(diag_ptr + image * n + sites, diag, exists)

    for first in tl.static_range(0, len(OFFSETS), GROUP):
        sums = ()
        for _ in tl.static_range(min(GROUP, len(OFFSETS) - first)):
            sums += (tl.zeros((ROWS, COLS), diag.dtype),)
        for s in range(S):
            b = tl.load(b_sites + s * b_s, exists, other=0.0)
            if scale_ptr is not None:
                b = tl.load(scale_ptr + tl.cast(s, tl.int64) * B + image) * b
            more = ()
            for i in tl.static_range(len(sums)):
                there = a_sites + s * a_s + distance(OFFSETS, first + i, a_d, a_h, a_w)
                has = exists & _has_neighbour(plane, row, column, D, H, W, OFFSETS, first + i)
                more += (tl.fma(tl.load(there, has, other=0.0), b, sums[i]),)
            sums = more
        for i in tl.static_range(len(sums)):
            has = _has_neighbour(plane, row, column, D, H, W, OFFSETS, first + i)
            entries = off_ptr + (image * len(OFFSETS) + first + i) * n + sites
            tl.store(entries, tl.where(has, sums[i], 0.0).to(off_ptr.dtype.element_ty), exists)


@triton.jit
def _has_neighbour(plane, row, column, D, H, W, OFFSETS: tl.constexpr, K: tl.constexpr):
    """The site's K-th neighbour lies on the grid."""
    return inside(plane, D, OFFSETS[K][0]) & inside(row, H, OFFSETS[K][1]) & inside(column, W, OFFSETS[K][2])
