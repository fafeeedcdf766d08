"""From work to rows: for each implementation a trial, a check against the reference, and its time beside a copy."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import DTYPES, Case, Problem
from .implementations import IMPLEMENTATIONS, first_call
from .measure import GIB, Timing, TrialError, copying, describe, in_own_process, synchronize, take_turns
from .operations import OPERATIONS, difference, tolerance
from .peers import PEERS
from .presets import Work

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What each implementation may use: seconds of timing, and bytes and seconds of its first call."""

    timing: float
    memory: float = 8 * GIB
    first_call: float = 30.0


class NotMeasuredError(Exception):
    """Why there is no time for an implementation; ``status`` is failed, or skipped if it was not tried."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


def measure_work(work: Work, limits: Limits, tell: Callable[[str], None]) -> list[Row]:
    """The rows of one operation on one case; an implementation that gives no right result has one that says why.

    Args:
        work: what to measure.
        limits: see `Limits`.
        tell: is called with what is being done.
    """
    case, operation = work.case, OPERATIONS[work.operation]
    about = case.to_json() | {"operation": work.operation}
    rows, runs = {}, {}
    for name in work.implementations:
        title, peer = IMPLEMENTATIONS[name].title, name in PEERS
        tell(f"{case}: {operation.title}, {title}")
        rows[name] = about | {"implementation": name, "title": title, "peer": peer, "status": "measured"}
        try:
            rows[name]["peak_bytes"] = _first_call(work, name, limits)
            runs[name], seconds = _checked(work, name)
            rows[name]["conversion_seconds"] = seconds if peer else None
        except NotMeasuredError as error:
            rows[name] |= {"status": error.status, "reason": str(error)}
    if not runs:
        return list(rows.values())

    tell(f"{case}: {operation.title}, timing")
    coefficients = _problem(case).coefficients
    baselines = {"sum": coefficients.sum, "copy_": copying(coefficients)}
    for baseline in baselines.values():
        baseline()  # the others have been called
    library = [name for name in runs if name not in PEERS]
    peers = [name for name in runs if name in PEERS]
    on_one_pixel = {}
    if library and peers:
        run = (
            IMPLEMENTATIONS[library[0]].prepare(Problem(replace(case, grid=(1,) * len(case.grid), batch=1)), work.operation).run
        )
        run()
        on_one_pixel["one pixel"] = run
    timings = take_turns(baselines | runs | on_one_pixel, case.device, limits.timing)
    for name in runs:
        rows[name] |= _figures(case, operation.bytes(case), timings[name], timings)
    for name in library:
        rows[name]["peers"] = {peer: timings[peer].median / timings[name].median for peer in peers}
    if on_one_pixel:
        rows[library[0]]["call_seconds"] = timings["one pixel"].median
    for name in peers if library else ():
        rows[name]["times_library"] = rows[library[0]]["peers"][name]
    # Reading and copying the coefficients, by which the others are measured.
    torch_row = case.to_json() | {"implementation": "torch", "title": "torch", "peer": False, "status": "measured"}
    for name, moved in (("sum", case.coefficient_bytes), ("copy_", 2 * case.coefficient_bytes)):
        rows[name] = torch_row | {"operation": name} | _figures(case, moved, timings[name], timings)
    return list(rows.values())


def _first_call(work: Work, name: str, limits: Limits) -> int | None:
    """Peak memory in bytes, of a process of its own on a CPU."""
    if reason := IMPLEMENTATIONS[name].why_not(work.case):
        raise NotMeasuredError("skipped", reason)
    arguments = (work.case, work.operation, name)
    try:
        if torch.device(work.case.device).type == "cpu":
            return in_own_process(first_call, *arguments, memory=limits.memory, seconds=limits.first_call)
        return first_call(*arguments)
    except TrialError as error:
        raise NotMeasuredError("failed", str(error)) from error
    except Exception as error:
        raise NotMeasuredError("failed", describe(error)) from error


def _checked(work: Work, name: str) -> tuple[Callable[[], object], float]:
    """The call to time, once its result was found to be right, and the seconds that the conversion took."""
    try:
        problem = _problem(work.case)
        start = time.perf_counter()
        prepared = IMPLEMENTATIONS[name].prepare(problem, work.operation)
        synchronize(work.case.device)
        seconds = time.perf_counter() - start
        off = difference(prepared.read(prepared.run()), OPERATIONS[work.operation].expected(problem))
    except Exception as error:
        raise NotMeasuredError("failed", describe(error)) from error
    if off > tolerance(DTYPES[work.case.dtype]):
        raise NotMeasuredError("failed", f"wrong: off by {off:.1e} of the largest value")
    return prepared.run, seconds


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> Problem:
    return Problem(case)


def _figures(case: Case, moved: int, timing: Timing, timings: dict[str, Timing]) -> Row:
    reading, copy = timings["sum"].median, timings["copy_"].median
    return {
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "repeats": timing.repeats,
        "bytes": moved,
        "bandwidth": moved / timing.median,
        "fraction_of_copy": moved / timing.median / (2 * case.coefficient_bytes / copy),
        "times_sum": timing.median / reading,
        "times_copy": timing.median / copy,
        "seconds_per_pixel": timing.median / (case.samples * case.pixels),
    }
