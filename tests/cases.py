"""Stencils and grids that the tests of `banded_gmrf` share: few, because a backend may compile code for each stencil."""

import torch
from torch import Tensor

import banded_gmrf as bg

from .dense import dense_factor, random_factor

STENCILS = {
    "line": bg.Stencil([1]),
    "line with a gap": bg.Stencil([1, 3]),
    "diagonal": bg.Stencil.square(1),
    "3x3": bg.Stencil.square(3),
    "5x5": bg.Stencil.square(5),
    "cross": bg.Stencil.cross(2),
    "next row only": bg.Stencil([(1, 0), (1, -2)]),
    "skewed": bg.Stencil([(0, 2), (1, -3), (2, 1)]),
    "bands of a box": bg.Stencil.box((1, 1, 1)),
    "volume": bg.Stencil([(0, 0, 1), (0, 1, -2), (1, -1, 0), (1, 0, 0)]),
}

# Odd, not square, one site, one row, one column, and smaller than the stencil's radius.
GRIDS = {
    1: [(7,), (1,), (2,)],
    2: [(5, 7), (1, 1), (1, 6), (6, 1), (2, 2)],
    3: [(3, 4, 5), (1, 1, 1), (2, 1, 4), (1, 3, 2)],
}

FACTORS = [(name, grid) for name, stencil in STENCILS.items() for grid in GRIDS[stencil.ndim]]


def random_cholesky(stencil: bg.Stencil, grid, batch=(), dtype=torch.float64) -> bg.StencilCholesky:
    """A random factor with NaN where entries do not exist."""
    return bg.StencilCholesky(*random_factor(stencil.offsets, grid, batch, dtype), stencil)


def smooth_cholesky(grid, dtype=torch.float64, nugget=1e-4) -> bg.StencilCholesky:
    """The factor of a smooth field, each column from the covariance of a site and its neighbours."""
    stencil = STENCILS["5x5"]
    sites = torch.tensor([(0, 0), *stencil.offsets], dtype=torch.float64)
    covariance = (-torch.cdist(sites, sites).square() / 8).exp() + nugget * torch.eye(len(sites), dtype=torch.float64)
    column = torch.linalg.inv(covariance)[:, 0]
    column = (column / column[0].sqrt()).to(dtype)
    return bg.StencilCholesky(column[0].log().expand(grid), column[1:, None, None].expand(-1, *grid), stencil)


def dense(L: bg.StencilCholesky) -> Tensor:
    """(*batch, n, n) in float64, element by element; differentiable in the factor's tensors."""
    n = L.grid.numel()
    log_diag = L.log_diag.reshape(L.batch_shape.numel(), *L.grid)
    off_diag = L.off_diag.reshape(L.batch_shape.numel(), len(L.stencil), *L.grid)
    matrices = [dense_factor(*factor, L.stencil.offsets) for factor in zip(log_diag, off_diag, strict=True)]
    return torch.stack(matrices).reshape(*L.batch_shape, n, n) if matrices else torch.zeros(*L.batch_shape, n, n).double()


def dense_precision(precision: bg.StencilPrecision) -> Tensor:
    """(*batch, n, n) in float64, element by element; differentiable in the precision's tensors."""
    lower = dense(bg.StencilCholesky(precision.diag.log(), precision.off_diag, precision.stencil))
    return lower + lower.tril(-1).mT
