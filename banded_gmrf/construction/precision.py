"""The exact Cholesky factor of a sparse precision, by elimination of one block of sites after the other.

The Cholesky factor of a sparse Λ fills in: eliminating a site couples all its later neighbours, so that the
differences of two offsets become offsets, differences of these as well, and so on. All of them come, in raster order, between
the origin and the last offset of Λ, and L is no wider a band matrix than Λ: a block of as many sites as the band is wide
reaches into the next block only.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from gmrf_kernels.checks import accumulate_dtype

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil, flat_index
from .covariance import of_batch

_MIN_BLOCK_SITES = 32  # smaller matrices cost more in calls than in arithmetic


def factor_of_precision(precision: StencilPrecision) -> tuple[Tensor, Tensor, Stencil]:
    """``log_diag``, ``off_diag`` and stencil of `StencilCholesky.from_precision`, the exact factor."""
    if not isinstance(precision, StencilPrecision):
        raise TypeError(f"precision is a {type(precision).__name__}, expected a StencilPrecision")
    grid, ndim, device = precision.grid, precision.stencil.ndim, precision.diag.device
    n, dtype = grid.numel(), accumulate_dtype(precision.off_diag.dtype)
    filled, reach = _filled_stencil(precision.stencil, grid)
    block = max(reach, _MIN_BLOCK_SITES)
    read, written = (_places_in_strip(offsets, grid, block).to(device) for offsets in (precision.stencil, filled))

    padding = (0, -n % block)  # by sites on their own, to whole blocks
    exists = precision.stencil.mask(grid, device)
    diag = pad(precision.diag.flatten(-ndim), padding, value=1.0)
    off_diag = pad(torch.where(exists, precision.off_diag, 0).flatten(-ndim), padding)
    batch = torch.broadcast_shapes(diag.shape[:-1], off_diag.shape[:-2])
    entries = torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (diag.unsqueeze(-2), off_diag)], -2).to(dtype)

    explained, columns = 0, []  # of a block by the ones before it
    for start, own in zip(range(0, n, block), entries.split(block, -1), strict=True):
        strip = own.new_zeros(*batch, 2 * block * block).index_add(-1, read, own.flatten(-2)).unflatten(-1, (2 * block, block))
        lower, below = strip[..., :block, :], strip[..., block:, :]
        factor, failed = torch.linalg.cholesky_ex(lower + lower.tril(-1).mT - explained)
        bad = failed.nonzero()
        if len(bad):
            site = torch.unravel_index(start + failed[tuple(bad[0])] - 1, grid)
            raise ValueError(f"precision is not positive definite{of_batch(bad[0])} at site {tuple(int(i) for i in site)}")
        below = torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False)
        explained = below @ below.mT
        columns.append(torch.cat([factor, below], -2).flatten(-2)[..., written].unflatten(-1, (-1, block)))
    columns = torch.cat(columns, -1)[..., :n].unflatten(-1, grid).movedim(-ndim - 1, 0)
    off_diag = torch.where(filled.mask(grid, device), columns[1:].movedim(0, -ndim - 1), 0)
    return columns[0].log().to(precision.diag.dtype), off_diag.to(precision.off_diag.dtype), filled


def _filled_stencil(stencil: Stencil, grid: torch.Size) -> tuple[Stencil, int]:
    """The offsets at which the factor of a precision with this stencil may have entries, and the width of the band."""
    origin = (0,) * stencil.ndim
    existing = [offset for offset in stencil.offsets if all(abs(o) < n for o, n in zip(offset, grid, strict=True))]
    if not existing:
        return Stencil([], stencil.ndim), 0
    reach = int(flat_index(torch.tensor(existing), grid).max())
    box = itertools.product(range(existing[-1][0] + 1), *(range(1 - n, n) for n in grid[1:]))
    between = [offset for offset in box if origin < offset <= existing[-1]]
    within = flat_index(torch.tensor(between), grid) <= reach
    return Stencil(itertools.compress(between, within.tolist()), stencil.ndim), reach


def _places_in_strip(stencil: Stencil, grid: torch.Size, block: int) -> Tensor:
    """Where in a block's columns (2 block, block) the diagonal and the offsets' entries (K, block) are, both flattened."""
    down = flat_index(torch.tensor([(0,) * stencil.ndim, *stencil.offsets]), grid)
    column = torch.arange(block)
    return ((down[:, None] + column) * block + column).flatten()
