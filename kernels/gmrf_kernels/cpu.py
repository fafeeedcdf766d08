"""CPU backend: Numba kernels with threads over images or rows, specialised to the stencil unless it has many offsets.

`cpu_unrolled` and `cpu_solve`, or `cpu_loops` for many offsets, write the source of a kernel and say what it does,
`cpu_compile` compiles it and `cpu_plan` prepares its calls; here it is called. Shapes are those of `reference`. `threads` runs
a kernel in as many threads as `torch.get_num_threads` says; Numba's own pools survive neither concurrent callers nor a fork.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import simd_fields, simd_normals
from .cpu_plan import dtype_name, field_plan, matvec_plan, normal_plan, outer_plan, solve_plan, unrolled
from .low_rank import cotangent_weights
from .memory import empty
from .stencils import Offsets

# Larger gradients would not stay in the caches of the last level until they are read.
_STREAMING_BYTES = 2**26

# Of whitened fields that one thread works on, at most, unless an image has more: they stay in its caches.
_CACHED_BYTES = 2**21


def matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L x, or Lᵀx with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, x = _prepare(diag, off_diag, x)
    y = empty(x.shape, x.dtype)
    _matvec_into(y, diag, off_diag, x, offsets, transpose, log)
    return y


def solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L⁻¹b, or L⁻ᵀb with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, b = _prepare(diag, off_diag, b)
    x = empty(b.shape, b.dtype)
    strides = diag.stride(), off_diag.stride(), b.stride()
    solve_plan(offsets, off_diag.dtype, transpose, log, b.shape, strides, torch.get_num_threads())(diag, off_diag, b, x)
    return x


def solve_normal(
    diag: Tensor, off_diag: Tensor, shape: Sequence[int], key: int, offsets: Offsets, transpose: bool, log: bool
) -> Tensor:
    """`solve` of the first numbers of a stream, as `standard_normal` gives them: (S, B, *grid), of the dtype of ``diag``.

    Where a row is whole blocks of the stream, each thread draws the numbers of a row just before it solves the row.
    """
    blocks = diag.dtype == off_diag.dtype and shape[-1] % simd_normals.block_size(dtype_name(diag.dtype)) == 0
    if not (blocks and unrolled(offsets)):
        return solve(diag, off_diag, standard_normal(shape, diag.dtype, key), offsets, transpose, log)
    diag, off_diag = _prepare(diag, off_diag, ndim=len(shape) - 2)
    x = empty(shape, diag.dtype)
    strides = diag.stride(), off_diag.stride(), (0, 0)
    plan = solve_plan(offsets, off_diag.dtype, transpose, log, x.shape, strides, torch.get_num_threads(), True)
    plan(diag, off_diag, key, x)
    return x


def outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P(a bᵀ), summed over the S vectors: its diagonal (B, *grid) and off-diagonals (B, K-1, *grid) in ``dtype``."""
    return _outer(a, b, _ones(a), None, offsets, dtype)


def nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (S, B) in nats, and the whitened residual y = Lᵀ residual (S, B, *grid)."""
    log_diag, off_diag, residual = _prepare(log_diag, off_diag, residual)
    shape, dtype = residual.shape, residual.dtype
    y = empty(shape, dtype)
    value = torch.empty(shape[0], shape[1], dtype=dtype)
    strides = log_diag.stride(), off_diag.stride(), residual.stride(), y.stride()
    plan = matvec_plan(offsets, off_diag.dtype, True, True, shape, strides, torch.get_num_threads(), True)
    plan(log_diag, off_diag, residual, y, value)
    return value, y


def nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(scale * value).sum()``, ``scale`` (S, B), for ``log_diag`` and, in ``dtype``, ``off_diag``."""
    (log_diag,) = _prepare(log_diag, ndim=log_diag.ndim - 1)
    return _outer(residual, whitened, scale, log_diag, offsets, dtype)


def low_rank_log_density(
    residual: Tensor, log_diag: Tensor, off_diag: Tensor, factors: Tensor, offsets: Offsets, keep: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `reference.low_rank_log_density`; without ``keep`` there are no whitened fields."""
    log_diag, off_diag, residual = _prepare(log_diag, off_diag, residual)
    (factors,) = _prepare(factors)
    batch, rank, *grid = factors.shape
    samples, dtype = len(residual), residual.dtype
    at_once = _images_at_once(batch, rank + samples, grid, dtype)
    whitened = empty((batch if keep else at_once, rank + samples, *grid), dtype).transpose(0, 1)
    value = torch.empty(samples, batch, dtype=torch.float64)
    system = torch.zeros(batch, rank, rank + samples, dtype=torch.float64)
    for images in _parts(batch, at_once):
        x, factor = images(residual, 1), (images(log_diag), images(off_diag))
        fields = images(whitened, 1) if keep else whitened.narrow(1, 0, x.shape[1])
        _matvec_into(fields[:rank], *factor, images(factors).transpose(0, 1), offsets, True, True)
        _matvec_into(fields[rank:], *factor, x, offsets, True, True)
        _regress(fields, factor[0], images(value, 1), images(system))
    return value.to(dtype), whitened if keep else None, system


def low_rank_gradients(
    value_bar: Tensor,
    residual: Tensor,
    log_diag: Tensor,
    off_diag: Tensor,
    factors: Tensor,
    whitened: Tensor,
    system: Tensor,
    offsets: Offsets,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """As `reference.low_rank_gradients`."""
    log_diag, off_diag, residual = _prepare(log_diag, off_diag, residual)
    (factors,), (whitened,) = _prepare(factors), _prepare(whitened)
    batch, rank, *grid = factors.shape
    samples, dtype, places = len(residual), residual.dtype, [1] * len(grid)
    at_once = _images_at_once(batch, rank + samples, grid, dtype)
    of_residual, of_log_diag, of_off_diag, of_factors = wanted
    of_factor = of_log_diag or of_off_diag
    weights = cotangent_weights(value_bar, system) if of_factors or of_factor else None
    combined = 0 if weights is None else rank
    # Those of V, unless only the residuals' are wanted, and of the residuals.
    whitened_bars = empty((at_once, combined + samples, *grid), dtype).transpose(0, 1)
    totals = value_bar.sum(0).reshape(-1, *places)
    residual_bar = empty(residual.shape, dtype) if of_residual else None
    log_diag_bar = empty((batch, *grid), dtype) if of_factor else None
    off_diag_bar = empty((batch, len(offsets), *grid), off_diag.dtype) if of_factor else None
    factors_bar = empty(factors.shape, dtype) if of_factors else None
    for images in _parts(batch, at_once):
        fields, own_bar, factor = images(whitened, 1), images(value_bar, 1), (images(log_diag), images(off_diag))
        whitened_bar = whitened_bars.narrow(1, 0, own_bar.shape[1])
        torch.mul(fields[rank:], -own_bar.reshape(*own_bar.shape, *places), out=whitened_bar[combined:])
        if weights is not None:
            _combine_into(whitened_bar[:rank], images(weights), fields)
        if of_factors:
            _matvec_into(images(factors_bar).transpose(0, 1), *factor, whitened_bar[:rank], offsets, False, True)
        if of_residual:
            _matvec_into(images(residual_bar, 1), *factor, whitened_bar[combined:], offsets, False, True)
        if of_factor:
            own = torch.cat([images(factors), images(residual, 1).transpose(0, 1)], 1).transpose(0, 1)
            diag_bar = images(log_diag_bar)
            _outer_into(diag_bar, images(off_diag_bar), own, whitened_bar, _ones(own), None, offsets, off_diag_bar.nbytes)
            torch.addcmul(images(totals), diag_bar, factor[0].exp(), out=diag_bar)
    return [residual_bar, log_diag_bar if of_log_diag else None, off_diag_bar if of_off_diag else None, factors_bar]


def standard_normal(shape: Sequence[int], dtype: torch.dtype, key: int) -> Tensor:
    """The first numbers, in C order, of the stream of float32 or float64 numbers that has this key of 63 bits."""
    result = empty(shape, dtype)
    normal_plan(dtype, result.numel(), torch.get_num_threads())(key, result)
    return result


def _matvec_into(y: Tensor, diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> None:
    """`matvec` of tensors with contiguous grids, stored in ``y``."""
    strides = diag.stride(), off_diag.stride(), x.stride(), y.stride()
    matvec_plan(offsets, off_diag.dtype, transpose, log, x.shape, strides, torch.get_num_threads())(diag, off_diag, x, y)


def _outer(
    a: Tensor, b: Tensor, scale: Tensor, log_diag: Tensor | None, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    a, b = _prepare(a, b)
    batch, *grid = a.shape[1:]
    diag = empty((batch, *grid), a.dtype)
    off_diag = empty((batch, len(offsets), *grid), dtype)
    _outer_into(diag, off_diag, a, b, scale, log_diag, offsets, off_diag.nbytes)
    return diag, off_diag


def _outer_into(
    diag: Tensor, off_diag: Tensor, a: Tensor, b: Tensor, scale: Tensor, log_diag: Tensor | None, offsets: Offsets, size: int
) -> None:
    """``size`` is the number of bytes of all off-diagonals, of which these may be some."""
    aligned = off_diag.shape[-1] * off_diag.itemsize % 64 == 0 == off_diag.data_ptr() % 64
    strides = a.stride(), b.stride(), scale.stride(), 0 if log_diag is None else log_diag.stride(0)
    streaming = size > _STREAMING_BYTES and aligned
    plan = outer_plan(offsets, off_diag.dtype, a.shape, strides, streaming, torch.get_num_threads())
    plan(a, b, scale, 0 if log_diag is None else log_diag, diag, off_diag)


def _ones(a: Tensor) -> Tensor:
    """A scale of 1 for vectors (S, B, *grid)."""
    return torch.ones((), dtype=a.dtype).expand(a.shape[:2])


def _regress(fields: Tensor, log_diag: Tensor, value: Tensor, system: Tensor) -> None:
    """Leave the rests in place of the whitened residuals in fields (R + S, B, *grid), and store ``value`` and ``system``."""
    terms, batch, *grid = fields.shape
    rank, n = system.shape[1], math.prod(grid)
    spans = -(-n // simd_fields.SPAN)
    items, threads = batch * spans, torch.get_num_threads()
    layout = (None, *fields.stride()[:2], terms, rank, n, spans)
    sums = empty((items, rank, terms), torch.float64)
    operations = terms * rank * n * batch
    arguments, scratch = (*layout, None, None), simd_fields.regression_scratch(batch)
    plan = field_plan(simd_fields.ridge_regression, fields.dtype, arguments, items, operations, threads, scratch)
    plan(fields, sums, system)
    arguments = (*layout, batch, None, None, log_diag.stride(0), None, value.stride(0))
    scratch = simd_fields.density_scratch(batch, spans, terms - rank)
    plan = field_plan(simd_fields.log_density, fields.dtype, arguments, items, operations, threads, scratch)
    plan(fields, system, log_diag, value)


def _combine_into(result: Tensor, weights: Tensor, fields: Tensor) -> None:
    """Σ_u weights[:, t, u] fields[u], of weights (B, T, U) in float64 and fields (U, B, *grid): (T, B, *grid)."""
    batch, rows, terms = weights.shape
    n = math.prod(fields.shape[2:])
    spans = -(-n // simd_fields.SPAN)
    arguments = (None, rows, terms, None, *fields.stride()[:2], n, spans, None, *result.stride()[:2])
    operations, threads = batch * terms * rows * n, torch.get_num_threads()
    plan = field_plan(simd_fields.combinations, fields.dtype, arguments, batch * spans, operations, threads)
    plan(weights, fields, result)


def _images_at_once(batch: int, fields: int, grid: Sequence[int], dtype: torch.dtype) -> int:
    """How many images' fields stay in the threads' caches between one kernel and the next; as many in every part, or nearly."""
    n, threads = math.prod(grid), torch.get_num_threads()
    # Images of one span need a thread each.
    most = max(1 if n > simd_fields.SPAN else threads, _CACHED_BYTES * threads // (fields * n * dtype.itemsize))
    return batch if batch <= most else -(-batch // -(-batch // most))


def _parts(batch: int, at_once: int) -> Iterator[Callable[..., Tensor]]:
    """What takes the images of a part out of a tensor whose batch is its first axis, or the one given beside it."""
    if batch <= at_once:
        yield lambda tensor, axis=0: tensor
        return
    for first in range(0, batch, at_once):
        count = min(at_once, batch - first)
        yield lambda tensor, axis=0, first=first, count=count: tensor.narrow(axis, first, count)


def _prepare(*tensors: Tensor, ndim: int | None = None) -> Sequence[Tensor]:
    """The tensors with contiguous grids of ``ndim`` axes; by default the last tensor is of vectors (S, B, *grid)."""
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        return tensors
    ndim = tensors[-1].ndim - 2 if ndim is None else ndim
    return [t if _contiguous_grid(t.shape, t.stride(), ndim) else t.contiguous() for t in tensors]


@functools.lru_cache(512)
def _contiguous_grid(shape: torch.Size, strides: tuple[int, ...], ndim: int) -> bool:
    step = 1
    for size, stride in zip(reversed(shape[-ndim:]), reversed(strides[-ndim:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
