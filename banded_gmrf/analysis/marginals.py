"""Marginal variances of a GMRF, the diagonal of Λ⁻¹: exact, by recursion over rows, or by Monte Carlo.

Monte Carlo is Rao-Blackwellised over each site given all others (Sidén, Lindgren, Bolin & Villani, Efficient covariance
approximations for large sparse precision matrices, JCGS 2018).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels import standard_normal
from gmrf_kernels.checks import accumulate_dtype

from ..cholesky import StencilCholesky, squares_matvec
from ..recursions.covariances import exact_is_affordable, scan_covariance

_CHUNK_ELEMENTS = 2**22


class VarianceEstimate(NamedTuple):
    """Marginal variances and their standard errors, 0 where they are exact; both (*batch, *grid)."""

    variance: Tensor
    standard_error: Tensor


def marginal_variance(factor: StencilCholesky, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
    """The diagonal of Λ⁻¹; see `GMRF.marginal_variance`. (*batch, *grid), in float64 if exact."""
    if method not in ("auto", "exact", "monte_carlo"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    if method == "auto":
        method = "exact" if exact_is_affordable(factor, factor.stencil.row_reach) else "monte_carlo"
    if method == "exact":
        variance = _exact_variance(factor)
        estimate = VarianceEstimate(variance, torch.zeros_like(variance))
    else:
        estimate = _monte_carlo_variance(factor, num_samples)
    return VarianceEstimate(*(t.expand(*factor.batch_shape, *factor.grid) for t in estimate))


def _exact_variance(factor: StencilCholesky) -> Tensor:
    reach = factor.stencil.row_reach
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
        u = standard_normal((min(size, num_samples - start), *shape), dtype, factor.device)
        conditional_mean = factor.solve(u, transpose=True) - factor.matvec(u) * conditional_variance
        squares = squares + conditional_mean.square().sum(0)
    explained = squares / num_samples
    return VarianceEstimate(conditional_variance + explained, explained * math.sqrt(2 / num_samples))


def precision_diagonal(factor: StencilCholesky) -> Tensor:
    """The diagonal of Λ, the sums of squares of the rows of L: (*batch, *grid)."""
    return squares_matvec(factor, torch.ones_like(factor.diag))
