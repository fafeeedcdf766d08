"""Kullback-Leibler divergence between two GMRFs on one grid, whose stencils may differ, each with a low-rank part or without.

    KL(q‖p) = ½ (tr Σ_p⁻¹Σ_q - n + (μ_q - μ_p)ᵀΣ_p⁻¹(μ_q - μ_p)) + ½ log |Σ_p| - ½ log |Σ_q|

With a low-rank part Σ_q = Λ_q⁻¹ + F Fᵀ, and Σ_p⁻¹ = Λ_p - U Uᵀ. Then tr Σ_p⁻¹Σ_q = tr Λ_p Λ_q⁻¹ + tr FᵀΣ_p⁻¹F - ‖L_q⁻¹U‖².
Everything but tr Λ_p Λ_q⁻¹ costs an operation or two for each factor. That trace is the sum of lᵀΛ_q⁻¹l over the columns l of
L_p, for which the covariances of rows within p's reach are enough (`scan_covariance`); or, for large grids, it is
E ‖L_pᵀ L_q⁻ᵀ u‖² over random signs u (Hutchinson, 1990), an estimate that is exact where the factors L are equal.
"""

import math

import torch
from torch import Tensor
from torch.distributions import register_kl

from gmrf_kernels.checks import accumulate_dtype, broadcast_batch, check_device, check_dtype

from ..cholesky import StencilCholesky
from ..factors import rank_first
from ..gmrf import GMRF
from ..low_rank import LowRankGMRF
from ..recursions.covariances import exact_is_affordable, scan_covariance
from ..recursions.strips import block_coefficients, block_rows, strip

_CHUNK_ELEMENTS = 2**25


def kl_divergence(q: GMRF | LowRankGMRF, p: GMRF | LowRankGMRF, method: str = "auto", num_samples: int = 64) -> Tensor:
    """KL(q‖p) = E_q[log q - log p] in nats, differentiable in both; each a `GMRF` or a `LowRankGMRF`.

    ``torch.distributions.kl_divergence(q, p)`` is this function with its defaults.

    Args:
        q, p: distributions on one grid, of one dtype; their batches are broadcast, their stencils may differ.
        method: "exact"; "monte_carlo", for the trace alone; or "auto", which is exact while n (r + 1)² W² ≤ 2⁴⁰, with n sites
            in rows of W and r the longer reach of the two stencils in rows (7 x 7 on 512 x 512 sites), and Monte Carlo beyond.
        num_samples: of Monte Carlo.

    Returns:
        (*batch), in float32 for float16 and bfloat16.

    Raises:
        TypeError: neither a `GMRF` nor a `LowRankGMRF`, or dtypes that differ.
        ValueError: grids, batches or devices that do not fit, another method, or fewer than one sample.
    """
    for name, distribution in (("q", q), ("p", p)):
        if not isinstance(distribution, GMRF | LowRankGMRF):
            raise TypeError(f"{name} is a {type(distribution).__name__}, expected a GMRF")
    if q.event_shape != p.event_shape:
        raise ValueError(f"q has grid {tuple(q.event_shape)}, p has grid {tuple(p.event_shape)}")
    check_dtype("q", q.log_diag, "p", p.log_diag)
    check_device("q", q.log_diag, "p", p.log_diag)
    batch = broadcast_batch("q", q.batch_shape, "p", p.batch_shape)
    if method not in ("auto", "exact", "monte_carlo"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    of, to = (distribution.precision_cholesky.unexpanded() for distribution in (q, p))
    dtype = accumulate_dtype(of.dtype)
    if method == "auto":
        method = "exact" if exact_is_affordable(of, _reach(of, to)) else "monte_carlo"
    trace = _exact_trace(of, to) if method == "exact" else _monte_carlo_trace(of, to, num_samples)
    # In float64: the sum is small where q and p are near, and its terms are large.
    q, p = q.to(torch.float64), p.to(torch.float64)
    ndim = len(q.event_shape)
    if isinstance(q, LowRankGMRF):
        trace = trace + _squares(_centred(p).whiten(rank_first(q.factors, ndim, len(batch))), ndim).sum(0)
    if isinstance(p, LowRankGMRF):
        downdate = rank_first(p.precision_factors, ndim, len(batch))
        trace = trace - _squares(q.precision_cholesky.solve(downdate), ndim).sum(0)
    distance = _squares(_centred(p).whiten(q.loc - p.loc), ndim)
    divergence = 0.5 * (trace - q.event_shape.numel() + distance) + p.entropy() - q.entropy()
    return divergence.expand(batch).to(dtype)


for of in (GMRF, LowRankGMRF):
    for to in (GMRF, LowRankGMRF):
        register_kl(of, to)(kl_divergence)


def _centred(distribution: GMRF | LowRankGMRF) -> GMRF | LowRankGMRF:
    parts = torch.zeros_like(distribution.loc), distribution.precision_cholesky
    if isinstance(distribution, LowRankGMRF):
        return LowRankGMRF(*parts, distribution.factors, validate_args=False)
    return GMRF(*parts, validate_args=False)


def _squares(x: Tensor, ndim: int) -> Tensor:
    return x.square().flatten(-ndim).sum(-1)


def _reach(q: StencilCholesky, p: StencilCholesky) -> int:
    return max(q.stencil.row_reach, p.stencil.row_reach)


def _exact_trace(q: StencilCholesky, p: StencilCholesky) -> Tensor:
    rows = q.grid[0]
    coefficients = dict(zip(block_rows(q.grid), block_coefficients(p), strict=True))

    def part(start: int, stop: int, covariance: Tensor) -> Tensor:
        columns = strip(coefficients[start, stop], p.stencil, rows - start)
        size = columns.shape[-2]
        return (covariance[..., :size, :size] @ columns).mul(columns).sum((-2, -1))

    return sum(scan_covariance(q, _reach(q, p), part))


def _monte_carlo_trace(q: StencilCholesky, p: StencilCholesky, num_samples: int) -> Tensor:
    """The mean of ‖L_pᵀ L_q⁻ᵀ u‖² over vectors u of random signs."""
    shape = (*torch.broadcast_shapes(q.batch_shape, p.batch_shape), *q.grid)
    dtype = accumulate_dtype(q.dtype)
    size = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape)))
    total = torch.zeros((), dtype=dtype, device=q.device)
    for start in range(0, num_samples, size):
        signs = torch.randint(2, (min(size, num_samples - start), *shape), device=q.device).to(dtype) * 2 - 1
        whitened = p.matvec(q.solve(signs, transpose=True), transpose=True)
        total = total + whitened.square().flatten(-len(q.grid)).sum((0, -1))
    return total / num_samples
