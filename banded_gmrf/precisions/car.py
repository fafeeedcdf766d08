"""Conditional autoregressions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmrf_kernels.stencils import overlap

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil, as_grid, check_stencil
from .parameters import check, positive


def car_precision(
    grid: Sequence[int],
    dependence: float | Tensor,
    variance: float | Tensor = 1.0,
    neighbours: Stencil | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The conditional autoregression: each site, given all others, varies about a fraction of its neighbours' mean.

    x_j | others ~ N(dependence · mean of its d_j neighbours, variance / d_j), hence Λ = (D - dependence · W) / variance, W the
    adjacency and D the numbers of neighbours. Besag, Spatial interaction and the statistical analysis of lattice systems,
    JRSS B 1974.

    Args:
        grid: numbers of sites along each axis.
        dependence: at most 1 in magnitude. At 1 Λ is singular, the precision of an intrinsic field, whose level nothing
            determines: factors refuse it, and `SparseGMRF` takes it where observations or constraints determine the rest. (-1
            is alike on a chequerboard.)
        variance: the conditional variance of a site times its number of neighbours.
        neighbours: the forward half of the neighbourhood; None is the nearest neighbours along the axes.
        dtype, device: of the result.

    Raises:
        TypeError: ``grid`` is not made of integers, or ``neighbours`` is not a `Stencil`.
        ValueError: another number of axes than 1 to 3, an axis without sites, a parameter out of its range, neighbours on
            another number of axes, or a site without any.
    """
    grid = as_grid(grid)
    ndim = len(grid)
    neighbours = Stencil.cross(1, ndim) if neighbours is None else neighbours
    check_stencil(neighbours, "neighbours", ndim)
    variance = positive("variance", variance, ndim, dtype, device)
    dependence = torch.as_tensor(dependence, dtype=dtype, device=device)
    check("dependence", dependence, dependence.abs() <= 1, "at most 1 in magnitude")
    exists = neighbours.mask(grid, device).to(dtype)
    degree = exists.sum(0)
    for k, offset in enumerate(neighbours.offsets):
        here, there = overlap(offset, grid)
        degree[there] += exists[k][here]
    if not degree.all():
        site = tuple((degree == 0).nonzero()[0].tolist())
        raise ValueError(f"site {site} of grid {tuple(grid)} has no neighbours, expected at least one for every site")
    weight = dependence[(..., *[None] * ndim)] / variance
    return StencilPrecision(degree / variance, -weight.unsqueeze(-ndim - 1) * exists, neighbours)
