"""Covariances of near rows of the grid, exactly: the selected inverse of Λ by blocks of rows.

With the rows of the grid as blocks, L is block-banded and lower triangular, so that the covariances of rows that L
couples follow from the last row upwards without any factorisation. For a block i with the strip [D; E] and S the covariance
of the next rows,

    Σ_Ji = -S G,   Σ_ii = D⁻ᵀD⁻¹ + Gᵀ S G,   G = E D⁻¹.

This is the recursion of Takahashi, Fagan & Chen (1973) on dense blocks. On the stencil's own entries it would be wrong: it
needs every entry that elimination fills in, and these fill the rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..coefficients import HasCoefficients
from .strips import block_coefficients, block_rows, scan, strip

_EXACT_OPERATIONS = 2**40


def exact_is_affordable(factor: HasCoefficients, reach: int) -> bool:
    """Whether a scan of the covariances of rows up to ``reach`` apart is small enough to be chosen unasked.

    It is if n ((reach + 1) W)² ≤ 2⁴⁰, n sites in rows of W: grids up to 512 x 512 for a 7 x 7 stencil.
    """
    window = (reach + 1) * math.prod(factor.grid[1:])
    return factor.grid.numel() * window**2 <= _EXACT_OPERATIONS


def check_exact_is_affordable(name: str, factor: HasCoefficients, reach: int) -> None:
    """Raise ValueError for what ``name`` can only do exactly, unless `exact_is_affordable`."""
    if not exact_is_affordable(factor, reach):
        raise ValueError(f"{name} needs n (r + 1)² W² ≤ 2⁴⁰, which the grid {tuple(factor.grid)} exceeds")


def scan_covariance(factor: HasCoefficients, reach: int, read: Callable[[int, int, Tensor], Tensor]) -> list[Tensor]:
    """Visit, block by block, the covariances of all pairs of sites whose rows are at most ``reach`` apart.

    Holds one block's covariances at a time; `strips.scan` says what a backward pass needs.

    Args:
        factor: the factor L of Λ.
        reach: at least the stencil's reach along the first axis.
        read: takes the block's first row, its end row, and Σ (*batch, m, m) of the sites of the block and of the next
            ``reach`` rows, as far as there are any; what it returns is kept.

    Returns:
        What ``read`` returned, from the first block to the last.
    """
    rows, row = factor.grid[0], math.prod(factor.grid[1:])
    coefficients = block_coefficients(factor)
    blocks = list(zip(block_rows(factor.grid), coefficients, strict=True))[::-1]

    def step(window: Tensor, block: tuple[int, int], coefficients: Tensor) -> tuple[Tensor, Tensor]:
        covariance = prepend_block(strip(coefficients, factor.stencil, rows - block[0]), window)
        kept = reach * row
        # A view would keep all of the block's covariances for the backward pass.
        return covariance[..., :kept, :kept].contiguous(), read(*block, covariance)

    window = coefficients[0].new_zeros(*coefficients[0].shape[: -len(factor.grid) - 1], 0, 0)
    return scan(step, window, blocks)[::-1]


def prepend_block(strip: Tensor, window: Tensor) -> Tensor:
    """Σ of a block and the rows after it, from the block's strip and the Σ of these rows."""
    width = strip.shape[-1]
    D, E = strip[..., :width, :], strip[..., width:, :]
    coupled = E.shape[-2]  # the window may reach further than the strip
    G = torch.linalg.solve_triangular(D, E, upper=False, left=False)
    inverse = torch.linalg.solve_triangular(D, torch.eye(width, dtype=D.dtype, device=D.device), upper=False)
    cross = window[..., :coupled] @ G
    own = inverse.mT @ inverse + G.mT @ cross[..., :coupled, :]
    own = 0.5 * (own + own.mT)  # what is not symmetric would grow exponentially from row to row
    return torch.cat([torch.cat([own, -cross.mT], -1), torch.cat([-cross, window], -1)], -2)
