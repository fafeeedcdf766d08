"""Thin plates: fields whose energy is that of bending."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision_matrix import StencilPrecision
from ..stencil import as_grid
from .parameters import differences, not_negative, positive


def thin_plate_precision(
    grid: Sequence[int],
    bending: float | Tensor,
    ridge: float | Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The prior behind thin plate splines: the energy of a bent plate, made proper by a ridge.

    xᵀΛx = bending · Σ (x_aa² + 2 x_ab² + ...) + ridge · Σ x², the second differences x_ab, of each pair of axes, taken wherever
    they exist. Without the ridge Λ is intrinsic: constants and planes have no energy. Rue and Held, Gaussian Markov random
    fields, 2005.

    Args:
        grid: numbers of sites along each axis.
        bending: the weight of the squared second differences.
        ridge: the weight of the squared values. At 0 Λ is singular: factors refuse it, and `SparseGMRF` takes it where
            observations or constraints determine constants and planes.
        dtype: of the result. In float32 the factorisation refuses ridges far below ``bending``, for which rounding of Λ
            changes the field; keep float64 and round the factor.
        device: of the result.

    Raises:
        TypeError: ``grid`` is not made of integers.
        ValueError: another number of axes than 1 to 3, an axis without sites, a ``bending`` that is not positive, or a negative
            ``ridge``.
    """
    grid = as_grid(grid)
    ndim = len(grid)
    bending = positive("bending", bending, ndim, dtype, device)
    ridge = not_negative("ridge", ridge, ndim, dtype, device)
    energy = sum(D.T @ D for D in (differences(grid, pair) for pair in itertools.product(range(ndim), repeat=2)))
    plate = StencilPrecision.from_matrix(energy, grid)
    diag, off_diag = plate.diag.to(bending), plate.off_diag.to(bending)
    return StencilPrecision(bending * diag + ridge, bending.unsqueeze(-ndim - 1) * off_diag, plate.stencil)
