"""Threads for compiled kernels: torch's own OpenMP team where there is one, else a pool of Python threads.

Threads beside torch's would compete with them for the cores, because OpenMP's threads spin for milliseconds after each of
torch's operations. A kernel claims its work items from a shared counter, so it does not matter how many threads take part.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

_pool: ThreadPoolExecutor | None = None
_forked = False


def run_in_threads(kernel: Callable[[int], None], data: int, threads: int, owners: Sequence = ()) -> None:
    """Call ``kernel(data)``, a ctypes function, in ``threads`` threads at once and wait for all of them.

    ``owners`` are the objects whose memory the kernel uses: they live until each thread is done, whatever is raised here. An
    interrupt (Ctrl-C) is raised after that.
    """
    if threads <= 1:
        kernel(data)
        return
    parallel = None if _forked else _openmp_parallel()
    if parallel is not None:
        parallel(kernel, data, threads, 0)
        return

    def work(owners):
        kernel(data)

    others = []
    try:
        others.extend(_thread_pool().submit(work, owners) for _ in range(threads - 1))
        kernel(data)
    finally:
        _wait(others)
    for other in others:
        other.result()


def _wait(futures: Sequence[Future]) -> None:
    """Wait for all of them; what interrupts this is raised when they are done."""
    interrupt = None
    while True:
        try:
            wait(futures)
            break
        except BaseException as raised:  # a signal's handler may raise anything
            interrupt = raised
    if interrupt is not None:
        raise interrupt


@functools.cache
def _openmp_parallel() -> Callable | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the GNU OpenMP library that torch's wheels for Linux carry."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        parallel = ctypes.CDLL(str(path)).GOMP_parallel
        parallel.restype = None
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return parallel
    return None


def _thread_pool() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="gmrf_kernels")
    return _pool


def _after_fork() -> None:
    """The parent's threads do not exist in a forked child, and GNU OpenMP would wait for them for ever."""
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
