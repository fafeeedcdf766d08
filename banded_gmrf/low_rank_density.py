"""The log density of a field with a low-rank part, composed of the formulas of `factors`, or fused where nothing intervenes.

Fused, the R factors and the S residuals of an image are whitened together, and their inner products taken in one pass. With
whitened factors V, a whitened residual y and the weights a that make q least,

    log p = log |L| - log |C| - ½ q + const,   C Cᵀ = I + VᵀV,   q = |y - V a|² + |a|²

and the gradient, for which a is a constant because q is least there, has combinations of V and the rest y - V a alone:

    ȳ = -(y - V a),   V̄ = (y - V a) aᵀ - V (C Cᵀ)⁻¹

Transformations of torch, its compiler and its profiler see the composed density, whose last bits may differ.
"""

import math
from typing import NamedTuple

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
    ndim, batch = stencil.ndim, factor.batch_shape
    if factors.ndim == ndim + 1:
        factors = factors.expand(*batch, *factors.shape)
    # One factor and as many fields for each vector of a sample, none of them empty: what the fused operation takes.
    same_batch = batch == log_diag.shape[:-ndim] == off_diag.shape[: -ndim - 1] == factors.shape[: -ndim - 1]
    same_batch = same_batch and batch == residual.shape[residual.ndim - ndim - len(batch) : -ndim]
    empty = 0 in factors.shape or 0 in residual.shape
    if not same_batch or empty or not nothing_intervenes((residual, log_diag, off_diag, factors)):
        return _composed(residual, factor, factors)
    dtype, items = residual.dtype, math.prod(batch)
    arguments = (
        residual.reshape(-1, items, *factor.grid),
        log_diag.to(dtype).reshape(items, *factor.grid),
        off_diag.reshape(items, -1, *factor.grid),
        factors.to(dtype).reshape(items, -1, *factor.grid),
    )
    value = _differentiable(*arguments, stencil) if requires_grad(arguments) else _fused(*arguments, stencil).value
    return value.reshape(residual.shape[:-ndim])


def _composed(residual: Tensor, factor: StencilCholesky, factors: Tensor) -> Tensor:
    """`log_density`, of differentiable operations."""
    ndim = factor.stencil.ndim
    n = math.prod(factor.grid)
    y = factor.matvec(residual, transpose=True)
    batch_ndim = max(len(factor.batch_shape), factors.ndim - ndim - 1)
    whitened, root = whitened_factors(factor, factors, batch_ndim)
    weights = solve_capacitance(root, products(whitened, y, ndim))
    rest = y - mixture(weights, whitened, ndim)
    squares = rest.square().flatten(-ndim).sum(-1) + weights.square().sum(-1)
    logdet = factor.logdet() - capacitance_logdet(root)  # -½ log |Σ|
    return (logdet - 0.5 * squares - 0.5 * n * math.log(2 * math.pi)).to(y.dtype)


class _Fused(NamedTuple):
    """A log density, and what its gradient needs.

    Attributes:
        value: (S, B).
        fields: factors and residuals, (R + S, B, *grid).
        whitened: V, and the rests y - V a: (R + S, B, *grid).
        root: C, (B, R, R) in float64.
        weights: a, (S, B, R) in float64.
    """

    value: Tensor
    fields: Tensor
    whitened: Tensor
    root: Tensor
    weights: Tensor


def _fused(residual: Tensor, log_diag: Tensor, off_diag: Tensor, factors: Tensor, stencil: Stencil) -> _Fused:
    """Of residuals (S, B, *grid), coefficients (B, ...) and factors (B, R, *grid)."""
    backend, rank = backend_of(residual), factors.shape[1]
    fields = torch.cat([factors.movedim(1, 0), residual])
    whitened = backend.matvec(log_diag, off_diag, fields, stencil.offsets, True, True)
    inner = backend.inner_products(whitened, rank)
    root = capacitance_root(inner[:, :rank])
    weights = torch.cholesky_solve(inner[:, rank:].mT, root).permute(2, 0, 1)
    rest = whitened[rank:]
    rest -= backend.combinations(weights.movedim(0, 1), whitened[:rank])
    axes = tuple(range(-stencil.ndim, 0))
    squares = rest.square().sum(axes, dtype=root.dtype) + weights.square().sum(-1)
    logdet = log_diag.sum(axes, dtype=root.dtype) - capacitance_logdet(root)
    constant = 0.5 * math.prod(log_diag.shape[1:]) * math.log(2 * math.pi)
    value = (logdet - 0.5 * squares - constant).to(residual.dtype)
    return _Fused(value, fields, whitened, root, weights)


class _LogDensity(torch.autograd.Function):
    """`_fused`, with the gradient above; where that is differentiated in turn, it is the one of `_composed`."""

    @staticmethod
    def forward(ctx, residual, log_diag, off_diag, factors, stencil):
        value, fields, *kept = _fused(residual, log_diag, off_diag, factors, stencil)
        # For the gradient of L alone, and as large as all that the density is of.
        fields = fields if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(residual, log_diag, off_diag, factors, fields, *kept)
        ctx.stencil = stencil
        return value

    @staticmethod
    def backward(ctx, value_bar):
        inputs, (fields, whitened, root, weights) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if torch.is_grad_enabled() or not nothing_intervenes((value_bar,), (*inputs, whitened, root, weights)):
            return *_composed_gradients(ctx, value_bar, inputs), None
        _, log_diag, off_diag, _ = inputs
        backend, offsets, ndim = backend_of(whitened), ctx.stencil.offsets, ctx.stencil.ndim
        samples, _, rank = weights.shape
        scale = value_bar.double()
        of_rest = (scale[..., None] * weights).permute(1, 2, 0)
        of_factors = scale.sum(0)[:, None, None] * torch.cholesky_inverse(root)
        whitened_bar = backend.combinations(torch.cat([-of_factors, of_rest], -1), whitened, samples)
        torch.mul(whitened[rank:], -value_bar.reshape(*value_bar.shape, *[1] * ndim), out=whitened_bar[rank:])
        needs_residual, needs_log_diag, needs_off_diag, needs_factors, _ = ctx.needs_input_grad
        residual_bar = log_diag_bar = off_diag_bar = factors_bar = None
        if needs_factors:
            wanted = whitened_bar if needs_residual else whitened_bar[:rank]
            fields_bar = backend.matvec(log_diag, off_diag, wanted, offsets, False, True)
            factors_bar = fields_bar[:rank].movedim(0, 1)
            # A copy: the view would keep the gradient of the factors, which is larger.
            residual_bar = fields_bar[rank:].clone() if needs_residual else None
        elif needs_residual:
            residual_bar = backend.matvec(log_diag, off_diag, whitened_bar[rank:], offsets, False, True)
        if needs_log_diag or needs_off_diag:
            diag_bar, off_diag_bar = backend.outer(fields, whitened_bar, offsets, off_diag.dtype)
            log_diag_bar = diag_bar * log_diag.exp() + value_bar.sum(0).reshape(-1, *[1] * ndim)
        return residual_bar, log_diag_bar, off_diag_bar, factors_bar, None


# Not `_LogDensity.apply`, which looks up signatures at every call.
_differentiable = super(torch.autograd.Function, _LogDensity).apply


def _composed_gradients(ctx, value_bar: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients of the four inputs that ask for one, differentiable where autograd records."""
    asked, again = ctx.needs_input_grad[:4], torch.is_grad_enabled()
    with torch.enable_grad():
        # Of views, lest a gradient take ways from one input to the other.
        residual, log_diag, off_diag, factors = views = [t.view_as(t) for t in inputs]
        value = _composed(residual, StencilCholesky(log_diag, off_diag, ctx.stencil), factors)
        wanted = [view for view, needed in zip(views, asked, strict=True) if needed]
        found = iter(torch.autograd.grad(value, wanted, value_bar, create_graph=again))
    return [next(found) if needed else None for needed in asked]
