"""The factor with another stencil that is nearest to a given one, from covariances of near rows."""

import warnings

import torch
from torch import Tensor

from ..coefficients import HasCoefficients
from ..recursions.covariances import scan_covariance
from ..stencil import Stencil, check_stencil, flat_index
from .covariance import as_factor, nearest_columns

_MAX_CHANGE_OF_VARIANCE = 0.2


def nearest_factor(factor: HasCoefficients, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """``log_diag`` and ``off_diag`` of the factor with another stencil that is nearest to the distribution of ``factor``."""
    grid = factor.grid
    check_stencil(stencil, ndim=len(grid))
    row = grid[1:].numel()

    def columns_of_block(start: int, stop: int, covariance: Tensor) -> Tensor:
        def of_sites(a: Tensor, b: Tensor) -> Tensor:
            return covariance[..., flat_index(a, grid) - start * row, flat_index(b, grid) - start * row]

        return nearest_columns(
            "the covariance of the precision",
            of_sites,
            stencil,
            grid,
            covariance.shape[:-2],
            covariance.device,
            range(start * row, stop * row),
        )

    reach = max(factor.stencil.row_reach, stencil.row_reach)
    columns = torch.cat(scan_covariance(factor, reach, columns_of_block), -2)
    return as_factor(columns.to(factor.coefficients.log_diag.dtype), grid)


def warn_of_changed_variance(exact: HasCoefficients, nearest: HasCoefficients) -> None:
    """RuntimeWarning where the mean of the marginal variances, over the grid, changes by more than a fifth."""
    ratio = _mean_variance(nearest) / _mean_variance(exact)
    if ((ratio - 1).abs() > _MAX_CHANGE_OF_VARIANCE).any():
        worst = float(ratio.flatten()[(ratio - 1).abs().argmax()])
        warnings.warn(
            f"the factor with {len(nearest.stencil)} offsets has {worst:.2f} times the variance of the precision, as a mean "
            "over the grid: as a prior it misleads. The exact factor, stencil=None, and SparseGMRF keep it",
            RuntimeWarning,
            stacklevel=5,  # of `StencilCholesky.from_precision`
        )


def _mean_variance(factor: HasCoefficients) -> Tensor:
    """Over the grid, (*batch), by a selected inverse."""
    row = factor.grid[1:].numel()

    def own(start: int, stop: int, covariance: Tensor) -> Tensor:
        return covariance.diagonal(dim1=-2, dim2=-1)[..., : (stop - start) * row].sum(-1)

    return sum(scan_covariance(factor, factor.stencil.row_reach, own)) / factor.grid.numel()
