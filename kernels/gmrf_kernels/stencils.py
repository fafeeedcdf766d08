"""Geometry of stencils: which neighbours exist, and in which order the sites can be solved.

A stencil is a tuple of *forward* offsets, each a tuple of ``ndim`` integers whose first non-zero component is positive.
"""

import math
from collections.abc import Sequence

Offsets = tuple[tuple[int, ...], ...]


def flatten(offsets: Offsets) -> list[int]:
    """The flat list of integers that the registered operators carry."""
    return [component for offset in offsets for component in offset]


def unflatten(flat: Sequence[int], ndim: int) -> Offsets:
    """The offsets behind the flat list of integers."""
    return tuple(tuple(flat[i : i + ndim]) for i in range(0, len(flat), ndim))


def overlap(offset: Sequence[int], grid: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices ``(here, there)`` of a grid: ``there`` is ``here`` moved by the offset, both inside the grid."""
    here = tuple(slice(max(0, -o), max(0, n - max(0, o))) for o, n in zip(offset, grid, strict=True))
    there = tuple(slice(max(0, o), max(0, n - max(0, -o))) for o, n in zip(offset, grid, strict=True))
    return here, there


def wavefront_slopes(offsets: Offsets, ndim: int) -> tuple[int, ...]:
    """Smallest non-negative integers, the last one 1, with ``sum(slope * offset) >= 1`` for every offset.

    Sites with equal ``t = sum(slope * index)`` do not depend on each other in a triangular solve.
    """
    slopes = [0] * ndim
    slopes[-1] = 1
    for axis in range(ndim - 2, -1, -1):
        for offset in offsets:
            if any(offset[:axis]) or offset[axis] == 0:
                continue
            rest = sum(slopes[a] * offset[a] for a in range(axis + 1, ndim))
            slopes[axis] = max(slopes[axis], math.ceil((1 - rest) / offset[axis]))
    return tuple(slopes)
