"""Tiles of sites that the kernels without recursion share: each program owns ROWS × COLS sites of one image.

A tile's rows are rows of the flattened planes, (D·H, W), so that one plane, one row or a volume are the same code.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, H, W, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr):
    """Plane and row (ROWS, 1) and column (1, COLS) of each site of a tile, of type INDEX."""
    across = tl.cdiv(W, COLS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLS + tl.arange(0, COLS)[None, :]
    return (row // H).to(INDEX), (row % H).to(INDEX), column.to(INDEX)


@triton.jit
def inside(index, size, SHIFT: tl.constexpr):
    """``index + SHIFT`` lies on an axis of this size."""
    return (index + SHIFT >= 0) & (index + SHIFT < size)


@triton.jit
def distance(OFFSETS: tl.constexpr, K: tl.constexpr, stride_d, stride_h, stride_w):
    """Elements from a site to its K-th neighbour."""
    planes = OFFSETS[K][0] * tl.cast(stride_d, tl.int64)
    rows = OFFSETS[K][1] * tl.cast(stride_h, tl.int64)
    return planes + rows + OFFSETS[K][2] * tl.cast(stride_w, tl.int64)


@triton.jit
def sum_by_pairs(values, SIZE: tl.constexpr):
    """Sum of SIZE = 2ᵐ values, as a tensor of one: neighbours are added, then neighbouring sums, and so on.

    The order in which `tl.sum` adds many values depends on which thread holds which, and so on what the compiler knows of
    strides and alignment; two values have one sum.
    """
    if SIZE == 1:
        return tl.reshape(values, (1,))
    else:
        return sum_by_pairs(tl.sum(tl.reshape(values, (SIZE // 2, 2)), axis=1), SIZE // 2)
