"""Calls of compiled CPU kernels: their arguments in memory, all but the tensors' addresses prepared once for each layout."""

import functools
import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import cpu_loops, cpu_solve, cpu_unrolled, simd_normals
from .checks import accumulate_dtype
from .cpu_compile import compiled
from .cpu_source import FIRST_ARGUMENT
from .stencils import Offsets
from .threads import run_in_threads

# Below this many coefficients a call is shorter than waking a thread.
_SERIAL_COEFFICIENTS = 2**15

# Rows in a band, at most: each plane of coefficients is then read in runs as long as the machine's own prefetching wants.
_BAND_ROWS = 16

# Numbers in a band that several samples share, at most, coefficients and vectors: they stay in a cache of the second level.
_CACHED_NUMBERS = 2**17

# Samples of a factor that a product computes together; fewer gain too little for a kernel of their own, which takes seconds to
# compile.
_TOGETHER = 4

# Stencils of more offsets are looped over: the time to compile grows faster than their number.
_MOST_UNROLLED_OFFSETS = 64

# Kernels compare positions in a row as int32.
_LONGEST_ROW = 2**31 - 2**10

# Plans kept for each kind of operation, one for each layout of tensors that it met last.
_KEPT_PLANS = 512

# What writes the kernels that are specialised to a stencil.
_UNROLLED = {"matvec": cpu_unrolled.matvec, "solve": cpu_solve.solve, "outer": cpu_unrolled.outer}

_CACHE_LINE = 64


class Plan:
    """A kernel with its arguments for tensors of one layout: a call only has to fill in the tensors' addresses.

    Args:
        kernel: the compiled kernel.
        arguments: its arguments, with None for what each call gives, and tensors for their addresses.
        items: work items, which threads take in spans of a multiple of ``multiple``.
        threads: how many take part, at most.
        scratch: bytes of zeroed memory that the kernel works in.
    """

    def __init__(
        self,
        kernel: Callable,
        arguments: Sequence[Tensor | int | None],
        items: int,
        threads: int,
        multiple: int = 1,
        scratch: int = 0,
    ):
        # A few spans a thread, so that one held up by other work of the machine does not hold up the rest.
        span = -(-items // (4 * threads * multiple)) * multiple if threads > 1 else items
        self._kernel, self._threads = kernel, threads
        self._places = [place for place, a in enumerate(arguments, FIRST_ARGUMENT) if a is None]
        self._constants = [a for a in arguments if isinstance(a, Tensor)]
        self._numbers = array("q", [0, 0, 0, 0, items, span, *(_address(0 if a is None else a) for a in arguments)])
        # Scratch lies behind the arguments, from the next multiple of a cache line on.
        self._scratch = -(-scratch // 8) * 8 + _CACHE_LINE if scratch else 0

    def __call__(self, *arguments: Tensor | int) -> None:
        """Run the kernel with the arguments that were left out, tensors and integers."""
        numbers = self._numbers[:]
        for place, argument in zip(self._places, arguments, strict=True):
            numbers[place] = argument if type(argument) is int else argument.data_ptr()
        if self._scratch:
            arguments_end = 8 * len(numbers)
            numbers.frombytes(bytes(self._scratch))
        address = numbers.buffer_info()[0]
        if self._scratch:
            numbers[3] = -(-(address + arguments_end) // _CACHE_LINE) * _CACHE_LINE
        run_in_threads(self._kernel, address, self._threads, owners=(numbers, *arguments, *self._constants))


def _address(argument: Tensor | int) -> int:
    return argument if type(argument) is int else argument.data_ptr()


@functools.lru_cache(_KEPT_PLANS)
def matvec_plan(
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
    if unrolled(offsets) and shape[0] >= _TOGETHER:
        options["together"] = _TOGETHER
    kernel, stencil = _kernel("matvec", offsets, dtype, transpose=transpose, log=log, **options)
    factor_and_vector, (y_s, y_b) = _factor_and_vector(*strides[:3]), strides[3][:2]
    arguments = [*stencil, *factor_and_vector, None, y_s, y_b, *([None] if likelihood else [])]
    row_sums = 8 * math.prod(shape[:-1]) if likelihood else 0
    return _plan_of_bands(kernel, arguments, shape, len(offsets), 2 * _TOGETHER, threads, row_sums)


@functools.lru_cache(_KEPT_PLANS)
def solve_plan(
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
    if unrolled(offsets):
        in_step, shared = _solved_in_step(samples, batch, threads)
        options = {"chains": in_step, **({"shared": True} if shared else {}), **({"normal": True} if normal else {})}
        items, multiple = (batch * -(-samples // in_step), 1) if shared else (samples * batch, in_step)
        scratch_size = cpu_solve.solve_scratch(offsets, dtype_name(dtype), in_step, grid[-1], normal)
    else:
        options, scratch_size = {}, cpu_loops.solve_scratch()
        items, multiple = samples * batch, min(samples, -(-samples * batch // threads))
    kernel, stencil = _kernel("solve", offsets, dtype, transpose=transpose, log=log, **options)
    arguments = [*stencil, *_factor_and_vector(*strides), None, *_sizes(shape)]
    scratch = threads * scratch_size * accumulate_dtype(dtype).itemsize
    return Plan(kernel, arguments, items, threads, multiple, scratch)


@functools.lru_cache(_KEPT_PLANS)
def outer_plan(offsets: Offsets, dtype: torch.dtype, shape: torch.Size, strides: tuple, streaming: bool, threads: int) -> Plan:
    a, b, scale, log_diag = strides
    kernel, stencil = _kernel("outer", offsets, dtype, streaming=streaming)
    arguments = [*stencil, None, *a[:2], None, *b[:2], None, *scale, None, log_diag, None, None]
    return _plan_of_bands(kernel, arguments, shape, len(offsets), 2 * shape[0], threads)


@functools.lru_cache(_KEPT_PLANS)
def field_plan(
    write: Callable, dtype: torch.dtype, arguments: tuple, items: int, operations: int, threads: int, scratch: int = 0
) -> Plan:
    kernel = compiled(write, dtype_name(dtype))
    return Plan(kernel, arguments, items, _num_threads(operations, threads), scratch=scratch)


@functools.lru_cache(_KEPT_PLANS)
def normal_plan(dtype: torch.dtype, size: int, threads: int) -> Plan:
    kernel = compiled(simd_normals.source, dtype_name(dtype))
    items = -(-size // simd_normals.block_size(dtype_name(dtype)))
    return Plan(kernel, [None, None, size], items, _num_threads(size, threads))


def forget_plans() -> None:
    """Make plans anew from here on, because something that they are made of has changed."""
    for plans in (matvec_plan, solve_plan, outer_plan, field_plan, normal_plan):
        plans.cache_clear()


def _plan_of_bands(
    kernel: Callable,
    arguments: list[Tensor | int | None],
    shape: torch.Size,
    terms: int,
    vectors: int,
    threads: int,
    scratch: int = 0,
) -> Plan:
    """The plan of a kernel on bands of rows; their length and number are the last of its own arguments.

    Several samples walk a band one after the other, so many ``vectors`` at a time, and meet its coefficients in the cache.
    """
    samples, batch, *lines, width = shape
    rows = math.prod(lines)
    threads = _num_threads(samples * batch * terms * rows * width, threads)
    band = _BAND_ROWS if samples == 1 else _CACHED_NUMBERS // (max(1, terms + vectors) * width)
    band = max(1, min(band, rows, rows * batch // (4 * threads) if threads > 1 else rows))
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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unrolled(offsets: Offsets) -> bool:
    return len(offsets) <= _MOST_UNROLLED_OFFSETS


def _kernel(operation: str, offsets: Offsets, dtype: torch.dtype, **options) -> tuple[Callable, list[Tensor | int]]:
    """The kernel of an operation, and its first arguments, by which it knows the stencil unless that is compiled into it."""
    if unrolled(offsets):
        return compiled(_UNROLLED[operation], dtype_name(dtype), offsets=offsets, **options), []
    return compiled(getattr(cpu_loops, operation), dtype_name(dtype), **options), [_table(offsets), len(offsets)]


@functools.cache
def _table(offsets: Offsets) -> Tensor:
    """The table of `cpu_loops`."""
    return torch.tensor(cpu_loops.table(offsets), dtype=torch.int64)
