"""Turns, trials in processes of their own, and rows for what cannot be measured."""

import os
import signal
import sys
import time

import pytest
import torch

from bench import rows
from bench.cases import Case
from bench.measure import GIB, TrialError, in_own_process, take_turns, turns_by_the_clock
from bench.operations import OPERATIONS
from bench.presets import Work
from bench.rows import Limits, measure_work

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux alone")
CASE = Case("3", (6, 7), batch=2)


def ignore(text):
    pass


def add(a, b):
    return a + b


def fill(gibibytes):
    return torch.ones(int(gibibytes * GIB / 4)).sum().item()


def fail():
    raise ArithmeticError("two and two\nmake five")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = turns_by_the_clock(functions, seconds=0.0, least=4, most=10)
    assert calls == ["a", "b"] * 4
    assert {len(turns) for turns in times.values()} == {4}
    timings = take_turns(functions, "cpu", seconds=0.0, least=4)
    assert {timing.repeats for timing in timings.values()} == {4}
    for timing in timings.values():
        assert 0 <= timing.low <= timing.median <= timing.high


def test_a_turn_is_a_loop_of_a_short_function_and_one_call_of_a_long_one():
    calls = []

    def short():
        calls.append("short")
        time.sleep(1e-3)

    def long():
        calls.append("long")
        time.sleep(0.03)

    times = turns_by_the_clock({"short": short, "long": long}, seconds=0.0, least=3, most=3, burst=0.02)
    turns = "".join("s" if call == "short" else "L" for call in calls).split("L")
    assert calls.count("long") == 3
    assert turns[0] == "s"
    assert all(3 <= len(turn) <= 21 for turn in turns[1:3])  # with one that does not count
    assert all(1e-3 <= turn < 0.02 for turn in times["short"])  # of one call
    assert all(turn >= 0.03 for turn in times["long"])


def test_turns_end_with_the_time_or_the_number():
    times = turns_by_the_clock({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, seconds=0.05, least=2, most=50)
    assert 2 <= len(times["slow"]) <= 3
    assert len(times["fast"]) == 50


def test_trial_returns_what_the_function_returns():
    assert in_own_process(add, 1, 2, memory=GIB, seconds=60) == 3


@pytest.mark.parametrize(
    ("function", "arguments", "seconds", "message"),
    [
        (fail, (), 60, "ArithmeticError: two and two make five"),
        (die, (), 60, "the process died of SIGKILL"),
        (time.sleep, (60,), 0.2, "takes longer than 0.2 s"),
        pytest.param(fill, (2,), 60, "needs more memory than 1 GiB", marks=LINUX),
    ],
)
def test_trial_says_why_there_is_no_result(function, arguments, seconds, message):
    with pytest.raises(TrialError, match=message):
        in_own_process(function, *arguments, memory=GIB, seconds=seconds)


def test_rows_of_one_operation():
    work = Work(CASE, "log_prob", ("cpu", "reference", "shifts"))
    measured = {row["implementation"]: row for row in measure_work(work, Limits(0.0), ignore) if row["operation"] == "log_prob"}
    assert set(measured) == {"cpu", "reference", "shifts"}
    for row in measured.values():
        assert row["status"] == "measured"
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["bytes"] == OPERATIONS["log_prob"].bytes(CASE)
        assert row["bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["seconds_per_pixel"] == pytest.approx(row["seconds"] / (2 * 6 * 7))
        assert row["fraction_of_copy"] == pytest.approx(row["bytes"] / (2 * CASE.coefficient_bytes) / row["times_copy"])
    assert set(measured["cpu"]["peers"]) == {"shifts"}
    assert measured["shifts"]["times_library"] == pytest.approx(measured["shifts"]["seconds"] / measured["cpu"]["seconds"])
    assert measured["shifts"]["conversion_seconds"] >= 0
    assert measured["cpu"]["conversion_seconds"] is None


def test_copies_are_rows():
    copies = {row["operation"]: row for row in measure_work(Work(CASE, "sample", ("cpu",)), Limits(0.0), ignore)}
    assert copies["copy_"]["fraction_of_copy"] == copies["copy_"]["times_copy"] == copies["sum"]["times_sum"] == 1
    assert copies["copy_"]["bytes"] == 2 * copies["sum"]["bytes"] == 2 * 2 * 6 * 7 * 5 * 4


def reason(work, limits=None):
    (row,) = (row for row in measure_work(work, limits or Limits(0.0), ignore) if row["operation"] == work.operation)
    assert row["status"] == "failed"
    assert "seconds" not in row
    return row["reason"]


def test_wrong_result_is_never_timed(monkeypatch):
    monkeypatch.setattr(rows, "difference", lambda results, expected: 0.5)
    monkeypatch.setattr(rows, "take_turns", None)
    assert reason(Work(CASE, "sample", ("cpu",))) == "wrong: off by 5.0e-01 of the largest value"


@LINUX
def test_too_much_memory_is_a_row():
    large = Case("7", (512, 512), batch=4)  # 100 MiB of coefficients
    assert reason(Work(large, "sample", ("cpu",)), Limits(0.0, memory=GIB / 32)) == "needs more memory than 0.03125 GiB"


def test_too_much_time_is_a_row():
    assert reason(Work(CASE, "sample", ("cpu",)), Limits(0.0, first_call=0.0)) == "takes longer than 0 s"


def test_failure_of_one_leaves_the_others(monkeypatch):
    peer = rows.IMPLEMENTATIONS["scipy"]

    def prepare(problem, operation):
        raise RuntimeError("no luck")

    monkeypatch.setattr(peer, "prepare", prepare)
    outcome = {row["implementation"]: row for row in measure_work(Work(CASE, "sample", ("cpu", "scipy")), Limits(0.0), ignore)}
    assert outcome["cpu"]["status"] == "measured"
    assert outcome["scipy"]["reason"] == "RuntimeError: no luck"


def test_what_cannot_run_is_skipped():
    work = Work(CASE, "sample", ("cpu", "cupy"))
    outcome = {row["implementation"]: row for row in measure_work(work, Limits(0.0), ignore)}
    assert outcome["cupy"]["status"] == "skipped"
    assert outcome["cupy"]["reason"] in ("cupy is not installed", "does not run on cpu")
    assert set(outcome["cpu"]["peers"]) == set()
