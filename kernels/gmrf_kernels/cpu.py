"""CPU backend: Numba kernels with threads over images or rows, specialised to the stencil unless it has many offsets.

`cpu_unrolled` and `cpu_solve`, or `cpu_loops` for many offsets, write the source of a kernel and say what it does, and
`cpu_compile` compiles it; here it is called. Shapes are those of `reference`. `threads` runs a kernel in as many threads as
`torch.get_num_threads` says; Numba's own pools survive neither concurrent callers nor a fork.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import cpu_loops, cpu_solve, cpu_unrolled, simd_fields, simd_normals
from .checks import accumulate_dtype
from .cpu_compile import compiled
from .cpu_plan import Plan
from .memory import empty
from .stencils import Offsets

# Below this many coefficients a call is shorter than waking a thread.
_SERIAL_COEFFICIENTS = 2**15

# Rows in a band, at most: each plane of coefficients is then read in runs as long as the machine's own prefetching wants.
_BAND_ROWS = 16

# Coefficients in a band that several samples share, at most: they stay in a cache of the second level.
_BAND_COEFFICIENTS = 2**17

# Samples of a factor that a product computes together; fewer gain too little for a kernel of their own, which takes seconds to
# compile.
_TOGETHER = 4

# Stencils of more offsets are looped over: the time to compile grows faster than their number.
_MOST_UNROLLED_OFFSETS = 64

# Larger gradients would not stay in the caches of the last level until they are read.
_STREAMING_BYTES = 2**26

# Kernels compare positions in a row as int32.
_LONGEST_ROW = 2**31 - 2**10

# Plans kept for each kind of operation, one for each layout of tensors that it met last.
_KEPT_PLANS = 512

# What writes the kernels that are specialised to a stencil.
_UNROLLED = {"matvec": cpu_unrolled.matvec, "solve": cpu_solve.solve, "outer": cpu_unrolled.outer}


def matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L x, or Lᵀx with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, x = _prepare(diag, off_diag, x)
    y = empty(x.shape, x.dtype)
    strides = diag.stride(), off_diag.stride(), x.stride()
    _matvec_plan(offsets, off_diag.dtype, transpose, log, x.shape, strides, torch.get_num_threads())(diag, off_diag, x, y)
    return y


def solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L⁻¹b, or L⁻ᵀb with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, b = _prepare(diag, off_diag, b)
    x = empty(b.shape, b.dtype)
    strides = diag.stride(), off_diag.stride(), b.stride()
    _solve_plan(offsets, off_diag.dtype, transpose, log, b.shape, strides, torch.get_num_threads())(diag, off_diag, b, x)
    return x


def solve_normal(
    diag: Tensor, off_diag: Tensor, shape: Sequence[int], key: int, offsets: Offsets, transpose: bool, log: bool
) -> Tensor:
    """`solve` of the first numbers of a stream, as `standard_normal` gives them: (S, B, *grid), of the dtype of ``diag``.

    Where a row is whole blocks of the stream, each thread draws the numbers of a row just before it solves the row.
    """
    blocks = diag.dtype == off_diag.dtype and shape[-1] % simd_normals.block_size(_name(diag.dtype)) == 0
    if not (blocks and _unrolled(offsets)):
        return solve(diag, off_diag, standard_normal(shape, diag.dtype, key), offsets, transpose, log)
    diag, off_diag = _prepare(diag, off_diag, ndim=len(shape) - 2)
    x = empty(shape, diag.dtype)
    strides = diag.stride(), off_diag.stride(), (0, 0)
    plan = _solve_plan(offsets, off_diag.dtype, transpose, log, x.shape, strides, torch.get_num_threads(), True)
    plan(diag, off_diag, key, x)
    return x


def outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P(a bᵀ), summed over the S vectors: its diagonal (B, *grid) and off-diagonals (B, K-1, *grid) in ``dtype``."""
    return _outer(a, b, torch.ones((), dtype=a.dtype).expand(a.shape[:2]), None, offsets, dtype)


def nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (S, B) in nats, and the whitened residual y = Lᵀ residual (S, B, *grid)."""
    log_diag, off_diag, residual = _prepare(log_diag, off_diag, residual)
    shape, dtype = residual.shape, residual.dtype
    y = empty(shape, dtype)
    value = torch.empty(shape[0], shape[1], dtype=dtype)
    strides = log_diag.stride(), off_diag.stride(), residual.stride()
    plan = _matvec_plan(offsets, off_diag.dtype, True, True, shape, strides, torch.get_num_threads(), True)
    plan(log_diag, off_diag, residual, y, value)
    return value, y


def nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(scale * value).sum()``, ``scale`` (S, B), for ``log_diag`` and, in ``dtype``, ``off_diag``."""
    (log_diag,) = _prepare(log_diag, ndim=log_diag.ndim - 1)
    return _outer(residual, whitened, scale, log_diag, offsets, dtype)


def inner_products(fields: Tensor, rows: int) -> Tensor:
    """Inner products of fields (T, B, *grid) with the first ``rows`` of them: (B, T, rows) in float64.

    Entries above the diagonal may be missing: they are then 0.
    """
    (fields,) = _prepare(fields)
    terms, batch, *grid = fields.shape
    n = math.prod(grid)
    spans = -(-n // simd_fields.SPAN)
    of_spans = torch.zeros(batch, spans, terms, rows, dtype=torch.float64)
    arguments = (None, *fields.stride()[:2], terms, rows, n, spans, None)
    operations = batch * terms * rows * n
    _field_plan("inner_products", fields.dtype, arguments, batch * spans, operations, torch.get_num_threads())(fields, of_spans)
    return of_spans.sum(1)


def combinations(weights: Tensor, fields: Tensor, room: int = 0) -> Tensor:
    """Σ_u weights[:, t, u] fields[u], of weights (B, T, U) in float64 and fields (U, B, *grid): (T, B, *grid).

    With ``room``, behind them are so many fields more, for the caller to fill.
    """
    (fields,), weights = _prepare(fields), weights.contiguous()
    batch, rows, terms = weights.shape
    result = empty((rows + room, *fields.shape[1:]), fields.dtype)
    n = math.prod(fields.shape[2:])
    spans = -(-n // simd_fields.SPAN)
    arguments = (None, rows, terms, None, *fields.stride()[:2], n, spans, None, batch * n)
    operations = batch * terms * rows * n
    plan = _field_plan("combinations", fields.dtype, arguments, batch * spans, operations, torch.get_num_threads())
    plan(weights, fields, result)
    return result


def standard_normal(shape: Sequence[int], dtype: torch.dtype, key: int) -> Tensor:
    """The first numbers, in C order, of the stream of float32 or float64 numbers that has this key of 63 bits."""
    result = empty(shape, dtype)
    _normal_plan(dtype, result.numel(), torch.get_num_threads())(key, result)
    return result


def _outer(
    a: Tensor, b: Tensor, scale: Tensor, log_diag: Tensor | None, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    a, b = _prepare(a, b)
    batch, *grid = a.shape[1:]
    diag = empty((batch, *grid), a.dtype)
    off_diag = empty((batch, len(offsets), *grid), dtype)
    streaming = off_diag.nbytes > _STREAMING_BYTES and grid[-1] * dtype.itemsize % 64 == 0 == off_diag.data_ptr() % 64
    strides = a.stride(), b.stride(), scale.stride(), 0 if log_diag is None else log_diag.stride(0)
    plan = _outer_plan(offsets, dtype, a.shape, strides, streaming, torch.get_num_threads())
    plan(a, b, scale, 0 if log_diag is None else log_diag, diag, off_diag)
    return diag, off_diag


def _prepare(*tensors: Tensor, ndim: int | None = None) -> Sequence[Tensor]:
    """The tensors with contiguous grids of ``ndim`` axes; by default the last tensor is of vectors (S, B, *grid)."""
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        return tensors
    ndim = tensors[-1].ndim - 2 if ndim is None else ndim
    return [t if _contiguous_grid(t.shape, t.stride(), ndim) else t.contiguous() for t in tensors]


@functools.lru_cache(_KEPT_PLANS)
def _contiguous_grid(shape: torch.Size, strides: tuple[int, ...], ndim: int) -> bool:
    step = 1
    for size, stride in zip(reversed(shape[-ndim:]), reversed(strides[-ndim:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@functools.lru_cache(_KEPT_PLANS)
def _matvec_plan(
    offsets: Offsets,
    dtype: torch.dtype,
    transpose: bool,
    log: bool,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    threads: int,
    likelihood: bool = False,
) -> Plan:
    options = {"likelihood": True} if likelihood else {}
    if _unrolled(offsets) and shape[0] >= _TOGETHER:
        options["together"] = _TOGETHER
    kernel, stencil = _kernel("matvec", offsets, dtype, transpose=transpose, log=log, **options)
    arguments = [*stencil, *_factor_and_vector(*strides), None, *([None] if likelihood else [])]
    row_sums = 8 * math.prod(shape[:-1]) if likelihood else 0
    return _plan_of_bands(kernel, arguments, shape, len(offsets), threads, row_sums)


@functools.lru_cache(_KEPT_PLANS)
def _solve_plan(
    offsets: Offsets,
    dtype: torch.dtype,
    transpose: bool,
    log: bool,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    threads: int,
    normal: bool = False,
) -> Plan:
    samples, batch, *grid = shape
    threads = min(_num_threads(batch * len(offsets) * math.prod(grid) * samples, threads), max(1, samples * batch))
    if _unrolled(offsets):
        in_step, shared = _solved_in_step(samples, batch, threads)
        options = {"chains": in_step, **({"shared": True} if shared else {}), **({"normal": True} if normal else {})}
        items, multiple = (batch * -(-samples // in_step), 1) if shared else (samples * batch, in_step)
        scratch_size = cpu_solve.solve_scratch(offsets, _name(dtype), in_step, grid[-1], normal)
    else:
        options, scratch_size = {}, cpu_loops.solve_scratch()
        items, multiple = samples * batch, min(samples, -(-samples * batch // threads))
    kernel, stencil = _kernel("solve", offsets, dtype, transpose=transpose, log=log, **options)
    arguments = [*stencil, *_factor_and_vector(*strides), None, *_sizes(shape)]
    scratch = threads * scratch_size * accumulate_dtype(dtype).itemsize
    return Plan(kernel, arguments, items, threads, multiple, scratch)


@functools.lru_cache(_KEPT_PLANS)
def _outer_plan(offsets: Offsets, dtype: torch.dtype, shape: torch.Size, strides: tuple, streaming: bool, threads: int) -> Plan:
    a, b, scale, log_diag = strides
    kernel, stencil = _kernel("outer", offsets, dtype, streaming=streaming)
    arguments = [*stencil, None, *a[:2], None, *b[:2], None, *scale, None, log_diag, None, None]
    return _plan_of_bands(kernel, arguments, shape, len(offsets), threads)


@functools.lru_cache(_KEPT_PLANS)
def _field_plan(kernel: str, dtype: torch.dtype, arguments: tuple, items: int, operations: int, threads: int) -> Plan:
    function = compiled(getattr(simd_fields, kernel), _name(dtype))
    return Plan(function, arguments, items, _num_threads(operations, threads))


@functools.lru_cache(_KEPT_PLANS)
def _normal_plan(dtype: torch.dtype, size: int, threads: int) -> Plan:
    kernel = compiled(simd_normals.source, _name(dtype))
    items = -(-size // simd_normals.block_size(_name(dtype)))
    return Plan(kernel, [None, None, size], items, _num_threads(size, threads))


def forget_plans() -> None:
    """Make plans anew from here on, because something that they are made of has changed."""
    for plans in (_matvec_plan, _solve_plan, _outer_plan, _field_plan, _normal_plan):
        plans.cache_clear()


def _plan_of_bands(
    kernel: Callable, arguments: list[Tensor | int | None], shape: torch.Size, terms: int, threads: int, scratch: int = 0
) -> Plan:
    """The plan of a kernel on bands of rows; their length and number are the last of its own arguments."""
    samples, batch, *lines, width = shape
    rows = math.prod(lines)
    threads = _num_threads(batch * terms * rows * width, threads)
    band = min(_BAND_ROWS, rows * batch // (4 * threads))
    if samples > 1:
        # The coefficients of a band are to stay in the cache from one sample to the next.
        band = min(band, _BAND_COEFFICIENTS // (max(1, terms) * width))
    band = max(1, band)
    bands = -(-rows // band)
    return Plan(kernel, [*arguments, band, bands, *_sizes(shape)], batch * bands, threads, scratch=scratch)


def _factor_and_vector(diag: tuple[int, ...], off_diag: tuple[int, ...], x: tuple[int, ...]) -> list[int | None]:
    """The arguments of a kernel for a factor and a vector with these strides: each tensor, and the strides before its grid."""
    return [None, diag[0], None, *off_diag[:2], None, *x[:2]]


def _sizes(shape: torch.Size) -> list[int]:
    """The last arguments of most kernels: numbers of samples and images, and a grid of three axes."""
    if shape[-1] > _LONGEST_ROW:
        raise ValueError(f"the grid's last axis has {shape[-1]} sites, the CPU backend takes at most {_LONGEST_ROW}")
    return [*shape[:2], *[1] * (5 - len(shape)), *shape[2:]]


def _solved_in_step(samples: int, batch: int, threads: int) -> tuple[int, bool]:
    """How many images a thread solves in step, and whether these are samples of one factor, which share its coefficients."""
    for in_step in (4, 2):
        if samples >= in_step and batch * -(-samples // in_step) >= threads:
            return in_step, True
    return (2 if samples * batch >= 2 * threads else 1), False


def _num_threads(coefficients: int, threads: int) -> int:
    return threads if coefficients > _SERIAL_COEFFICIENTS else 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unrolled(offsets: Offsets) -> bool:
    return len(offsets) <= _MOST_UNROLLED_OFFSETS


def _kernel(operation: str, offsets: Offsets, dtype: torch.dtype, **options) -> tuple[Callable, list[Tensor | int]]:
    """The kernel of an operation, and its first arguments, by which it knows the stencil unless that is compiled into it."""
    if _unrolled(offsets):
        return compiled(_UNROLLED[operation], _name(dtype), offsets=offsets, **options), []
    return compiled(getattr(cpu_loops, operation), _name(dtype), **options), [_table(offsets), len(offsets)]


@functools.cache
def _table(offsets: Offsets) -> Tensor:
    """The table of `cpu_loops`."""
    return torch.tensor(cpu_loops.table(offsets), dtype=torch.int64)
