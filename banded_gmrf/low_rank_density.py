"""The log density of a field with a low-rank part, composed of the formulas of `factors`, or fused where nothing intervenes.

Fused, it is one operation of a backend with a gradient of its own: see `low_rank_log_density` and `low_rank_gradients` in
``kernels/gmrf_kernels/reference.py``. Transformations of torch, its compiler and its profiler see the composed density, whose
last bits may differ.
"""

import math

import torch
from torch import Tensor

from gmrf_kernels.backends import backend_of
from gmrf_kernels.checks import accumulate_dtype
from gmrf_kernels.low_rank import capacitance_logdet, capacitance_root, solve_capacitance
from gmrf_kernels.registration import nothing_intervenes, requires_grad

from .cholesky import StencilCholesky
from .factors import mixture, products, rank_first, rank_last
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
    value = _differentiable(*arguments, stencil) if requires_grad(arguments) else _fused(*arguments, stencil, False)[0]
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


class _LogDensity(torch.autograd.Function):
    """The fused density and its gradient; where that is differentiated in turn, it is the one of `_composed`."""

    @staticmethod
    def forward(ctx, residual, log_diag, off_diag, factors, stencil):
        value, *kept = _fused(residual, log_diag, off_diag, factors, stencil)
        ctx.save_for_backward(residual, log_diag, off_diag, factors, *kept)
        ctx.stencil = stencil
        return value

    @staticmethod
    def backward(ctx, value_bar):
        *inputs, whitened, system = ctx.saved_tensors
        if torch.is_grad_enabled() or not nothing_intervenes((value_bar,), (*inputs, whitened, system)):
            return *_composed_gradients(ctx, value_bar, inputs), None
        gradients = backend_of(whitened).low_rank_gradients
        return *gradients(value_bar, *inputs, whitened, system, ctx.stencil.offsets, ctx.needs_input_grad[:4]), None


def _fused(
    residual: Tensor, log_diag: Tensor, off_diag: Tensor, factors: Tensor, stencil: Stencil, keep: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of residuals (S, B, *grid), coefficients (B, ...) and factors (B, R, *grid)."""
    return backend_of(residual).low_rank_log_density(residual, log_diag, off_diag, factors, stencil.offsets, keep)


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
