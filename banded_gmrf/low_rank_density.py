"""The log density of a field with a low-rank part, composed of the formulas of `factors`, or fused where nothing intervenes.

Fused, the R factors and the S residuals of an image are whitened together, and their inner products taken in one pass. With
whitened factors V in rows, a whitened residual y and the weights a that make q least,

    log p = log |L| - log |C| - ½ q + const,   C Cᵀ = I + V Vᵀ,   q = |y - Vᵀa|² + |a|²

and the gradient, for which a is a constant because q is least there, has combinations of V and y alone:

    ȳ = -(y - Vᵀa),   V̄ = a (y - Vᵀa)ᵀ - (C Cᵀ)⁻¹ V
"""

import math

import torch
from torch import Tensor

from gmrf_kernels.backends import backend_of
from gmrf_kernels.checks import accumulate_dtype
from gmrf_kernels.registration import nothing_intervenes, requires_grad

from .cholesky import StencilCholesky
from .factors import (
    capacitance_logdet,
    capacitance_root,
    mixture,
    products,
    rank_first,
    rank_last,
    solve_capacitance,
)
from .stencil import Stencil


def whitened_factors(factor: StencilCholesky, factors: Tensor, batch_ndim: int) -> tuple[Tensor, Tensor]:
    """V = LᵀF, (*batch, R, *grid), and the root C of I + VᵀV; both in float64.

    Args:
        factor: L, without what `StencilCholesky.expand` repeated.
        factors: F, (*batch, R, *grid).
        batch_ndim: the number of batch axes.
    """
    ndim = factor.stencil.ndim
    fields = rank_first(factors.to(accumulate_dtype(factor.dtype)), ndim, batch_ndim)
    whitened = rank_last(factor.matvec(fields, transpose=True), ndim).double()
    rows = whitened.flatten(-ndim)
    return whitened, capacitance_root(rows @ rows.mT)


def log_density(residual: Tensor, factor: StencilCholesky, factors: Tensor) -> Tensor:
    """log N(residual; 0, Λ⁻¹ + F Fᵀ) in nats, (*sample, *batch), in the dtype of ``residual``.

    Args:
        residual: (*sample, *batch, *grid), of the dtype that is computed with.
        factor: L, without what `StencilCholesky.expand` repeated.
        factors: F, (*batch, R, *grid); its batch and that of L broadcast to ``batch``, or to the last axes of it.
    """
    log_diag, off_diag, stencil = factor.coefficients
    ndim, tensors = stencil.ndim, (residual, log_diag, off_diag, factors)
    batch = factors.shape[: -ndim - 1]
    samples = residual.ndim - ndim - len(batch)
    one_each = batch == log_diag.shape[:-ndim] == off_diag.shape[: -ndim - 1] == residual.shape[samples:-ndim]
    if not one_each or 0 in factors.shape or 0 in residual.shape or not nothing_intervenes(tensors):
        return _composed(residual, factor, factors)
    dtype, items = residual.dtype, math.prod(batch)
    arguments = (
        residual.reshape(-1, items, *factor.grid),
        log_diag.to(dtype).reshape(items, *factor.grid),
        off_diag.reshape(items, -1, *factor.grid),
        factors.to(dtype).reshape(items, -1, *factor.grid),
    )
    if requires_grad(arguments):
        value = _LogDensity.apply(*arguments, stencil)
    else:
        value, *_ = _fused(*arguments, stencil)
    return value.reshape(residual.shape[:-ndim])


def _composed(residual: Tensor, factor: StencilCholesky, factors: Tensor) -> Tensor:
    """`log_density`, of differentiable operations."""
    ndim = factor.stencil.ndim
    n = factor.grid.numel()
    y = factor.matvec(residual, transpose=True)
    batch_ndim = max(len(factor.batch_shape), factors.ndim - ndim - 1)
    whitened, root = whitened_factors(factor, factors, batch_ndim)
    weights = solve_capacitance(root, products(whitened, y, ndim))
    rest = y - mixture(weights, whitened, ndim)
    squares = rest.square().flatten(-ndim).sum(-1) + weights.square().sum(-1)
    logdet = factor.logdet() - capacitance_logdet(root)  # -½ log |Σ|
    return (logdet - 0.5 * squares - 0.5 * n * math.log(2 * math.pi)).to(y.dtype)


def _fused(
    residual: Tensor, log_diag: Tensor, off_diag: Tensor, factors: Tensor, stencil: Stencil
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The log density, (S, B), of residuals (S, B, *grid), coefficients (B, ...) and factors (B, R, *grid).

    Also all fields (R + S, B, *grid), the same whitened, the root C (B, R, R) and the weights a (S, B, R).
    """
    backend, rank, samples = backend_of(residual), factors.shape[1], len(residual)
    fields = torch.cat([factors.movedim(1, 0), residual])
    whitened = backend.matvec(log_diag, off_diag, fields, stencil.offsets, True, True)
    inner = backend.inner_products(whitened, rank)
    root = capacitance_root(inner[:, :rank])
    weights = torch.cholesky_solve(inner[:, rank:].mT, root).permute(2, 0, 1)
    ones = torch.eye(samples, dtype=root.dtype, device=root.device).expand(len(root), samples, samples)
    rest = backend.combinations(torch.cat([-weights.movedim(0, 1), ones], dim=-1), whitened)
    axes = tuple(range(-stencil.ndim, 0))
    squares = rest.square().sum(axes, dtype=root.dtype) + weights.square().sum(-1)
    logdet = log_diag.sum(axes, dtype=root.dtype) - capacitance_logdet(root)
    constant = 0.5 * math.prod(log_diag.shape[1:]) * math.log(2 * math.pi)
    return (logdet - 0.5 * squares - constant).to(residual.dtype), fields, whitened, root, weights


class _LogDensity(torch.autograd.Function):
    """`_fused`, with the gradient above; where that is differentiated in turn, it is the one of `_composed`."""

    @staticmethod
    def forward(ctx, residual, log_diag, off_diag, factors, stencil):
        value, fields, whitened, root, weights = _fused(residual, log_diag, off_diag, factors, stencil)
        ctx.save_for_backward(residual, log_diag, off_diag, factors, fields, whitened, root, weights)
        ctx.stencil = stencil
        return value

    @staticmethod
    def backward(ctx, value_bar):
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not nothing_intervenes((value_bar,), saved):
            return *_composed_gradients(ctx, value_bar, *saved[:4]), None
        _, log_diag, off_diag, _, fields, whitened, root, weights = saved
        backend, offsets, rank = backend_of(whitened), ctx.stencil.offsets, root.shape[-1]
        needs_residual, needs_log_diag, needs_off_diag, needs_factors, _ = ctx.needs_input_grad
        whitened_bar = backend.combinations(_whitened_weights(value_bar.double(), root, weights), whitened)
        residual_bar = log_diag_bar = off_diag_bar = factors_bar = None
        if needs_residual or needs_factors:
            fields_bar = backend.matvec(log_diag, off_diag, whitened_bar, offsets, False, True)
            factors_bar, residual_bar = fields_bar[:rank].movedim(0, 1), fields_bar[rank:]
        if needs_log_diag or needs_off_diag:
            diag_bar, off_diag_bar = backend.outer(fields, whitened_bar, offsets, off_diag.dtype)
            of_logdet = value_bar.sum(0).reshape(-1, *[1] * ctx.stencil.ndim)
            log_diag_bar = diag_bar * log_diag.exp() + of_logdet
        return residual_bar, log_diag_bar, off_diag_bar, factors_bar, None


def _whitened_weights(value_bar: Tensor, root: Tensor, weights: Tensor) -> Tensor:
    """The weights with which the cotangents of V and Y are combinations of both: (B, R + S, R + S)."""
    scaled = (value_bar[..., None] * weights).movedim(0, 1)  # (B, S, R)
    of_factors = scaled.mT @ weights.movedim(0, 1) + value_bar.sum(0)[:, None, None] * torch.cholesky_inverse(root)
    upper = torch.cat([-of_factors, scaled.mT], dim=-1)
    lower = torch.cat([scaled, torch.diag_embed(-value_bar.mT)], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def _composed_gradients(ctx, value_bar: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """The gradients of the four inputs that ask for one, differentiable."""
    asked = ctx.needs_input_grad[:4]
    with torch.enable_grad():
        # Of views, lest a gradient take ways from one input to the other.
        residual, log_diag, off_diag, factors = views = [t.view_as(t) for t in inputs]
        value = _composed(residual, StencilCholesky(log_diag, off_diag, ctx.stencil), factors)
        wanted = [view for view, needed in zip(views, asked, strict=True) if needed]
        found = iter(torch.autograd.grad(value, wanted, value_bar, create_graph=torch.is_grad_enabled()))
    return [next(found) if needed else None for needed in asked]
