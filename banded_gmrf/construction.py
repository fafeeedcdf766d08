"""Factors from what is known of a distribution: its covariance. `StencilCholesky` offers these as class methods.

Everything rests on one closed form. Among all factors with a given stencil, the one that minimises
KL(N(0, Σ) ‖ N(0, (L Lᵀ)⁻¹)) has, in column j, with s the site j and those of its forward neighbours that exist,

    L[s, j] = Σ[s, s]⁻¹ e / sqrt(eᵀ Σ[s, s]⁻¹ e),   e the unit vector of site j

(Schäfer, Katzfuss and Owhadi, Sparse Cholesky factorization by Kullback-Leibler minimization, SIAM J. Sci. Comput. 2021,
theorem 2.1; Vecchia's approximation). With site j last in s and Σ[s, s] = G Gᵀ, this is the last column of G⁻ᵀ.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gmrf_kernels.ops import accumulate_dtype, check_tensor

from .stencil import Stencil, check_stencil

CovarianceFunction = Callable[[Tensor, Tensor], Tensor]

_BLOCK_ELEMENTS = 2**24


def factor_of_covariance(
    covariance: Tensor | CovarianceFunction, stencil: Stencil, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``log_diag`` and ``off_diag`` of `StencilCholesky.from_covariance`."""
    check_stencil(stencil)
    stencil._check_grid(grid)
    grid = torch.Size(grid)
    if isinstance(covariance, Tensor):
        covariance = _entries_of(covariance, grid)
    elif not callable(covariance):
        raise TypeError(f"covariance is a {type(covariance).__name__}, expected a torch.Tensor or a function")
    origin = torch.zeros((1, 1, 1, stencil.ndim), dtype=torch.int64)
    one = covariance(origin, origin)
    check_tensor("covariance(a, b)", one)
    if one.ndim < 3 or one.shape[-3:] != (1, 1, 1):
        raise ValueError(
            f"covariance(a, b) has shape {tuple(one.shape)} for a single pair of sites, expected (*batch, 1, 1, 1)"
        )
    batch, dtype = one.shape[:-3], accumulate_dtype(one.dtype)
    columns = []
    for sites, exists in neighbourhoods(stencil, grid, batch.numel()):
        blocks = covariance(sites[:, :, None], sites[:, None, :])
        expected = (*batch, *exists.shape, exists.shape[-1])
        if blocks.shape != expected:
            raise ValueError(f"covariance(a, b) has shape {tuple(blocks.shape)}, expected {expected}")
        columns.append(optimal_columns("covariance", blocks.to(dtype), exists.to(blocks.device), sites[:, -1]))
    columns = torch.cat(columns, -2).to(one.dtype).movedim(-1, -2)
    return columns[..., -1, :].unflatten(-1, grid), columns[..., :-1, :].unflatten(-1, grid)


def neighbourhoods(stencil: Stencil, grid: torch.Size, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each site's forward neighbours and, last, the site itself, for as many sites at a time as memory allows.

    Yields:
        The indices (m, K, ndim) of the neighbours, those of the site itself in place of one that does not exist, and which of
        them exist, (m, K) bool. ``batch`` blocks of K x K numbers for each of the m sites are of bounded size.
    """
    offsets = torch.tensor([*stencil.offsets, (0,) * stencil.ndim])
    per_site = max(1, batch) * len(offsets) ** 2
    for rasters in torch.arange(grid.numel()).split(max(1, _BLOCK_ELEMENTS // per_site)):
        sites = torch.stack(torch.unravel_index(rasters, grid), -1)[:, None]
        moved = sites + offsets
        exists = ((moved >= 0) & (moved < torch.tensor(grid))).all(-1)
        yield torch.where(exists[..., None], moved, sites), exists


def optimal_columns(name: str, blocks: Tensor, exists: Tensor, sites: Tensor) -> Tensor:
    """The optimal column for each covariance block of a site, the last row of the block, and its neighbours.

    Args:
        name: the argument that the blocks come from.
        blocks: (*batch, m, K, K).
        exists: (m, K) bool; rows and columns that do not exist are ignored.
        sites: (m, ndim), to name one whose block is not positive definite.

    Returns:
        (*batch, m, K): entries below the diagonal, 0 where they do not exist, and last the logarithm of the diagonal.
    """
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    blocks = torch.where(exists[:, :, None] & exists[:, None, :], blocks, eye)
    factors, failed = torch.linalg.cholesky_ex(blocks)
    last = factors[..., -1, -1]
    bad = ((failed != 0) | ~last.isfinite()).nonzero()
    if len(bad):
        *element, number = bad[0].tolist()
        of_batch = f" of batch element {tuple(element)}" if element else ""
        raise ValueError(
            f"{name} is not positive definite{of_batch} at site {tuple(sites[number].tolist())} "
            f"and its {int(exists[number].sum()) - 1} neighbours"
        )
    columns = torch.linalg.solve_triangular(factors.mT, eye[:, -1:], upper=True)[..., 0]
    return torch.cat([columns[..., :-1], -last.log()[..., None]], -1)


def _entries_of(covariance: Tensor, grid: torch.Size) -> CovarianceFunction:
    """The covariance function of a dense matrix (*batch, n, n)."""
    check_tensor("covariance", covariance)
    n = grid.numel()
    if covariance.ndim < 2 or covariance.shape[-2:] != (n, n):
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}, expected (*batch, {n}, {n}) for grid {tuple(grid)}")
    strides = torch.tensor([grid[axis + 1 :].numel() for axis in range(len(grid))])
    return lambda a, b: covariance[..., (a * strides).sum(-1), (b * strides).sum(-1)]
