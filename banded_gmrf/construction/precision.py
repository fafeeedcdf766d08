"""The exact Cholesky factor of a sparse precision, by elimination of one block of sites after the other.

The Cholesky factor of a sparse Λ fills in: eliminating a site couples all its later neighbours, so that the
differences of two offsets become offsets, differences of these as well, and so on. All of them come, in raster order, between
the origin and the last offset of Λ, and L is no wider a band matrix than Λ: a block of as many sites as the band is wide
reaches into the next block only.

A Λ that is singular in exact arithmetic factorises all the same where rounding leaves a tiny positive pivot. So the condition
number of the result is estimated: of Λ with its diagonal scaled to 1, because rounding of an entry is relative to the two
diagonal entries beside it (Demmel, On floating point errors in Cholesky, LAPACK Working Note 14, 1989).
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import NotPositiveDefiniteError, of_batch
from ..precision_matrix import StencilPrecision
from ..stencil import Stencil, flat_index
from ..transformations import inspect

_MIN_BLOCK_SITES = 32  # smaller matrices cost more in calls than in arithmetic

# Λ is refused where rounding of its entries may change a variance by a tenth: the change is at most ε times the condition
# number, and came out 2 to 13 times smaller for Matérn fields on 32 x 32 sites (ranges of 80 and 160, smoothness 2 and 3).
# What is singular loses every digit, and its condition number is estimated as 1 / ε or more.
_MAX_CHANGE = 0.1
_POWER_STEPS = 2
_REMEDY = "A ridge on the diagonal, a dependence below 1, or a constraint makes such a field proper"


@torch.compiler.disable
def factor_of_precision(precision: StencilPrecision) -> tuple[Tensor, Tensor, Stencil]:
    """``log_diag``, ``off_diag`` and stencil of `StencilCholesky.from_precision`, the exact factor; computed in float64."""
    if not isinstance(precision, StencilPrecision):
        raise TypeError(f"precision is a {type(precision).__name__}, expected a StencilPrecision")
    grid, ndim, device = precision.grid, precision.stencil.ndim, precision.diag.device
    n = grid.numel()
    inspect(functools.partial(_check_finite, precision.stencil), precision.diag, precision.off_diag)
    filled, reach = _filled_stencil(precision.stencil, grid)
    block = max(reach, _MIN_BLOCK_SITES)
    read, written = (_places_in_strip(offsets, grid, block).to(device) for offsets in (precision.stencil, filled))

    padding = (0, -n % block)  # by sites on their own, to whole blocks
    exists = precision.stencil.mask(grid, device)
    diag = pad(precision.diag.flatten(-ndim), padding, value=1.0)
    off_diag = pad(torch.where(exists, precision.off_diag, 0).flatten(-ndim), padding)
    batch = torch.broadcast_shapes(diag.shape[:-1], off_diag.shape[:-2])
    entries = torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (diag.unsqueeze(-2), off_diag)], -2).to(torch.float64)

    explained, columns = 0, []  # of a block by the ones before it
    for start, own in zip(range(0, n, block), entries.split(block, -1), strict=True):
        strip = own.new_zeros(*batch, 2 * block * block).index_add(-1, read, own.flatten(-2)).unflatten(-1, (2 * block, block))
        lower, below = strip[..., :block, :], strip[..., block:, :]
        factor, failed = torch.linalg.cholesky_ex(lower + lower.tril(-1).mT - explained)
        inspect(functools.partial(_check_block, precision, start), failed)
        below = torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False)
        explained = below @ below.mT
        columns.append(torch.cat([factor, below], -2).flatten(-2)[..., written].unflatten(-1, (-1, block)))
    columns = torch.cat(columns, -1)
    whole = precision.diag.expand(*batch, *grid), precision.off_diag.expand(*batch, *precision.off_diag.shape[-ndim - 1 :])
    inspect(functools.partial(_check_condition, precision, written), columns, *whole)
    columns = columns[..., :n].unflatten(-1, grid).movedim(-ndim - 1, 0)
    off_diag = torch.where(filled.mask(grid, device), columns[1:].movedim(0, -ndim - 1), 0)
    return columns[0].log().to(precision.diag.dtype), off_diag.to(precision.off_diag.dtype), filled


def _check_block(precision: StencilPrecision, start: int, failed: Tensor) -> None:
    """Raise `NotPositiveDefiniteError` where a block has no factor; ``start`` is its first site, ``failed`` LAPACK's report."""
    bad = failed.nonzero()
    if len(bad):
        site = torch.unravel_index(start + failed[tuple(bad[0])] - 1, precision.grid)
        raise NotPositiveDefiniteError(
            f"precision is not positive definite{of_batch(bad[0])} at site {tuple(int(i) for i in site)}: it is singular, "
            f"or has a negative direction. {_REMEDY}{_in_float64(precision.diag.dtype)}"
        )


def _check_finite(stencil: Stencil, diag: Tensor, off_diag: Tensor) -> None:
    """Raise ValueError where an entry that exists is NaN or infinite."""
    ndim = stencil.ndim
    below = (off_diag.isfinite() | ~stencil.mask(diag.shape[-ndim:], diag.device)).all(-ndim - 1)
    bad = (~(diag.isfinite() & below)).nonzero()
    if len(bad):
        element, site = bad[0].tensor_split([bad.shape[-1] - ndim])
        raise ValueError(
            f"precision has an infinite or NaN entry{of_batch(element)} in the column of site {tuple(site.tolist())}, "
            "expected finite ones"
        )


def _in_float64(dtype: torch.dtype) -> str:
    """What helps where the numbers of Λ were rounded."""
    if dtype == torch.float64:
        return ""
    return f"; or build the precision in float64 and round its factor, StencilCholesky.from_precision(...).to({dtype})"


def _check_condition(precision: StencilPrecision, written: Tensor, columns: Tensor, *parts: Tensor) -> None:
    """Raise `NotPositiveDefiniteError` where rounding of Λ may change variances by more than `_MAX_CHANGE`.

    Args:
        precision: Λ.
        written: as `_places_in_strip` gives it, flattened from (K, block).
        columns: of its factor, (*batch, K, sites), padded to whole blocks of sites.
        parts: the numbers of Λ, both with the whole batch.
    """
    precision = StencilPrecision(*parts, precision.stencil)
    eps = torch.finfo(precision.diag.dtype).eps
    diag = precision.diag.flatten(-precision.stencil.ndim).to(torch.float64)
    diag = pad(diag, (0, columns.shape[-1] - diag.shape[-1]), value=1.0)
    blocks = columns.split(len(written) // columns.shape[-2], -1)
    condition = _largest_row_sum(precision) * _largest_scaled_variance(blocks, written, diag.sqrt())
    bad = (~(eps * condition <= _MAX_CHANGE)).nonzero()
    if not len(bad):
        return
    element = tuple(bad[0].tolist())
    n = precision.grid.numel()
    pivots = columns[..., 0, :].square() / diag
    site = torch.unravel_index(pivots[element][:n].argmin(), precision.grid)
    raise NotPositiveDefiniteError(
        f"precision is singular up to rounding{of_batch(bad[0])}: its condition number is about {condition[element]:.0e}, so "
        f"that rounding in {precision.diag.dtype} may change variances by more than {_MAX_CHANGE:.0%}. Least is left of the "
        f"pivot at site {tuple(int(i) for i in site)}. "
        f"{_REMEDY}{_in_float64(precision.diag.dtype)}"
    )


def _largest_row_sum(precision: StencilPrecision) -> Tensor:
    """Of magnitudes of Λ, its diagonal scaled to 1: at least its largest eigenvalue, (*batch)."""
    ndim = precision.stencil.ndim
    k, row, column = precision.stencil.entries(precision.grid, precision.diag.device)
    diag = precision.diag.flatten(-ndim).to(torch.float64)
    below = precision.off_diag.flatten(-ndim)[..., k, column].abs() / (diag[..., row] * diag[..., column]).sqrt()
    sums = torch.ones(*below.shape[:-1], diag.shape[-1], dtype=torch.float64, device=diag.device)
    return sums.index_add(-1, row, below).index_add(-1, column, below).amax(-1)


def _largest_scaled_variance(columns: Sequence[Tensor], written: Tensor, scale: Tensor) -> Tensor:
    """The largest eigenvalue of Λ⁻¹ scaled alike, (*batch): of several power iterations, the largest Rayleigh quotient."""
    block = columns[0].shape[-1]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(scale.shape[-1], 3, dtype=torch.float64, generator=generator).to(scale.device)
    v = torch.cat([scale.unsqueeze(-1), random.expand(*scale.shape, 3)], -1)  # constants are the smoothest fields

    def strip(part: Tensor) -> tuple[Tensor, Tensor]:
        """The block's own entries of L, and those below them."""
        dense = part.new_zeros(*part.shape[:-2], 2 * block * block).index_copy(-1, written, part.flatten(-2))
        return dense.unflatten(-1, (2, block, block)).unbind(-3)

    for step in range(_POWER_STEPS):
        v = v / v.norm(dim=-2, keepdim=True)
        solved, carried = [], 0
        for part, b in zip(columns, (scale.unsqueeze(-1) * v).split(block, -2), strict=True):
            own, below = strip(part)
            solved.append(torch.linalg.solve_triangular(own, b - carried, upper=False))
            carried = below @ solved[-1]
        quotient = torch.cat(solved, -2).square().sum(-2).amax(-1)
        if step < _POWER_STEPS - 1:
            after, back = torch.zeros_like(solved[0]), []
            for part, y in zip(columns[::-1], solved[::-1], strict=True):
                own, below = strip(part)
                after = torch.linalg.solve_triangular(own.mT, y - below.mT @ after, upper=True)
                back.append(after)
            v = scale.unsqueeze(-1) * torch.cat(back[::-1], -2)
    return quotient


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
