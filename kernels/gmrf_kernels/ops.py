"""The operations as users of raw tensors call them, and their registration with torch.

From the bottom up: the registered operators (``torch.ops.gmrf_kernels.*``) take one canonical layout, factors (B, ...) and
vectors (S, B, *grid), S of them sharing each factor. Every backward is written with the same operators, so gradients of
every order exist. The public functions below them check their arguments, broadcast as torch does, and sort the batch axes
into those that own a factor (B) and those that share one (S), so that a shared factor is read once and never copied.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import backend_for
from .checks import accumulate_dtype, check_device, check_dtype, check_factor, check_tensor, check_vector
from .layout import Layout
from .stencils import Offsets, unflatten


@torch.library.custom_op("gmrf_kernels::matvec", mutates_args=())
def _matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Sequence[int], transpose: bool, log: bool) -> Tensor:
    return backend_for(x.device).matvec(diag, off_diag, x, unflatten(offsets, diag.ndim - 1), transpose, log)


@torch.library.custom_op("gmrf_kernels::solve", mutates_args=())
def _solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Sequence[int], transpose: bool, log: bool) -> Tensor:
    if b.numel() == 0:
        return torch.empty_like(b, memory_format=torch.contiguous_format)
    return backend_for(b.device).solve(diag, off_diag, b, unflatten(offsets, diag.ndim - 1), transpose, log)


@torch.library.custom_op("gmrf_kernels::outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, offsets: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return backend_for(a.device).outer(a, b, unflatten(offsets, a.ndim - 2), dtype)


@torch.library.custom_op("gmrf_kernels::nll", mutates_args=())
def _nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    return backend_for(residual.device).nll(residual, log_diag, off_diag, unflatten(offsets, log_diag.ndim - 1))


@torch.library.custom_op("gmrf_kernels::nll_factor_grad", mutates_args=())
def _nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    offsets = unflatten(offsets, log_diag.ndim - 1)
    return backend_for(residual.device).nll_factor_grad(scale, residual, whitened, log_diag, offsets, dtype)


@_matvec.register_fake
@_solve.register_fake
def _(diag, off_diag, x, offsets, transpose, log):
    return x.new_empty(x.shape)


def _fake_factor(like, offsets, dtype):
    """Empty tensors shaped as the diagonal and the off-diagonals of a factor for vectors shaped as ``like``."""
    batch, *grid = like.shape[1:]
    return like.new_empty((batch, *grid)), like.new_empty((batch, len(offsets) // len(grid), *grid), dtype=dtype)


@_outer.register_fake
def _(a, b, offsets, dtype):
    return _fake_factor(a, offsets, dtype)


@_nll.register_fake
def _(residual, log_diag, off_diag, offsets):
    return residual.new_empty(residual.shape[:2]), residual.new_empty(residual.shape)


@_nll_factor_grad.register_fake
def _(scale, residual, whitened, log_diag, offsets, dtype):
    return _fake_factor(residual, offsets, dtype)


def _over_grid(scale: Tensor, ndim: int) -> Tensor:
    """A value per vector or per factor, with ``ndim`` axes of size 1 behind it."""
    return scale.reshape(*scale.shape, *[1] * ndim)


def _factor_bar(ctx, a, b, diag, off_diag):
    """Cotangents P(a bᵀ) of ``diag`` and ``off_diag``, the first two inputs of an operation, where they are asked for."""
    if not any(ctx.needs_input_grad[:2]):
        return None, None
    diag_bar, off_diag_bar = _outer(a, b, ctx.offsets, off_diag.dtype)
    return diag_bar * diag.exp() if ctx.log else diag_bar, off_diag_bar


def _matvec_setup(ctx, inputs, output):
    diag, off_diag, x, ctx.offsets, ctx.transpose, ctx.log = inputs
    ctx.save_for_backward(diag, off_diag, x)


def _matvec_backward(ctx, g):
    diag, off_diag, x = ctx.saved_tensors
    x_bar = _matvec(diag, off_diag, g, ctx.offsets, not ctx.transpose, ctx.log) if ctx.needs_input_grad[2] else None
    a, b = (x, g) if ctx.transpose else (g, x)
    return *_factor_bar(ctx, a, b, diag, off_diag), x_bar, None, None, None


def _solve_setup(ctx, inputs, output):
    diag, off_diag, _, ctx.offsets, ctx.transpose, ctx.log = inputs
    ctx.save_for_backward(diag, off_diag, output)


def _solve_backward(ctx, g):
    diag, off_diag, x = ctx.saved_tensors
    v = _solve(diag, off_diag, g, ctx.offsets, not ctx.transpose, ctx.log)
    a, b = (x, -v) if ctx.transpose else (-v, x)
    return *_factor_bar(ctx, a, b, diag, off_diag), v, None, None, None


def _outer_setup(ctx, inputs, output):
    a, b, ctx.offsets, _ = inputs
    ctx.save_for_backward(a, b)


def _outer_backward(ctx, diag_g, off_diag_g):
    a, b = ctx.saved_tensors
    a_bar = _matvec(diag_g, off_diag_g, b, ctx.offsets, False, False) if ctx.needs_input_grad[0] else None
    b_bar = _matvec(diag_g, off_diag_g, a, ctx.offsets, True, False) if ctx.needs_input_grad[1] else None
    return a_bar, b_bar, None, None


def _nll_setup(ctx, inputs, output):
    residual, log_diag, off_diag, ctx.offsets = inputs
    ctx.save_for_backward(residual, log_diag, off_diag, output[1])
    ctx.set_materialize_grads(False)


def _nll_backward(ctx, value_g, whitened_g):
    if value_g is None and whitened_g is None:
        return None, None, None, None
    residual, log_diag, off_diag, whitened = ctx.saved_tensors
    ndim = log_diag.ndim - 1
    needs_factor = any(ctx.needs_input_grad[1:3])
    # The cotangent of the whitened residual: the value's through ½ yᵀy, and its own in a second backward. The value's gradient
    # for the factor alone does without.
    cotangent = whitened_g
    if value_g is not None and (whitened_g is not None or ctx.needs_input_grad[0]):
        through_value = _over_grid(value_g, ndim) * whitened
        cotangent = through_value if whitened_g is None else through_value + whitened_g
    residual_bar = log_diag_bar = off_diag_bar = None
    if ctx.needs_input_grad[0]:
        residual_bar = _matvec(log_diag, off_diag, cotangent, ctx.offsets, False, True)
    if needs_factor and whitened_g is None:
        log_diag_bar, off_diag_bar = _nll_factor_grad(value_g, residual, whitened, log_diag, ctx.offsets, off_diag.dtype)
    elif needs_factor:
        diag_bar, off_diag_bar = _outer(residual, cotangent, ctx.offsets, off_diag.dtype)
        log_diag_bar = diag_bar * log_diag.exp()
        if value_g is not None:
            log_diag_bar = log_diag_bar - _over_grid(value_g.sum(0), ndim)
    return residual_bar, log_diag_bar, off_diag_bar, None


def _nll_factor_grad_setup(ctx, inputs, output):
    scale, residual, whitened, log_diag, ctx.offsets, _ = inputs
    ctx.save_for_backward(scale, residual, whitened, log_diag)


def _nll_factor_grad_backward(ctx, log_diag_g, off_diag_g):
    scale, residual, whitened, log_diag = ctx.saved_tensors
    ndim = log_diag.ndim - 1
    cotangent = _over_grid(scale, ndim) * whitened
    diag_g = log_diag_g * log_diag.exp()
    residual_bar = _matvec(diag_g, off_diag_g, cotangent, ctx.offsets, False, False)
    cotangent_bar = _matvec(diag_g, off_diag_g, residual, ctx.offsets, True, False)
    axes = tuple(range(-ndim, 0))  # not `flatten`, which has no batching rule for `is_grads_batched`
    scale_bar = (cotangent_bar * whitened).sum(axes) - log_diag_g.sum(axes)
    log_diag_bar = (residual * cotangent).sum(0) * diag_g
    return scale_bar, residual_bar, _over_grid(scale, ndim) * cotangent_bar, log_diag_bar, None, None


_matvec.register_autograd(_matvec_backward, setup_context=_matvec_setup)
_solve.register_autograd(_solve_backward, setup_context=_solve_setup)
_outer.register_autograd(_outer_backward, setup_context=_outer_setup)
_nll.register_autograd(_nll_backward, setup_context=_nll_setup)
_nll_factor_grad.register_autograd(_nll_factor_grad_backward, setup_context=_nll_factor_grad_setup)


def _into_axis(tensor: Tensor, in_dim: int | None, size: int, axis: int) -> Tensor:
    """Merge the mapped axis (or ``size`` repetitions, where there is none) into ``axis``, before what is there."""
    if in_dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(in_dim, axis)
    return tensor.flatten(axis, axis + 1)


def _register_vmap(op, batch_axes: Sequence[int], factors: Sequence[int], out_axes: Sequence[int]):
    """Where each mapped item has a factor of its own, items become more of the B axis; where all share one, more of the S axis.

    ``batch_axes`` and ``out_axes`` name the B axis of each tensor that goes in and comes out. ``factors`` are the inputs that
    are a factor's and have no S axis; for an operator without any, whose results are a factor's, each item has its own.
    """

    def rule(info, in_dims, *args):
        factor_each = not factors or any(in_dims[i] is not None for i in factors)
        merged = list(args)
        for i, axis in enumerate(batch_axes):
            if factor_each or i not in factors:
                merged[i] = _into_axis(args[i], in_dims[i], info.batch_size, axis if factor_each else 0)
        outputs = op(*merged)
        axes = tuple(axis if factor_each else 0 for axis in out_axes)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(axes[0], (info.batch_size, -1)), axes[0]
        return tuple(t.unflatten(axis, (info.batch_size, -1)) for t, axis in zip(outputs, axes, strict=True)), axes

    op.register_vmap(rule)


_register_vmap(_matvec, batch_axes=(0, 0, 1), factors=(0, 1), out_axes=(1,))
_register_vmap(_solve, batch_axes=(0, 0, 1), factors=(0, 1), out_axes=(1,))
_register_vmap(_outer, batch_axes=(1, 1), factors=(), out_axes=(0, 0))
_register_vmap(_nll, batch_axes=(1, 0, 0), factors=(1, 2), out_axes=(1, 1))
_register_vmap(_nll_factor_grad, batch_axes=(1, 1, 1, 0), factors=(), out_axes=(0, 0))


def _flat(offsets: Offsets) -> list[int]:
    return [component for offset in offsets for component in offset]


def _expand_factor(diag: Tensor, off_diag: Tensor, ndim: int, batch: torch.Size) -> tuple[Tensor, Tensor]:
    """Both tensors with one batch shape."""
    return (
        diag.expand(*batch, *diag.shape[diag.ndim - ndim :]),
        off_diag.expand(*batch, *off_diag.shape[-ndim - 1 :]),
    )


def _apply(op, name, diag, off_diag, x, offsets, ndim, transpose, log):
    batch = check_factor(diag, off_diag, len(offsets), ndim)
    grid = diag.shape[diag.ndim - ndim :]
    check_vector(name, x, "off_diag", off_diag, grid)
    diag, off_diag = _expand_factor(diag, off_diag, ndim, batch)
    dtype = accumulate_dtype(x.dtype)
    layout = Layout(name, x, diag.shape[: diag.ndim - ndim], grid)
    y = op(
        layout.factor(diag.to(dtype), ndim),
        layout.factor(off_diag, ndim + 1),
        layout.vector(x.to(dtype)),
        _flat(offsets),
        transpose,
        log,
    )
    return layout.batched(y).to(x.dtype)


def matvec(
    diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, ndim: int, transpose: bool = False, log: bool = False
) -> Tensor:
    """Product L x, or Lᵀx with ``transpose``, for a factor L stored by column.

    Args:
        diag: (*batch, *grid), the diagonal of L, of any sign; of the dtype of ``off_diag``, or float32 where that is float16 or
            bfloat16.
        off_diag: (*batch, K-1, *grid); entry k of column j stands at row j + offsets[k]. Entries whose row lies outside the
            grid are ignored, NaN included.
        x: (*sample, *batch, *grid), broadcast against the factor's batch as torch does; of the factor's dtype, or float32
            where that is float16 or bfloat16.
        offsets: the K-1 forward offsets, in raster order.
        ndim: number of grid axes, 1 to 3.
        transpose: multiply by Lᵀ.
        log: ``diag`` is the logarithm of the diagonal, which is then positive.

    Returns:
        (*sample, *batch, *grid) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    return _apply(_matvec, "x", diag, off_diag, x, offsets, ndim, transpose, log)


def solve(
    diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, ndim: int, transpose: bool = False, log: bool = False
) -> Tensor:
    """Solution of L x = b, or of Lᵀx = b with ``transpose``; arguments, shapes and errors as for `matvec`."""
    return _apply(_solve, "b", diag, off_diag, b, offsets, ndim, transpose, log)


def outer(a: Tensor, b: Tensor, offsets: Offsets, ndim: int, sample_ndim: int = 0) -> tuple[Tensor, Tensor]:
    """The entries of a bᵀ on the stencil, laid out as a factor: the adjoint of `matvec` with respect to L.

    Args:
        a, b: (*sample, *batch, *grid), of one shape, dtype and device.
        offsets, ndim: as for `matvec`.
        sample_ndim: this many leading axes are summed over.

    Returns:
        The diagonal (*batch, *grid) and the off-diagonals (*batch, K-1, *grid); 0 where an entry does not exist.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    check_tensor("a", a)
    check_tensor("b", b)
    check_dtype("b", b, "a", a)
    check_device("b", b, "a", a)
    if a.shape != b.shape or a.ndim < ndim + sample_ndim:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}, expected one shape with {sample_ndim} sample axes "
            f"and a grid of {ndim} axes"
        )
    batch, grid = a.shape[sample_ndim : a.ndim - ndim], a.shape[a.ndim - ndim :]
    if 0 in grid:
        raise ValueError(f"a has the empty grid {tuple(grid)}, every axis needs at least one site")
    canonical = (math.prod(a.shape[:sample_ndim]), math.prod(batch), *grid)
    dtype = accumulate_dtype(a.dtype)
    diag, off_diag = _outer(a.to(dtype).reshape(canonical), b.to(dtype).reshape(canonical), _flat(offsets), a.dtype)
    return diag.reshape(*batch, *grid).to(a.dtype), off_diag.reshape(*batch, len(offsets), *grid)


def negative_log_likelihood(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets, ndim: int) -> Tensor:
    """-log N(residual; 0, (L Lᵀ)⁻¹) in nats, the factor's diagonal being ``exp(log_diag)``: one fused operation.

    Args:
        residual: (*sample, *batch, *grid), broadcast against the factor's batch as torch does; dtype as for `matvec`.
        log_diag: (*batch, *grid).
        off_diag, offsets, ndim: as for `matvec`.

    Returns:
        (*sample, *batch), in float32 where ``residual`` is float16 or bfloat16, else in its dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    batch = check_factor(log_diag, off_diag, len(offsets), ndim, "log_diag")
    grid = log_diag.shape[log_diag.ndim - ndim :]
    check_vector("residual", residual, "off_diag", off_diag, grid)
    log_diag, off_diag = _expand_factor(log_diag, off_diag, ndim, batch)
    dtype = accumulate_dtype(residual.dtype)
    layout = Layout("residual", residual, log_diag.shape[: log_diag.ndim - ndim], grid)
    value, _ = _nll(
        layout.vector(residual.to(dtype)),
        layout.factor(log_diag.to(dtype), ndim),
        layout.factor(off_diag, ndim + 1),
        _flat(offsets),
    )
    return layout.batched(value)
