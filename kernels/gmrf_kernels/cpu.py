"""CPU backend: Numba kernels with threads over images or rows, specialised to the stencil unless it has many offsets.

`cpu_unrolled` and `cpu_solve`, or `cpu_loops` for many offsets, write the source of a kernel and say what it does; here it is
compiled, kept on disk, and called. Shapes are those of `reference`.

Compiled kernels lie in ``$BANDED_GMRF_CACHE``, or in ``banded_gmrf`` in the user's cache directory; where that cannot be
written, each process compiles for itself. `threads` runs them in as many threads as `torch.get_num_threads` says; Numba's own
pools survive neither concurrent callers nor a fork.
"""

import functools
import hashlib
import math
import os
import re
import sys
import tempfile
import threading
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numba
import torch
from torch import Tensor

from . import cpu_loops, cpu_solve, cpu_unrolled, simd_normals
from .memory import empty
from .stencils import Offsets
from .threads import run_in_threads

# Below this many coefficients a call is shorter than waking a thread.
_SERIAL_COEFFICIENTS = 2**15

# Rows in a band, at most: each plane of coefficients is then read in runs as long as the machine's own prefetching wants.
_BAND_ROWS = 16

# Coefficients in a band that several samples share, at most: they stay in a cache of the second level.
_BAND_COEFFICIENTS = 2**17

# Stencils of more offsets are looped over: the time to compile grows faster than their number.
_MOST_UNROLLED_OFFSETS = 64

# Larger gradients would not stay in the caches of the last level until they are read.
_STREAMING_BYTES = 2**26

# Kernels compare positions in a row as int32.
_LONGEST_ROW = 2**31 - 2**10

# What writes the kernels that are specialised to a stencil.
_UNROLLED = {"matvec": cpu_unrolled.matvec, "solve": cpu_solve.solve, "outer": cpu_unrolled.outer}

_compile_lock = threading.Lock()


def matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L x, or Lᵀx with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, x = _prepare(diag, off_diag, x)
    y = empty(x.shape, x.dtype)
    kernel, stencil = _kernel("matvec", offsets, _name(off_diag), transpose=transpose, log=log)
    _run_bands(kernel, [*stencil, *_strided(diag, off_diag, x), y], x, len(offsets))
    return y


def solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L⁻¹b, or L⁻ᵀb with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    diag, off_diag, b = _prepare(diag, off_diag, b)
    x = empty(b.shape, b.dtype)
    samples, batch = b.shape[:2]
    threads = min(_num_threads(off_diag.numel() * samples), samples * batch)
    if _unrolled(offsets):
        in_step, shared = _solved_in_step(samples, batch, threads)
        options = {"chains": in_step, **({"shared": True} if shared else {})}
        items, multiple = (batch * -(-samples // in_step), 1) if shared else (samples * batch, in_step)
        scratch_size = cpu_solve.solve_scratch(offsets, _name(off_diag), in_step, b.shape[-1])
    else:
        options, scratch_size = {}, cpu_loops.solve_scratch()
        items, multiple = samples * batch, min(samples, -(-samples * batch // threads))
    kernel, stencil = _kernel("solve", offsets, _name(off_diag), transpose=transpose, log=log, **options)
    scratch = torch.zeros(threads * scratch_size, dtype=b.dtype)
    _run(kernel, [*stencil, *_strided(diag, off_diag, b), x, scratch], b, items, threads, multiple)
    return x


def _solved_in_step(samples: int, batch: int, threads: int) -> tuple[int, bool]:
    """How many images a thread solves in step, and whether these are samples of one factor, which share its coefficients."""
    for in_step in (4, 2):
        if samples >= in_step and batch * -(-samples // in_step) >= threads:
            return in_step, True
    return (2 if samples * batch >= 2 * threads else 1), False


def outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P(a bᵀ), summed over the S vectors: its diagonal (B, *grid) and off-diagonals (B, K-1, *grid) in ``dtype``."""
    return _outer(a, b, torch.ones(a.shape[:2], dtype=a.dtype), None, offsets, dtype)


def nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (S, B) in nats, and the whitened residual y = Lᵀ residual (S, B, *grid)."""
    log_diag, off_diag, residual = _prepare(log_diag, off_diag, residual)
    y = empty(residual.shape, residual.dtype)
    samples, batch, *grid = residual.shape
    rows = math.prod(grid[:-1])
    row_sums = torch.empty((samples, batch, rows), dtype=torch.float64)
    kernel, stencil = _kernel("matvec", offsets, _name(off_diag), transpose=True, log=True, likelihood=True)
    arguments = [*stencil, *_strided(log_diag, off_diag, residual), y, row_sums]
    _run_bands(kernel, arguments, residual, len(offsets))
    # NumPy adds in an order that does not depend on the number of threads.
    value = torch.from_numpy(row_sums.numpy().sum(-1) + 0.5 * math.prod(grid) * math.log(2 * math.pi))
    return value.to(residual.dtype), y


def nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(scale * value).sum()``, ``scale`` (S, B), for ``log_diag`` and, in ``dtype``, ``off_diag``."""
    (log_diag,) = _prepare(log_diag, ndim=log_diag.ndim - 1)
    return _outer(residual, whitened, scale.contiguous(), log_diag, offsets, dtype)


def standard_normal(shape: Sequence[int], dtype: torch.dtype, key: int) -> Tensor:
    """The first numbers, in C order, of the stream of float32 or float64 numbers that has this key of 63 bits."""
    result = empty(shape, dtype)
    size = result.numel()
    kernel = _compiled(simd_normals.source, _name(result), ())
    _launch(kernel, [key, result, size], -(-size // simd_normals.block_size(_name(result))), _num_threads(size))
    return result


def _outer(
    a: Tensor, b: Tensor, scale: Tensor, log_diag: Tensor | None, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    a, b = _prepare(a, b)
    batch, *grid = a.shape[1:]
    diag = empty((batch, *grid), a.dtype)
    off_diag = empty((batch, len(offsets), *grid), dtype)
    streaming = off_diag.nbytes > _STREAMING_BYTES and grid[-1] * dtype.itemsize % 64 == 0 == off_diag.data_ptr() % 64
    kernel, stencil = _kernel("outer", offsets, _name(off_diag), streaming=streaming)
    arguments = [*stencil, a, *a.stride()[:2], b, *b.stride()[:2], scale]
    arguments += [0, 0] if log_diag is None else [log_diag, log_diag.stride(0)]
    arguments += [diag, off_diag]
    _run_bands(kernel, arguments, a, len(offsets))
    return diag, off_diag


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _prepare(*tensors: Tensor, ndim: int | None = None) -> list[Tensor]:
    """The tensors with contiguous grids of ``ndim`` axes; by default the last tensor is of vectors (S, B, *grid)."""
    ndim = tensors[-1].ndim - 2 if ndim is None else ndim
    return [t if _contiguous_grid(t.shape[-ndim:], t.stride()[-ndim:]) else t.contiguous() for t in tensors]


def _contiguous_grid(grid: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(grid), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _strided(diag: Tensor, off_diag: Tensor, x: Tensor) -> list[Tensor | int]:
    """The arguments of a kernel for a factor and a vector: each tensor, and the strides before its grid."""
    return [diag, diag.stride(0), off_diag, *off_diag.stride()[:2], x, *x.stride()[:2]]


def _run_bands(kernel: Callable, arguments: list[Tensor | int], vector: Tensor, terms: int) -> None:
    """Run a kernel on bands of rows; their length and number are the last of its own arguments."""
    samples, batch, *lines, width = vector.shape
    rows = math.prod(lines)
    threads = _num_threads(batch * terms * rows * width)
    band = min(_BAND_ROWS, rows * batch // (4 * threads))
    if samples > 1:
        # The coefficients of a band are to stay in the cache from one sample to the next.
        band = min(band, _BAND_COEFFICIENTS // (max(1, terms) * width))
    band = max(1, band)
    bands = -(-rows // band)
    _run(kernel, [*arguments, band, bands], vector, batch * bands, threads)


def _run(
    kernel: Callable, arguments: Sequence[Tensor | int], vector: Tensor, items: int, threads: int, multiple: int = 1
) -> None:
    """`_launch` with the sizes of the vectors as the last arguments."""
    grid = [1] * (5 - vector.ndim) + list(vector.shape[2:])
    if grid[-1] > _LONGEST_ROW:
        raise ValueError(f"the grid's last axis has {grid[-1]} sites, the CPU backend takes at most {_LONGEST_ROW}")
    _launch(kernel, [*arguments, *vector.shape[:2], *grid], items, threads, multiple)


def _launch(kernel: Callable, arguments: Sequence[Tensor | int], items: int, threads: int, multiple: int = 1) -> None:
    """Run the kernel on ``items`` work items, which threads take in spans of a multiple of ``multiple``.

    The kernel gets the address of each tensor among its arguments.
    """
    # A few spans a thread, so that one held up by other work of the machine does not hold up the rest.
    span = -(-items // (4 * threads * multiple)) * multiple if threads > 1 else items
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    data = array("q", [0, 0, items, span, *addresses])
    run_in_threads(kernel, data.buffer_info()[0], threads, owners=(data, *arguments))


def _num_threads(coefficients: int) -> int:
    return torch.get_num_threads() if coefficients > _SERIAL_COEFFICIENTS else 1


def _renew_lock() -> None:
    """In a forked child: the thread that held the parent's lock does not exist."""
    global _compile_lock
    _compile_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _unrolled(offsets: Offsets) -> bool:
    return len(offsets) <= _MOST_UNROLLED_OFFSETS


def _kernel(operation: str, offsets: Offsets, dtype: str, **options) -> tuple[Callable, list[Tensor | int]]:
    """The kernel of an operation, and its first arguments, by which it knows the stencil unless that is compiled into it."""
    with _compile_lock:
        if _unrolled(offsets):
            return _compiled(_UNROLLED[operation], dtype, (("offsets", offsets), *options.items())), []
        stencil = [_table(offsets), len(offsets)]
        return _compiled(getattr(cpu_loops, operation), dtype, tuple(options.items())), stencil


@functools.cache
def _table(offsets: Offsets) -> Tensor:
    """The table of `cpu_loops`."""
    return torch.tensor(cpu_loops.table(offsets), dtype=torch.int64)


@functools.cache
def _compiled(write: Callable[..., str], dtype: str, options: tuple) -> Callable:
    """The kernel with this source, from the disk cache or compiled now."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError(
            "NUMBA_DISABLE_JIT is set, and the CPU backend's kernels only run compiled: unset it, or compute with "
            "use_backend('reference')"
        )
    source = write(dtype=dtype, cache=True, **dict(options))
    # Numba checks the source file, not the intrinsics that it calls.
    modules = [sys.modules[name] for name in re.findall(r"^from (gmrf_kernels\.\w+) import", source, re.MULTILINE)]
    intrinsics = "".join(Path(module.__file__).read_text() for module in modules)
    digest = hashlib.sha256((source + intrinsics + numba.__version__).encode()).hexdigest()[:24]
    name = f"{write.__name__}_{digest}.py"
    try:
        return _from_disk(source, _cache_directory() / name)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"compiled kernels are not kept on disk: {error}", stacklevel=2)
        return _execute(write(dtype=dtype, cache=False, **dict(options)), Path(name))


def _cache_directory() -> Path:
    given = os.environ.get("BANDED_GMRF_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banded_gmrf"


def _from_disk(source: str, path: Path) -> Callable:
    """The kernel compiled before into the folder of ``path``, else compiled now and kept there.

    A machine that lost its power, or a disk that was full, leaves files that are empty or end too early: they are replaced.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_once(path, source)
    try:
        return _execute(source, path)
    except OSError:
        raise
    except Exception:  # whatever unpickling some of a file, or loading some of a library, raises
        for folder in {path.parent, Path(numba.config.CACHE_DIR or path.parent)}:
            for file in folder.rglob(f"{path.stem}.*"):
                file.unlink(missing_ok=True)
        _write_once(path, source)
        return _execute(source, path)


def _write_once(path: Path, text: str) -> None:
    """Write a file that several processes may want at once, in one step."""
    content = text.encode()
    if path.exists() and path.stat().st_size == len(content):
        return
    handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix=f"{path.stem}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _execute(source: str, path: Path) -> Callable:
    module = ModuleType(f"gmrf_kernels_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where Numba looks for the module of a kernel that it loads from disk
    exec(compile(source, path, "exec"), module.__dict__)
    return module.kernel.ctypes
