"""The factor with another stencil that is nearest to a given one, from covariances of near rows."""

import torch
from torch import Tensor

from ..coefficients import HasCoefficients
from ..recursions.covariances import scan_covariance
from ..stencil import Stencil, check_stencil, flat_index
from .covariance import as_factor, nearest_columns


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
