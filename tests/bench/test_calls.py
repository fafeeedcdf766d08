"""``python -m bench calls`` on tiny images, and what is done about calls that fail or disagree."""

import io
import json
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import calls
from bench.__main__ import app
from bench.call_groups import Group
from bench.calls import Sizes, default_sizes, groups, measure_group, run_calls
from bench.cases import Case, Problem
from bench.measure import turns_by_the_clock

CASE = Case("3", (6, 7), batch=2)
TINY = Sizes((CASE,), (CASE,), (replace(CASE, samples=3),), (CASE,), pause=1e-4, seconds=0.0)


def test_all_calls_are_rows(tmp_path):
    output = io.StringIO()
    results = run_calls(TINY, "cpu", tmp_path, Console(file=output, width=200))
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    named = {(row["group"], row["call"]): row for row in results["calls"]}
    assert len(named) == len(results["calls"])
    layers = {"backend", "operator", "function", "distribution"}
    for group, expected in {
        "solve with Lᵀ": layers - {"distribution"},
        "log likelihood": layers,
        "log likelihood and its gradient": layers | {"torch alone", "backend in torch"},
        "construction": {"likelihood", "StencilCholesky", "GMRF, unchecked", "GMRF, checked"},
        "sample": {"solve", "numbers, then a solve", "sample", "torch.randn"},
        "3 samples of one factor": {"1 solve", "3 solves, one by one", "1 solve of 3 vectors", "3 samples"},
        "log density, low rank": {"GMRF", "R = 1", "R = 16", "R = 42"},
        "log density and its gradient, low rank": {"GMRF", "R = 1", "R = 16", "R = 42"},
    }.items():
        assert {call for of, call in named if of == group} == expected
    for row in named.values():
        assert row["status"] == "measured", row
        for kind in ("hot", "cold"):
            assert 0 < row[kind]["low"] <= row[kind]["median"] <= row[kind]["high"]
            assert row[kind]["repeats"] == 5
            unit = named[row["group"], row["unit"]]
            assert row[kind]["ratio"] == pytest.approx(row[kind]["median"] / unit[kind]["median"])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| 3, 2 × 6 × 7 | log likelihood | distribution |" in text
    assert "slept for 0.1 ms" in text
    assert results["machine"]["processor"] in text
    assert "3 solves, one by one" in output.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_layers_agree_on_other_shapes_and_dtypes(shape, dtype):
    case = replace(CASE, grid=shape, dtype=dtype)
    for group in groups(Problem(case), Sizes((case,), (), (), ())):
        for row in measure_group(group, case, TINY):
            assert row["status"] == "measured", row


def test_calls_that_fail_or_disagree_have_a_reason_and_no_time():
    def fails():
        raise RuntimeError("no luck")

    ones = torch.ones(2, 3)
    outcomes = {"unit": lambda: ones, "same": lambda: ones.clone(), "other": lambda: ones + 0.5, "none": fails}
    rows = measure_group(Group("made", outcomes, "unit", {}, alike=True), CASE, TINY)
    assert [row["status"] for row in rows] == ["measured", "measured", "failed", "failed"]
    assert rows[2]["reason"] == "ArithmeticError: off by 5.0e-01 of the largest value of unit"
    assert rows[3]["reason"] == "RuntimeError: no luck"
    assert "hot" not in rows[2]
    table = calls.markdown_report({**_about(), "calls": rows})
    assert "| none |  |  |  |  | unit | RuntimeError: no luck |" in table


def test_a_unit_that_fails_leaves_the_times_of_others():
    def fails():
        raise RuntimeError("no luck")

    unit, other = measure_group(Group("made", {"unit": fails, "other": lambda: None}, "unit", {}), CASE, TINY)
    assert unit["status"] == "failed"
    assert other["status"] == "measured"
    assert "ratio" not in other["hot"]
    assert "| other |" in calls.markdown_report({**_about(), "calls": [unit, other]})


def _about():
    machine = {"processor": "P", "cpus": 2, "threads": 1, "platform": "Linux"}
    of_run = {"command": "c", "commit": None, "python": "3", "versions": {}, "seconds": 1.0, "interrupted": False}
    return {"machine": machine, "pause": 2e-3, **of_run}


def test_pauses_are_not_part_of_the_time():
    (times,) = turns_by_the_clock({"call": lambda: None}, 0.0, least=3, most=3, pause=0.02).values()
    assert len(times) == 3
    assert max(times) < 0.02


def test_pauses_are_made():
    start = time.perf_counter()
    turns_by_the_clock({"call": lambda: None}, 0.0, least=3, most=3, pause=0.02)
    assert time.perf_counter() - start >= 3 * 0.02


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    measure, count = calls.measure_group, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(calls, "measure_group", interrupted)
    options = ["--stencils", "3", "--resolutions", "6", "--batch", "2", "--seconds", "0", "--pause", "0"]
    outcome = CliRunner().invoke(app, ["calls", *options, "--out", str(tmp_path / "new")])
    assert outcome.exit_code == 130
    results = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert (results["interrupted"], len({row["group"] for row in results["calls"]})) == (True, 2)
    assert {tuple(row["grid"]) for row in results["calls"]} == {(6, 6)}


def test_default_cases_are_those_of_the_aims():
    sizes = default_sizes("cpu")
    assert {(case.stencil, case.batch, case.grid) for case in sizes.small} == {
        ("3", 1, (64, 64)),
        ("7", 1, (64, 64)),
        ("5", 16, (32, 32)),
    }
    for dtype in ("float32", "float64"):
        assert Case("7", (64, 64), 64, dtype=dtype) in sizes.samples
        assert Case("7", (1024, 1024), 8, dtype=dtype) in sizes.samples
    assert [case.samples for case in sizes.shared] == [16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--stencils", "4"], "sizes are odd"), (["--batch", "0"], "--batch has '0'"), (["--device", "abacus"], "cannot be used")],
)
def test_bad_options_end_at_once(tmp_path, arguments, message):
    outcome = CliRunner().invoke(app, ["calls", *arguments, "--out", str(tmp_path / "new")])
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()
