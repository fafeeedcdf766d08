"""Pairs of sites of a grid, lag by lag."""

import itertools
from collections.abc import Iterator, Sequence

from gmrf_kernels.stencils import overlap


def lags(max_lag: int, grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """One lag of each pair ±lag up to ``max_lag`` along each axis, with the slices of the sites and of those that far on."""
    for lag in itertools.product(range(-max_lag, max_lag + 1), repeat=len(grid)):
        if lag > (0,) * len(grid):
            yield lag, *overlap(lag, grid)
