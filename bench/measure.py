"""Timing, and trials: a first call in a process of its own finds the memory that an operation needs, or why it cannot run."""

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GIB = 2**30

# Seconds for which a short function is called at a time.
BURST = 1e-3

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of ``repeats``, and the quartiles."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, len(seconds))


def take_turns(
    functions: dict[Any, Callable[[], object]], device: str, seconds: float, least: int = 5, most: int = 200
) -> dict[Any, Timing]:
    """Time functions that have been called before, side by side.

    On a CPU they take turns, so that a change in the machine's speed meets all of them, and each has its turns until it has
    used ``seconds``, but ``least`` to ``most`` of them. In a turn a short function is called for a millisecond, as in a loop of
    its own, after one call that does not count; the turn's time is that of one call. On a GPU `triton.testing.do_bench` times
    one after the other, for ``seconds`` each, with its cache emptied before each call.
    """
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        measured = {
            name: [ms / 1e3 for ms in do_bench(function, rep=seconds * 1e3, return_mode="all")]
            for name, function in functions.items()
        }
    else:
        measured = turns_by_the_clock(functions, seconds, least, most, burst=BURST)
    return {name: Timing.of(times) for name, times in measured.items()}


def turns_by_the_clock(
    functions: dict[Any, Callable[[], object]], seconds: float, least: int, most: int, pause: float = 0.0, burst: float = 0.0
) -> dict[Any, list[float]]:
    """The seconds of a call in each turn, as `take_turns` says for a CPU, with a ``pause`` before each turn.

    A turn has as many calls as ``burst`` seconds have room for, by the turn before; the first has one.
    """
    measured, used = {name: [] for name in functions}, dict.fromkeys(functions, 0.0)
    remaining = dict(functions)
    while remaining:
        for name, function in list(remaining.items()):
            if pause:
                time.sleep(pause)
            calls = max(1, int(burst / measured[name][-1])) if measured[name] else 1
            if calls > 1:
                function()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            took = time.perf_counter() - start
            measured[name].append(took / calls)
            used[name] += took
            turns = len(measured[name])
            if turns == most or (turns >= least and used[name] >= seconds):
                del remaining[name]
    return measured


class TrialError(Exception):
    """Why a trial gave no result."""


def in_own_process(function: Callable[..., Any], *arguments: Any, memory: float, seconds: float) -> Any:
    """``function(*arguments)`` in a fresh process, which inherits imported modules but no memory of earlier calls.

    Args:
        function: importable by name, as are its arguments.
        memory: bytes that it may have on top of what it has at its start; enforced on Linux.
        seconds: after these it is stopped.

    Raises:
        TrialError: it raised an error, needed more, took longer, or died.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, memory, torch.get_num_threads(), function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TrialError(f"takes longer than {seconds:g} s")
        succeeded, answer = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        raise TrialError(f"the process died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise TrialError(answer)
    return answer


def _context():
    """Forks of a process that has imported the library and this benchmark: fresh, without the seconds that imports take."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler, which takes seconds, at the first call of a registered operator.
    context.set_forkserver_preload(["torch._dynamo", "bench.toolbox"])
    return context


def _answer(sender: Connection, memory: float, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        import resource

        limit = int(_status("VmData") + memory)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:
        sender.send((False, describe(error, memory)))


def describe(error: Exception, memory: float | None = None) -> str:
    """An error in one line; a failed allocation as what it is."""
    text = " ".join(str(error).split())
    failed_allocations = ("not enough memory", "Cannot allocate memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in failed_allocations):
        return "needs more memory" + (f" than {memory / GIB:g} GiB" if memory is not None else f": {text}")
    return f"{type(error).__name__}: {text}"[:300]


class PeakMemory:
    """The highest memory since `start`, above what there was when this object was made.

    On a CPU the resident memory of the process, which is to be a fresh one, as Linux tells it; on a GPU what torch allocated.
    """

    def __init__(self, device: str):
        self._cuda = torch.device(device).type == "cuda"
        self._before = torch.cuda.memory_allocated(device) if self._cuda else _status("VmRSS")
        self._device = device

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif os.access(_CLEAR_REFS, os.W_OK):
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)  # glibc keeps freed blocks of up to 32 MiB
            _CLEAR_REFS.write_text("5")  # the high-water mark falls to the present value

    def bytes(self) -> int | None:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        # What is freed between the two readings can make the difference of a small call negative.
        return max(0, _status("VmHWM") - self._before) if os.access(_CLEAR_REFS, os.W_OK) else None


def _status(name: str) -> int:
    """An entry of this process' status in bytes; 0 where there is no such file."""
    if not _STATUS.exists():
        return 0
    return int(re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024


def synchronize(device: str) -> None:
    """Wait for a GPU, so that a clock read next is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def copying(coefficients: Tensor) -> Callable[[], object]:
    """The measure of all others: a copy of the coefficients into memory that is there already."""
    copy = torch.empty_like(coefficients)
    return lambda: copy.copy_(coefficients)
