"""The factor with a given stencil that is nearest to a known covariance, column by column.

Among all factors with a given stencil, the one that minimises KL(N(0, Σ) ‖ N(0, (L Lᵀ)⁻¹)) has in column j, with s the site j
and its existing forward neighbours,

    L[s, j] = Σ[s, s]⁻¹ e / sqrt(eᵀ Σ[s, s]⁻¹ e),   e the unit vector of site j

(Schäfer, Katzfuss and Owhadi, Sparse Cholesky factorization by Kullback-Leibler minimization, SIAM J. Sci. Comput. 2021;
Vecchia's approximation). With site j last in s and Σ[s, s] = G Gᵀ, this is the last column of G⁻ᵀ.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gmrf_kernels.checks import check_tensor

from ..errors import NotPositiveDefiniteError, of_batch
from ..stencil import Stencil, check_stencil, flat_index
from ..transformations import inspect

CovarianceFunction = Callable[[Tensor, Tensor], Tensor]

_CHUNK_ELEMENTS = 2**20


def factor_of_covariance(
    covariance: Tensor | CovarianceFunction, stencil: Stencil, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``log_diag`` and ``off_diag`` of `StencilCholesky.from_covariance`."""
    check_stencil(stencil)
    stencil.check_grid(grid)
    grid = torch.Size(grid)
    if isinstance(covariance, Tensor):
        blocks = _entries_of_matrix(covariance, grid)
        one, device = covariance[..., :1, :1, None], covariance.device
    elif callable(covariance):
        origin = torch.zeros((1, 1, 1, stencil.ndim), dtype=torch.int64)
        one, device, blocks = covariance(origin, origin), None, covariance
        check_tensor("covariance(a, b)", one)
        if one.ndim < 3 or one.shape[-3:] != (1, 1, 1):
            raise ValueError(
                f"covariance(a, b) has shape {tuple(one.shape)} for a single pair of sites, expected (*batch, 1, 1, 1)"
            )
    else:
        raise TypeError(f"covariance is a {type(covariance).__name__}, expected a torch.Tensor or a function")
    columns = nearest_columns("covariance", blocks, stencil, grid, one.shape[:-3], device)
    return as_factor(columns.to(one.dtype), grid)


def _entries_of_matrix(covariance: Tensor, grid: torch.Size) -> CovarianceFunction:
    check_tensor("covariance", covariance)
    n = grid.numel()
    if covariance.ndim < 2 or covariance.shape[-2:] != (n, n):
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}, expected (*batch, {n}, {n}) for grid {tuple(grid)}")
    return lambda a, b: covariance[..., flat_index(a, grid), flat_index(b, grid)]


def nearest_columns(
    name: str,
    covariance: CovarianceFunction,
    stencil: Stencil,
    grid: torch.Size,
    batch: torch.Size,
    device: torch.device | None,
    numbers: range | None = None,
) -> Tensor:
    """Columns of the nearest factor, as `optimal_columns` gives them: (*batch, sites, K).

    Args:
        name: what an error calls the covariance.
        covariance: a function as for `StencilCholesky.from_covariance`.
        stencil, grid: of the factor.
        batch: the batch shape of the covariances.
        device: where the function expects its arguments; None is torch's default.
        numbers: the sites' raster numbers; None is all.
    """
    columns = []
    for sites, exists in neighbourhoods(stencil, grid, batch.numel(), device, numbers):
        blocks = covariance(sites[:, :, None], sites[:, None, :])
        expected = (*batch, *exists.shape, exists.shape[-1])
        if blocks.shape != expected:
            raise ValueError(f"{name}(a, b) has shape {tuple(blocks.shape)}, expected {expected}")
        columns.append(optimal_columns(name, blocks, exists, sites[:, -1]))
    return torch.cat(columns, -2)


def neighbourhoods(
    stencil: Stencil, grid: torch.Size, batch: int, device: torch.device | None, numbers: range | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each site's forward neighbours and, last, the site itself, for as many sites at a time as memory allows.

    ``numbers`` are the raster numbers of the sites, by default all.

    Yields:
        The indices (m, K, ndim) of the neighbours, and whether they exist, (m, K) bool. In place of a neighbour that does not
        exist stands the site itself. ``batch`` blocks of K x K numbers for each of the m sites are of bounded size.
    """
    offsets = torch.tensor([*stencil.offsets, (0,) * stencil.ndim], device=device)
    size = torch.tensor(grid, device=device)
    per_site = max(1, batch) * len(offsets) ** 2
    numbers = range(grid.numel()) if numbers is None else numbers
    for chunk in torch.arange(numbers.start, numbers.stop, device=device).split(max(1, _CHUNK_ELEMENTS // per_site)):
        sites = torch.stack(torch.unravel_index(chunk, grid), -1)[:, None]
        moved = sites + offsets
        exists = ((moved >= 0) & (moved < size)).all(-1)
        yield torch.where(exists[..., None], moved, sites), exists


def optimal_columns(name: str, blocks: Tensor, exists: Tensor, sites: Tensor) -> Tensor:
    """The optimal column of L for each covariance block of a site's neighbours and, last, the site itself.

    Args:
        name: what an error calls the covariance.
        blocks: (*batch, m, K, K).
        exists: (m, K) bool; rows and columns that do not exist are ignored.
        sites: (m, ndim), named if the block is not positive definite.

    Returns:
        (*batch, m, K) in float64: the entries below the diagonal, 0 where they do not exist, and last the logarithm of the
        diagonal.
    """
    exists = exists.to(blocks.device)
    dtype, blocks = blocks.dtype, blocks.to(torch.float64)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factors, failed = torch.linalg.cholesky_ex(torch.where(exists[:, :, None] & exists[:, None, :], blocks, eye))
    last = factors[..., -1, -1]
    # Squared pivots are what is left of a variance once others are known. What rounding could have left is nothing.
    floor = max(len(eye) * torch.finfo(torch.float64).eps, torch.finfo(dtype).eps)
    variances = torch.where(exists, blocks.diagonal(dim1=-2, dim2=-1), 1)
    lost = (factors.diagonal(dim1=-2, dim2=-1).square() <= floor * variances).any(-1)
    failed = (failed != 0) | lost | ~last.isfinite()
    if torch.compiler.is_compiling():  # a compiled function cannot look at values
        last = last.masked_fill(failed, torch.nan)
    else:
        inspect(lambda failed, own: _check_columns(name, failed, own, exists, sites), failed, variances[..., -1])
    columns = torch.linalg.solve_triangular(factors.mT, eye[:, -1:], upper=True)[..., 0]
    return torch.cat([columns[..., :-1], -last.log()[..., None]], -1)


def _check_columns(name: str, failed: Tensor, own: Tensor, exists: Tensor, sites: Tensor) -> None:
    bad = failed.nonzero()
    if len(bad):
        number = bad[0, -1]
        if own[tuple(bad[0])] == 0:
            why = "it is singular, with a variance of 0 at the site, as where all samples are the same"
        else:
            why = "up to rounding it is singular, or has a negative direction"
        raise NotPositiveDefiniteError(
            f"{name} is not positive definite{of_batch(bad[0, :-1])} at site {tuple(sites[number].tolist())} "
            f"and its {int(exists[number].sum()) - 1} neighbours: {why}"
        )


def as_factor(columns: Tensor, grid: torch.Size) -> tuple[Tensor, Tensor]:
    """Columns (*batch, n, K) as ``log_diag`` (*batch, *grid) and ``off_diag`` (*batch, K-1, *grid)."""
    by_offset = columns.mT.unflatten(-1, grid).movedim(-len(grid) - 1, 0)
    return by_offset[-1], by_offset[:-1].movedim(0, -len(grid) - 1)
