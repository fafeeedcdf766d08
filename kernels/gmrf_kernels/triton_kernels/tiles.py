"""Tiles of sites that the kernels without recursion share: each program owns ROWS × COLS sites of one image.

A tile's rows are rows of the flattened planes, (D·H, W), so that one plane, one row or a volume are the same code.

A thread has blocks of V sites that follow each other in a row. What stands in blocks is loaded and stored in vectors, and is
held as V tensors (ROWS, COLS // V), one for each site of a block. Neighbours' values are loaded in blocks, too: the blocks
beside the own one hold what several offsets and sites need. V is 1 where the tensors do not stand in aligned blocks.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..stencils import Offsets


class Reads(NamedTuple):
    """The blocks in which the neighbours of a block's sites lie, in the order of their first use.

    Args:
        blocks: (planes, rows, blocks) from the site's own block to each.
        until: for each offset the number of blocks that it and those before it read.
        values: for each offset and site of a block where its neighbour is: number of the block · V + site.
    """

    blocks: tuple[tuple[int, int, int], ...]
    until: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]


@functools.cache
def reads(neighbours: Offsets, sites: int) -> Reads:
    """What blocks of so many sites read, for neighbours of three components. The site's own block is the first."""
    numbers = {(0, 0, 0): 0}
    until, values = [], []
    for planes, rows, columns in neighbours:
        there = [divmod(site + columns, sites) for site in range(sites)]
        values.append(tuple(numbers.setdefault((planes, rows, block), len(numbers)) * sites + site for block, site in there))
        until.append(len(numbers))
    return Reads(tuple(numbers), tuple(until), tuple(values))


def sites_of_blocks(most: int, width: int, *tensors: Tensor | None) -> int:
    """``most``, if every block of so many sites is whole and an aligned piece of memory in all the tensors; else 1."""
    aligned = width % most == 0 and all(_in_blocks(t, most) for t in tensors if t is not None)
    return most if aligned else 1


def _in_blocks(tensor: Tensor, sites: int) -> bool:
    *strides, last = tensor.stride()
    return last == 1 and all(s % sites == 0 for s in strides) and tensor.data_ptr() % (sites * tensor.itemsize) == 0


@triton.jit
def tile_of(tile, H, W, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, ONE_PLANE: tl.constexpr, INDEX: tl.constexpr):
    """Plane and row (ROWS, 1) and first column (1, COLS // V) of each block of a tile, of type INDEX."""
    across = tl.cdiv(W, COLS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLS + tl.arange(0, COLS // V)[None, :] * V
    plane = tl.zeros((ROWS, 1), tl.int32)
    if not ONE_PLANE:
        plane = row // H
        row = row % H
    return plane.to(INDEX), row.to(INDEX), column.to(INDEX)


@triton.jit
def inside(index, size, SHIFT: tl.constexpr):
    """``index + SHIFT`` lies on an axis of this size."""
    return (index + SHIFT >= 0) & (index + SHIFT < size)


@triton.jit
def has_row(plane, row, D, H, PLANES: tl.constexpr, ROWS: tl.constexpr, ONE_PLANE: tl.constexpr):
    """(ROWS, 1): the row exists, and so does the one so many planes and rows from it."""
    exists = row < H if ONE_PLANE else plane < D
    if PLANES != 0:
        exists = exists & inside(plane, D, PLANES)
    if ROWS != 0:
        exists = exists & inside(row, H, ROWS)
    return exists


@triton.jit
def has_block(column, W, COLUMNS: tl.constexpr):
    """(1, COLS // V): the block that begins at the column exists, and so does the one so many columns from it."""
    exists = column < W
    if COLUMNS != 0:
        exists = exists & inside(column, W, COLUMNS)
    return exists


@triton.jit
def distance(stride_d, stride_h, stride_w, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements from a site to the one so many planes, rows and columns from it."""
    planes = PLANES * tl.cast(stride_d, tl.int64)
    rows = ROWS * tl.cast(stride_h, tl.int64)
    return planes + rows + COLUMNS * tl.cast(stride_w, tl.int64)


@triton.jit
def load_block(first, exists, V: tl.constexpr, ONCE: tl.constexpr = False):
    """The sites of the blocks that begin at these pointers, as V tensors; 0 where they do not exist.

    What is loaded ONCE is the first to leave the L1 cache.
    """
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    if V == 1:
        return (tl.load(first, exists, other=0.0, eviction_policy=POLICY),)
    else:
        return _unstack(tl.load(_vectors(first, V), exists[:, :, None], other=0.0, eviction_policy=POLICY), V)


@triton.jit
def store_block(first, sites, exists, V: tl.constexpr):
    """Write blocks whose sites are V tensors."""
    if V == 1:
        tl.store(first, sites[0], exists)
    else:
        tl.store(_vectors(first, V), stack(sites, V), exists[:, :, None])


@triton.jit
def _vectors(first, V: tl.constexpr):
    """(ROWS, COLS // V, V) pointers to aligned pieces of memory."""
    size: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(first[:, :, None] + tl.arange(0, V)[None, None, :], (size, size, V * size))


@triton.jit
def _unstack(block, V: tl.constexpr):
    """The V tensors along the last axis. They are in registers of their threads already: no data moves."""
    if V == 1:
        return (tl.reshape(block, (block.shape[0], block.shape[1])),)
    else:
        even, odd = tl.split(tl.reshape(block, (block.shape[0], block.shape[1], V // 2, 2)))
        even = _unstack(even, V // 2)
        odd = _unstack(odd, V // 2)
        sites = ()
        for i in tl.static_range(V // 2):
            sites += (even[i], odd[i])
        return sites


@triton.jit
def stack(sites, V: tl.constexpr):
    """What `_unstack` takes apart."""
    if V == 1:
        return sites[0][:, :, None]
    else:
        even = ()
        odd = ()
        for i in tl.static_range(V // 2):
            even += (sites[2 * i],)
            odd += (sites[2 * i + 1],)
        pairs = tl.join(stack(even, V // 2), stack(odd, V // 2))
        return tl.reshape(pairs, (sites[0].shape[0], sites[0].shape[1], V))


@triton.jit
def sum_by_pairs(values, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT sums, the last axis, of SIZE = 2ᵐ values each: neighbours are added, then neighbouring sums, and so on.

    The order in which `tl.sum` adds many values depends on which thread holds which, and so on what the compiler knows of
    strides and alignment; two values have one sum.
    """
    if SIZE == 1:
        return tl.reshape(values, (COUNT,))
    else:
        pairs = tl.reshape(values, (SIZE // 2, 2, COUNT))
        return sum_by_pairs(tl.sum(pairs, axis=1), SIZE // 2, COUNT)


@triton.jit
def sum_of_block(sites, V: tl.constexpr):
    """The sum of V tensors, by pairs like `sum_by_pairs`."""
    if V == 1:
        return sites[0]
    else:
        pairs = ()
        for i in tl.static_range(V // 2):
            pairs += (sites[2 * i] + sites[2 * i + 1],)
        return sum_of_block(pairs, V // 2)
