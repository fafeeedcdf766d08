"""Marginal variances and local covariances of a GMRF: the selected inverse of Λ, exactly or by Monte Carlo.

Exact: with the rows of the grid as blocks, L is block-banded and lower triangular, so that the covariances of rows that L
couples follow from the last row upwards without any factorisation. For a block i with the strip [D; E] and S the covariance
of the next rows,

    Σ_Ji = -S G,   Σ_ii = D⁻ᵀD⁻¹ + Gᵀ S G,   G = E D⁻¹.

This is the recursion of Takahashi, Fagan & Chen (1973) on dense blocks. On the stencil's own entries it would be wrong: it
needs every entry that elimination fills in, and these fill the rows.

Monte Carlo: Rao-Blackwellised over each site given all others (Sidén, Lindgren, Bolin & Villani, Efficient covariance
approximations for large sparse precision matrices, JCGS 2018).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gmrf_kernels
from gmrf_kernels.checks import accumulate_dtype

from .cholesky import StencilCholesky
from .strips import block_coefficients, block_rows, radius, scan, strip

_EXACT_OPERATIONS = 2**40
_CHUNK_ELEMENTS = 2**22


class VarianceEstimate(NamedTuple):
    """Marginal variances and their standard errors, 0 where they are exact; both (*batch, *grid)."""

    variance: Tensor
    standard_error: Tensor


def marginal_variance(factor: StencilCholesky, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
    """The diagonal of Λ⁻¹; see `GMRF.marginal_variance`. (*batch, *grid), in float32 for float16 and bfloat16 factors."""
    if method not in ("auto", "exact", "monte_carlo"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    if method == "auto":
        method = "exact" if exact_is_affordable(factor, radius(factor.stencil)) else "monte_carlo"
    if method == "exact":
        variance = _exact_variance(factor)
        estimate = VarianceEstimate(variance, torch.zeros_like(variance))
    else:
        estimate = _monte_carlo_variance(factor, num_samples)
    return VarianceEstimate(*(t.expand(*factor.batch_shape, *factor.grid) for t in estimate))


def exact_is_affordable(factor: StencilCholesky, reach: int) -> bool:
    """Whether a scan of the covariances of rows up to ``reach`` apart is small enough to be chosen unasked.

    It is if n ((reach + 1) W)² ≤ 2⁴⁰, n sites in rows of W: grids up to 512 x 512 for a 7 x 7 stencil.
    """
    window = (reach + 1) * math.prod(factor.grid[1:])
    return factor.grid.numel() * window**2 <= _EXACT_OPERATIONS


def check_exact_is_affordable(name: str, factor: StencilCholesky, reach: int) -> None:
    """Raise ValueError for what ``name`` can only do exactly, unless `exact_is_affordable`."""
    if not exact_is_affordable(factor, reach):
        raise ValueError(f"{name} needs n (r + 1)² W² ≤ 2⁴⁰, which the grid {tuple(factor.grid)} exceeds")


def scan_covariance(factor: StencilCholesky, reach: int, read: Callable[[int, int, Tensor], Tensor]) -> list[Tensor]:
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
        covariance = _prepend_block(strip(coefficients, factor.stencil, rows - block[0]), window)
        kept = reach * row
        # A view would keep all of the block's covariances for the backward pass.
        return covariance[..., :kept, :kept].contiguous(), read(*block, covariance)

    window = coefficients[0].new_zeros(*coefficients[0].shape[: -len(factor.grid) - 1], 0, 0)
    return scan(step, window, blocks)[::-1]


def _prepend_block(strip: Tensor, window: Tensor) -> Tensor:
    """Σ of a block and the rows after it, from the block's strip and the Σ of these rows."""
    width = strip.shape[-1]
    D, E = strip[..., :width, :], strip[..., width:, :]
    coupled = E.shape[-2]  # the window may reach further than the strip
    G = torch.linalg.solve_triangular(D, E, upper=False, left=False)
    inverse = torch.linalg.solve_triangular(D, torch.eye(width, dtype=D.dtype, device=D.device), upper=False)
    cross = window[..., :coupled] @ G
    size = width + window.shape[-1]
    covariance = window.new_empty(*window.shape[:-2], size, size)  # in place: nested calls of cat would copy the window twice
    own = inverse.mT @ inverse + G.mT @ cross[..., :coupled, :]
    covariance[..., :width, :width] = 0.5 * (own + own.mT)  # what is not symmetric would grow exponentially from row to row
    covariance[..., width:, :width] = -cross
    covariance[..., :width, width:] = -cross.mT
    covariance[..., width:, width:] = window
    return covariance


def _exact_variance(factor: StencilCholesky) -> Tensor:
    reach = radius(factor.stencil)
    row = math.prod(factor.grid[1:])

    def own_variance(start: int, stop: int, covariance: Tensor) -> Tensor:
        return covariance.diagonal(dim1=-2, dim2=-1)[..., : (stop - start) * row].clone()  # a view would keep the block

    batch = factor.batch_shape.numel()
    size = max(1, _CHUNK_ELEMENTS // ((reach + 1) * row) ** 2)
    if batch <= size:
        return torch.cat(scan_covariance(factor, reach, own_variance), -1).unflatten(-1, factor.grid)
    chunks = zip(
        factor.log_diag.reshape(batch, *factor.grid).split(size),
        factor.off_diag.reshape(batch, len(factor.stencil), *factor.grid).split(size),
        strict=True,
    )
    variances = [_exact_variance(StencilCholesky(*chunk, factor.stencil)) for chunk in chunks]
    return torch.cat(variances).unflatten(0, factor.batch_shape)


def _monte_carlo_variance(factor: StencilCholesky, num_samples: int) -> VarianceEstimate:
    """Var x_j = 1 / Λ_jj + Var E[x_j | others], the second term from samples of mean 0.

    E[x_j | others] = x_j - (Λ x)_j / Λ_jj, and Λ x = L u for the sample x = L⁻ᵀu. It is normal with mean 0, so that the mean
    of N squares has the standard error √(2 / N) times its expectation.
    """
    dtype = accumulate_dtype(factor.dtype)
    shape = (*factor.batch_shape, *factor.grid)
    conditional_variance = 1 / precision_diagonal(factor)
    size = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape)))
    squares = torch.zeros((), dtype=dtype, device=factor.device)
    for start in range(0, num_samples, size):
        u = torch.randn(min(size, num_samples - start), *shape, dtype=dtype, device=factor.device)
        conditional_mean = factor.solve(u, transpose=True) - factor.matvec(u) * conditional_variance
        squares = squares + conditional_mean.square().sum(0)
    explained = squares / num_samples
    return VarianceEstimate(conditional_variance + explained, explained * math.sqrt(2 / num_samples))


def precision_diagonal(factor: StencilCholesky) -> Tensor:
    """The diagonal of Λ, the sums of squares of the rows of L: (*batch, *grid)."""
    diag = factor.diag
    exists = factor.stencil.mask(factor.grid, device=factor.device)
    squares = factor._off_diag.to(diag.dtype).where(exists, 0).square()  # NaN that is merely ignored has a NaN derivative
    return gmrf_kernels.matvec(diag.square(), squares, torch.ones_like(diag), factor.stencil.offsets, factor.stencil.ndim)
