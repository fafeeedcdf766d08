"""The registered operators and their derivatives (``torch.ops.gmrf_kernels.*``), in one canonical layout.

Factors are (B, ...) and vectors (S, B, *grid), S of them sharing each factor. Every rule is written with the same operators, so
derivatives of every order and mode exist. With y = L x and x = L⁻¹b, P the entries on the stencil, a bar for cotangents and a
dot for tangents:

    matvec   x̄ = Lᵀȳ          L̄ = P(ȳ xᵀ)               ẏ = L̇ x + L ẋ
    solve    b̄ = L⁻ᵀx̄         L̄ = -P(b̄ xᵀ)              ẋ = L⁻¹(ḃ - L̇ x)

L̇ is a factor whose diagonal has any sign. Where the diagonal is given as a logarithm, that of L̇ is the diagonal times the
logarithm's tangent.
"""

import torch
from torch import Tensor

from .backends import backend_of
from .registration import Derivatives, Operator, nothing_intervenes, requires_grad
from .stencils import Offsets

# --- products and solves ---


def _matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    return backend_of(x).matvec(diag, off_diag, x, offsets, transpose, log)


def _solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    if b.numel() == 0:
        return torch.empty_like(b, memory_format=torch.contiguous_format)
    return backend_of(b).solve(diag, off_diag, b, offsets, transpose, log)


def _fake_vector(diag, off_diag, x, offsets, transpose, log):
    return x.new_empty(x.shape)


def _factor_bar(ctx, a, b, diag, off_diag):
    """Cotangents P(a bᵀ) of ``diag`` and ``off_diag``, the first two inputs of an operation, where they are asked for."""
    if not any(ctx.needs_input_grad[:2]):
        return None, None
    diag_bar, off_diag_bar = outer(a, b, ctx.offsets, off_diag.dtype)
    return diag_bar * diag.exp() if ctx.log else diag_bar, off_diag_bar


def _times_factor_dot(ctx, diag, off_diag, diag_dot, off_diag_dot, x, transpose, log):
    """L̇ x, or L̇ᵀx, from the tangents of ``diag`` and ``off_diag``; None where neither is given."""
    if diag_dot is None and off_diag_dot is None:
        return None
    if diag_dot is None:
        diag_dot = torch.zeros_like(diag)
    elif log:
        diag_dot = diag_dot * diag.exp()
    if off_diag_dot is None:
        off_diag_dot = torch.zeros_like(off_diag)
    return matvec(diag_dot, off_diag_dot, x, ctx.offsets, transpose, False)


def _plus(a, b):
    """The sum of those that are given."""
    return b if a is None else a if b is None else a + b


class _Matvec(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        diag, off_diag, x, ctx.offsets, ctx.transpose, ctx.log, _ = inputs
        Derivatives.keep(ctx, diag, off_diag, x)

    @staticmethod
    def backward(ctx, y_bar):
        if y_bar is None:
            return (None,) * 7
        diag, off_diag, x = ctx.saved_tensors
        x_bar = None
        if ctx.needs_input_grad[2]:
            x_bar = matvec(diag, off_diag, y_bar, ctx.offsets, not ctx.transpose, ctx.log)
        a, b = (x, y_bar) if ctx.transpose else (y_bar, x)
        return *_factor_bar(ctx, a, b, diag, off_diag), x_bar, None, None, None, None

    @staticmethod
    def forward_rule(ctx, saved, diag_dot, off_diag_dot, x_dot, *_):
        diag, off_diag, x = saved
        y_dot = _times_factor_dot(ctx, diag, off_diag, diag_dot, off_diag_dot, x, ctx.transpose, ctx.log)
        if x_dot is not None:
            y_dot = _plus(y_dot, matvec(diag, off_diag, x_dot, ctx.offsets, ctx.transpose, ctx.log))
        return y_dot


class _Solve(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        diag, off_diag, _, ctx.offsets, ctx.transpose, ctx.log, _ = inputs
        Derivatives.keep(ctx, diag, off_diag, output)

    @staticmethod
    def backward(ctx, x_bar):
        if x_bar is None:
            return (None,) * 7
        diag, off_diag, x = ctx.saved_tensors
        b_bar = solve(diag, off_diag, x_bar, ctx.offsets, not ctx.transpose, ctx.log)
        a, b = (x, -b_bar) if ctx.transpose else (-b_bar, x)
        return *_factor_bar(ctx, a, b, diag, off_diag), b_bar, None, None, None, None

    @staticmethod
    def forward_rule(ctx, saved, diag_dot, off_diag_dot, b_dot, *_):
        diag, off_diag, x = saved
        product = _times_factor_dot(ctx, diag, off_diag, diag_dot, off_diag_dot, x, ctx.transpose, ctx.log)
        right_hand_side = _plus(b_dot, None if product is None else -product)
        return solve(diag, off_diag, right_hand_side, ctx.offsets, ctx.transpose, ctx.log)


# --- the adjoint of a product in the factor ---


def _outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return backend_of(a).outer(a, b, offsets, dtype)


def _fake_outer(a, b, offsets, dtype):
    batch, *grid = a.shape[1:]
    return a.new_empty((batch, *grid)), a.new_empty((batch, len(offsets) // len(grid), *grid), dtype=dtype)


def _times_factor_bar(diag_bar, off_diag_bar, x, offsets, dtype, transpose):
    """The product with a factor of cotangents, one of which may not be given."""
    batch, *grid = x.shape[1:]
    if diag_bar is None:
        diag_bar = x.new_zeros((batch, *grid))
    if off_diag_bar is None:
        off_diag_bar = x.new_zeros((batch, len(offsets), *grid), dtype=dtype)
    return matvec(diag_bar, off_diag_bar, x, offsets, transpose, False)


class _Outer(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.offsets, ctx.dtype, _ = inputs
        Derivatives.keep(ctx, a, b)

    @staticmethod
    def backward(ctx, diag_bar, off_diag_bar):
        if diag_bar is None and off_diag_bar is None:
            return (None,) * 5
        a, b = ctx.saved_tensors
        a_bar = b_bar = None
        if ctx.needs_input_grad[0]:
            a_bar = _times_factor_bar(diag_bar, off_diag_bar, b, ctx.offsets, ctx.dtype, False)
        if ctx.needs_input_grad[1]:
            b_bar = _times_factor_bar(diag_bar, off_diag_bar, a, ctx.offsets, ctx.dtype, True)
        return a_bar, b_bar, None, None, None

    @staticmethod
    def forward_rule(ctx, saved, a_dot, b_dot, *_):
        return outer(*_product_rule(*saved, a_dot, b_dot), ctx.offsets, ctx.dtype)


def _product_rule(a, b, a_dot, b_dot):
    """Vectors whose `outer` is that of ȧ and b plus that of a and ḃ: a sum over more samples, rounded once."""
    if a_dot is None or b_dot is None:
        return (a, b_dot) if a_dot is None else (a_dot, b)
    return torch.cat([a_dot, a]), torch.cat([b, b_dot])


# --- the likelihood ---


def _nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    return backend_of(residual).nll(residual, log_diag, off_diag, offsets)


def _fake_nll(residual, log_diag, off_diag, offsets):
    return residual.new_empty(residual.shape[:2]), residual.new_empty(residual.shape)


def _over_grid(scale: Tensor, ndim: int) -> Tensor:
    """A value per vector or per factor, with ``ndim`` axes of size 1 behind it."""
    return scale.reshape(*scale.shape, *[1] * ndim)


def _grid_axes(log_diag: Tensor) -> tuple[int, ...]:
    """The last axes, to sum over: `flatten` has no batching rule for ``is_grads_batched``."""
    return tuple(range(1 - log_diag.ndim, 0))


def _nll_bars(ctx, residual, log_diag, off_diag, whitened, value_bar, whitened_bar):
    """Cotangents of ``residual``, ``log_diag`` and ``off_diag``, where they are asked for."""
    ndim = log_diag.ndim - 1
    needs_residual, needs_log_diag, needs_off_diag, *_ = ctx.needs_input_grad
    # The cotangent of the whitened residual: the value's through ½ yᵀy, and its own in a second backward. The value's
    # gradient for the factor alone does without.
    cotangent = whitened_bar
    if value_bar is not None and (whitened_bar is not None or needs_residual):
        cotangent = _plus(_over_grid(value_bar, ndim) * whitened, whitened_bar)
    residual_bar = log_diag_bar = off_diag_bar = None
    if needs_residual:
        residual_bar = matvec(log_diag, off_diag, cotangent, ctx.offsets, False, True)
    if not needs_log_diag and not needs_off_diag:
        return residual_bar, None, None
    if whitened_bar is None:
        log_diag_bar, off_diag_bar = nll_factor_grad(value_bar, residual, whitened, log_diag, ctx.offsets, off_diag.dtype)
    else:
        diag_bar, off_diag_bar = outer(residual, cotangent, ctx.offsets, off_diag.dtype)
        log_diag_bar = diag_bar * log_diag.exp()
        if value_bar is not None:
            log_diag_bar = log_diag_bar - _over_grid(value_bar.sum(0), ndim)
    return residual_bar, log_diag_bar, off_diag_bar


class _NLL(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        residual, log_diag, off_diag, ctx.offsets, _ = inputs
        Derivatives.keep(ctx, residual, log_diag, off_diag, output[1])

    @staticmethod
    def backward(ctx, value_bar, whitened_bar):
        if value_bar is None and whitened_bar is None:
            return (None,) * 5
        return *_nll_bars(ctx, *ctx.saved_tensors, value_bar, whitened_bar), None, None

    @staticmethod
    def forward_rule(ctx, saved, residual_dot, log_diag_dot, off_diag_dot, *_):
        residual, log_diag, off_diag, whitened = saved
        whitened_dot = _times_factor_dot(ctx, log_diag, off_diag, log_diag_dot, off_diag_dot, residual, True, True)
        if residual_dot is not None:
            whitened_dot = _plus(whitened_dot, matvec(log_diag, off_diag, residual_dot, ctx.offsets, True, True))
        axes = _grid_axes(log_diag)
        value_dot = (whitened * whitened_dot).sum(axes)
        if log_diag_dot is not None:
            value_dot = value_dot - log_diag_dot.sum(axes)
        return value_dot, whitened_dot


class _Value(torch.autograd.Function):
    """The likelihood's value where nothing but autograd sees the call.

    Torch takes as long for the whitened residual as a second result as a small kernel runs: it is only kept. Where the
    gradient is differentiated in turn, it is computed again, differentiably.
    """

    @staticmethod
    def forward(ctx, residual, log_diag, off_diag, offsets):
        value, whitened = _nll(residual, log_diag, off_diag, offsets)
        ctx.save_for_backward(residual, log_diag, off_diag, whitened)
        ctx.offsets = offsets
        return value

    @staticmethod
    def backward(ctx, value_bar):
        residual, log_diag, off_diag, whitened = ctx.saved_tensors
        if torch.is_grad_enabled():
            _, whitened = nll(residual, log_diag, off_diag, ctx.offsets)
        elif not ctx.needs_input_grad[0] and nothing_intervenes((value_bar,), (residual, log_diag, off_diag, whitened)):
            backend = backend_of(residual)
            return None, *backend.nll_factor_grad(value_bar, residual, whitened, log_diag, ctx.offsets, off_diag.dtype), None
        return *_nll_bars(ctx, residual, log_diag, off_diag, whitened, value_bar, None), None


# Not `_Value.apply`, which looks up signatures at every call.
_value = super(torch.autograd.Function, _Value).apply


def nll_value(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets, direct: bool) -> Tensor:
    """The first result of `nll`; ``direct`` where nothing intervenes between tensors like these."""
    if not direct:
        return nll(residual, log_diag, off_diag, offsets)[0]
    if requires_grad((residual, log_diag, off_diag)):
        return _value(residual, log_diag, off_diag, offsets)
    return _nll(residual, log_diag, off_diag, offsets)[0]


def _nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return backend_of(residual).nll_factor_grad(scale, residual, whitened, log_diag, offsets, dtype)


def _fake_nll_factor_grad(scale, residual, whitened, log_diag, offsets, dtype):
    return _fake_outer(residual, whitened, offsets, dtype)


class _NLLFactorGrad(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        scale, residual, whitened, log_diag, ctx.offsets, ctx.dtype, _ = inputs
        Derivatives.keep(ctx, scale, residual, whitened, log_diag)

    @staticmethod
    def backward(ctx, log_diag_g, off_diag_g):
        if log_diag_g is None and off_diag_g is None:
            return (None,) * 7
        scale, residual, whitened, log_diag = ctx.saved_tensors
        axes, ndim = _grid_axes(log_diag), log_diag.ndim - 1
        scaled = _over_grid(scale, ndim) * whitened
        diag_g = None if log_diag_g is None else log_diag_g * log_diag.exp()
        residual_bar = _times_factor_bar(diag_g, off_diag_g, scaled, ctx.offsets, ctx.dtype, False)
        scaled_bar = _times_factor_bar(diag_g, off_diag_g, residual, ctx.offsets, ctx.dtype, True)
        scale_bar, log_diag_bar = (scaled_bar * whitened).sum(axes), None
        if log_diag_g is not None:
            scale_bar = scale_bar - log_diag_g.sum(axes)
            log_diag_bar = (residual * scaled).sum(0) * diag_g
        return scale_bar, residual_bar, _over_grid(scale, ndim) * scaled_bar, log_diag_bar, None, None, None

    @staticmethod
    def forward_rule(ctx, saved, scale_dot, residual_dot, whitened_dot, log_diag_dot, *_):
        scale, residual, whitened, log_diag = saved
        ndim = log_diag.ndim - 1
        scaled = _over_grid(scale, ndim) * whitened
        scaled_dot = _plus(
            None if scale_dot is None else _over_grid(scale_dot, ndim) * whitened,
            None if whitened_dot is None else _over_grid(scale, ndim) * whitened_dot,
        )
        if residual_dot is None and scaled_dot is None:
            residual_dot = torch.zeros_like(residual)
        diag_dot, off_diag_dot = outer(*_product_rule(residual, scaled, residual_dot, scaled_dot), ctx.offsets, ctx.dtype)
        if log_diag_dot is not None:
            diag_dot = diag_dot + (residual * scaled).sum(0) * log_diag_dot
        diag_dot = diag_dot * log_diag.exp()
        if scale_dot is not None:
            diag_dot = diag_dot - _over_grid(scale_dot.sum(0), ndim)
        return diag_dot, off_diag_dot


matvec = Operator(
    "matvec(Tensor diag, Tensor off_diag, Tensor x, int[] offsets, bool transpose, bool log) -> Tensor",
    *(_matvec, _fake_vector, _Matvec),
    vector=2,
    batch_axes=(0, 0, 1),
    factors=(0, 1),
    out_axes=(1,),
)
solve = Operator(
    "solve(Tensor diag, Tensor off_diag, Tensor b, int[] offsets, bool transpose, bool log) -> Tensor",
    *(_solve, _fake_vector, _Solve),
    vector=2,
    batch_axes=(0, 0, 1),
    factors=(0, 1),
    out_axes=(1,),
)
outer = Operator(
    "outer(Tensor a, Tensor b, int[] offsets, ScalarType dtype) -> (Tensor, Tensor)",
    *(_outer, _fake_outer, _Outer),
    vector=0,
    batch_axes=(1, 1),
    factors=(),
    out_axes=(0, 0),
)
nll = Operator(
    "nll(Tensor residual, Tensor log_diag, Tensor off_diag, int[] offsets) -> (Tensor, Tensor)",
    *(_nll, _fake_nll, _NLL),
    vector=0,
    batch_axes=(1, 0, 0),
    factors=(1, 2),
    out_axes=(1, 1),
)
nll_factor_grad = Operator(
    "nll_factor_grad(Tensor scale, Tensor residual, Tensor whitened, Tensor log_diag, int[] offsets, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    *(_nll_factor_grad, _fake_nll_factor_grad, _NLLFactorGrad),
    vector=1,
    batch_axes=(1, 1, 1, 0),
    factors=(),
    out_axes=(0, 0),
)
