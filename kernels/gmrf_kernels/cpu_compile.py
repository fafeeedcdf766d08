"""Compiled CPU kernels, each once in a process and, by its source, once on a machine.

They lie in ``$BANDED_GMRF_CACHE``, or in ``banded_gmrf`` in the user's cache directory; where that cannot be written, each
process compiles for itself.
"""

import functools
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba

_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: the thread that held the parent's lock does not exist."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def compiled(write: Callable[..., str], dtype: str, **options) -> Callable:
    """The kernel whose source is ``write(dtype=dtype, **options)``: compiled before, from the disk cache, or compiled now."""
    with _lock:
        return _compiled(write, dtype, tuple(options.items()))


@functools.cache
def _compiled(write: Callable[..., str], dtype: str, options: tuple) -> Callable:
    if numba.config.DISABLE_JIT:
        raise RuntimeError(
            "NUMBA_DISABLE_JIT is set, and the CPU backend's kernels only run compiled: unset it, or compute with "
            "use_backend('reference')"
        )
    source = write(dtype=dtype, cache=True, **dict(options))
    # Numba checks the source file, not the intrinsics that it calls, which are those of `simd` and what is made of them.
    intrinsics = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("simd*.py")))
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
