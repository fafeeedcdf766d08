"""From work to rows: for each implementation a trial, a check against the reference, and its time beside a copy."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cases import DTYPES, Case, Problem
from .implementations import IMPLEMENTATIONS, first_call
from .measure import GIB, Timing, TrialError, copying, describe, in_own_process, synchronize, take_turns
from .operations import OPERATIONS, Prepared, difference, tolerance
from .peers import PEERS
from .presets import Work

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What each implementation may use: seconds of timing, and bytes and seconds of its first call."""

    timing: float
    memory: float = 8 * GIB
    first_call: float = 30.0


def measure(work: Work, limits: Limits, tell: Callable[[str], None]) -> list[Row]:
    """The rows of one operation on one case; an implementation that gives no right result has one that says why.

    Args:
        work: what to measure.
        limits: see `Limits`.
        tell: is called with what is being done.
    """
    case, operation = work.case, OPERATIONS[work.operation]
    reasons: dict[str, tuple[str, str]] = {}
    peaks: dict[str, int | None] = {}
    for name in work.implementations:
        tell(f"{case}: {operation.title}, {IMPLEMENTATIONS[name].title}")
        if reason := IMPLEMENTATIONS[name].why_not(case):
            reasons[name] = ("skipped", reason)
            continue
        try:
            peaks[name] = _trial(work, name, limits)
        except TrialError as error:
            reasons[name] = ("failed", str(error))

    ready: dict[str, Prepared] = {}
    conversions: dict[str, float] = {}
    timings: dict[str, Timing] = {}
    if peaks:
        problem = _problem(case)
        expected = operation.expected(problem)
        for name in peaks:
            try:
                start = time.perf_counter()
                prepared = IMPLEMENTATIONS[name].prepare(problem, work.operation)
                synchronize(case.device)
                conversions[name] = time.perf_counter() - start
                off = difference(prepared.read(prepared.run()), expected)
                if off > tolerance(DTYPES[case.dtype]):
                    reasons[name] = ("failed", f"wrong: off by {off:.1e} of the largest value")
                else:
                    ready[name] = prepared
            except Exception as error:
                reasons[name] = ("failed", describe(error))
        tell(f"{case}: {operation.title}, timing")
        timings = _time({name: prepared.run for name, prepared in ready.items()}, problem, limits.timing)

    rows = []
    about = case.to_json() | {"operation": work.operation}
    for name in work.implementations:
        row = about | {"implementation": name, "title": IMPLEMENTATIONS[name].title, "peer": name in PEERS}
        if name in reasons:
            row["status"], row["reason"] = reasons[name]
        else:
            row |= _figures(case, operation.bytes(case), timings[name], timings["sum"], timings["copy_"])
            row |= {"peak_bytes": peaks[name], "conversion_seconds": conversions[name] if name in PEERS else None}
        rows.append(row)
    for row in rows:
        if row["status"] == "measured" and not row["peer"]:
            row["peers"] = {
                other["implementation"]: other["seconds"] / row["seconds"] for other in rows if _is_measured_peer(other)
            }
    if timings:
        rows += _copy_rows(case, timings)
    return rows


def _is_measured_peer(row: Row) -> bool:
    return row["peer"] and row["status"] == "measured"


def _trial(work: Work, name: str, limits: Limits) -> int | None:
    if torch.device(work.case.device).type == "cpu":
        arguments = (first_call, work.case, work.operation, name)
        return in_own_process(*arguments, memory=limits.memory, seconds=limits.first_call)
    try:
        return first_call(work.case, work.operation, name)
    except Exception as error:
        raise TrialError(describe(error)) from error


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> Problem:
    return Problem(case)


def _time(runs: dict[str, Callable[[], object]], problem: Problem, seconds: float) -> dict[str, Timing]:
    if not runs:
        return {}
    baselines = {"sum": problem.coefficients.sum, "copy_": copying(problem.coefficients)}
    for baseline in baselines.values():
        baseline()
    return take_turns(baselines | runs, problem.case.device, seconds)


def _figures(case: Case, moved: int, timing: Timing, reading: Timing, copy: Timing) -> Row:
    return {
        "status": "measured",
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "repeats": timing.repeats,
        "bytes": moved,
        "bandwidth": moved / timing.median,
        "fraction_of_copy": moved / timing.median / (2 * case.coefficient_bytes / copy.median),
        "times_sum": timing.median / reading.median,
        "times_copy": timing.median / copy.median,
        "seconds_per_pixel": timing.median / (case.samples * case.pixels),
    }


def _copy_rows(case: Case, timings: dict[str, Timing]) -> list[Row]:
    """Reading and copying the coefficients, by which the others are measured."""
    about = case.to_json() | {"implementation": "torch", "title": "torch", "peer": False, "peak_bytes": None}
    moved = {"sum": case.coefficient_bytes, "copy_": 2 * case.coefficient_bytes}
    return [
        about | {"operation": name} | _figures(case, moved[name], timings[name], timings["sum"], timings["copy_"])
        for name in moved
    ]
