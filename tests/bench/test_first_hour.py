"""The first hour on a GPU, without one: what is done is not done again, in which order, what is written, and the refusal."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import first_hour
from bench.__main__ import app
from bench.cases import Case
from bench.first_hour import Recorder, checks, measurements, predicted_seconds, run_stages, run_tests, take_steps
from bench.journal import Journal
from bench.presets import PRESETS, Sweep, plan
from bench.rows import Limits

ABOUT = {"commit": "abc", "gpu": "H200"}


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def step(calls, name, result=None):
    def work():
        calls.append(name)
        return result or {"status": "right"}

    return name, work


def test_refusal_without_a_gpu_before_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "new")])
    assert outcome.exit_code == 2
    assert "sees no GPU" in outcome.output
    assert not (tmp_path / "new").exists()


def test_every_step_is_on_the_disk_before_the_next_and_is_taken_once(journal):
    calls = []
    steps = [step(calls, "a"), ("b", lambda: 1 / 0), step(calls, "c", {"status": "wrong", "off": 1.0})]
    seen = iter(steps)

    def watched():
        for number, each in enumerate(seen):
            assert len(journal.done()) == number
            yield each

    assert take_steps(Recorder(journal, "check", 60), watched())
    assert [(line["done"], line["status"]) for line in journal.lines() if "done" in line] == [
        ("a", "right"),
        ("b", "failed"),
        ("c", "wrong"),
    ]
    assert "ZeroDivisionError" in journal.bad()[0]["text"]
    assert [line["done"] for line in journal.bad()] == ["b", "c"]
    assert take_steps(Recorder(journal, "check", 60), steps)
    assert calls == ["a", "c"]


def test_a_line_that_was_cut_off_is_not_there(journal):
    journal.write(begun="a")
    journal.write(done="a", status="right")
    with open(journal.path, "a") as file:
        file.write('{"done": "b", "sta')
    assert journal.done() == {"a"}
    journal.write(done="c", status="right")
    assert [line.get("done") for line in journal.lines()] == [None, "a", "c"]


def test_no_step_begins_when_the_time_is_over(journal):
    calls = []
    assert not take_steps(Recorder(journal, "check", 0), [step(calls, "a")])
    assert calls == []
    assert journal.lines() == []


def test_stages_run_in_order_and_a_second_start_goes_on(journal, tmp_path):
    started = []

    def interrupted(stage, folder, seconds):
        started.append(stage)
        journal.write(begun=f"step of {stage}", stage=stage)
        if stage == "second" and started.count("second") == 1:
            raise KeyboardInterrupt
        journal.write(done=f"step of {stage}", stage=stage, status="right")
        journal.write(complete=stage)

    stages = ("first", "second", "third")
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path, ABOUT, start=interrupted, stages=stages)
    assert run_stages(tmp_path, ABOUT, start=interrupted, stages=stages)
    assert started == ["first", "second", "second", "third"]
    assert journal.bad() == []


def test_a_step_that_kills_its_process_is_a_failure_and_the_others_follow(journal, tmp_path):
    calls = []

    def start(stage, folder, seconds):
        names = [name for name in ("a", "b", "c") if name not in journal.done()]
        for name in names:
            calls.append(name)
            journal.write(begun=name, stage=stage)
            if name == "b":
                return "its process ended with status -11"
            journal.write(done=name, stage=stage, status="right")
        journal.write(complete=stage)

    assert run_stages(tmp_path, ABOUT, start=start, stages=["check"])
    assert calls == ["a", "b", "c"]
    assert [(line["done"], line["text"]) for line in journal.bad()] == [("b", "its process ended with status -11")]


def test_a_process_whose_gpu_is_broken_ends_before_other_steps_fail_for_it(journal, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    calls = []
    with pytest.raises(SystemExit):
        take_steps(Recorder(journal, "check", 60), [("a", synchronize), step(calls, "b")])
    assert calls == []
    assert journal.under_way() is None
    assert [line["done"] for line in journal.bad()] == ["a"]


def test_a_stage_that_cannot_start_is_left_for_the_next_start(journal, tmp_path):
    started = []

    def start(stage, folder, seconds):
        started.append(stage)
        if stage == "first":
            return "its process ended with status 1"
        journal.write(complete=stage)

    assert not run_stages(tmp_path, ABOUT, start=start, stages=["first", "second"])
    assert started == ["first", "second"]


def test_the_end_of_a_start_is_no_fault_of_the_step_under_way(journal, tmp_path):
    def start(stage, folder, seconds):
        assert seconds <= 100
        journal.write(begun="a", stage=stage)
        return f"stopped when its stage had run for {seconds:.0f} s"

    assert not run_stages(tmp_path, ABOUT, seconds=100, start=start, stages=["check"])
    assert journal.done() == set()
    assert not run_stages(tmp_path, ABOUT, seconds=1, start=lambda *_: pytest.fail("started"), stages=["check"])


@pytest.mark.parametrize("other", [{"commit": "def"}, {"gpu": "A100"}])
def test_steps_of_another_commit_or_gpu_are_not_gone_on_with(tmp_path, other):
    run_stages(tmp_path, ABOUT, stages=[])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds steps of commit abc, gpu H200; this is commit")):
        run_stages(tmp_path, ABOUT | other, stages=[])


def test_checks_find_right_and_wrong_results(journal, monkeypatch):
    case = Case("3", (5, 7), 2)
    steps = list(checks("cpu", [case]))
    assert len(steps) == 8
    take_steps(Recorder(journal, "check", 60), steps)
    lines = [line for line in journal.lines() if "done" in line]
    assert all(line["status"] == "right" and line["off"] <= line["allowed"] for line in lines), lines
    monkeypatch.setattr(first_hour, "default_backend", lambda device: "broken")
    monkeypatch.setitem(first_hour.IMPLEMENTATIONS, "broken", Broken())
    assert [work()["status"] for _, work in steps[2:]] == ["wrong"] * 6


class Broken:
    def prepare(self, problem, operation):
        right = first_hour.IMPLEMENTATIONS["cpu"].prepare(problem, operation)
        return type(right)(lambda: tuple(result + 1 for result in right.run()))


def test_tests_are_steps(journal, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.gpu\ndef test_left_out(): pytest.skip('no memory')\n"
        "def test_other(): pass\n"
    )
    assert not run_tests(Recorder(journal, "test", 0), [file])
    assert journal.done() == set()
    assert run_tests(Recorder(journal, "test", 60), [file])
    lines = [line for line in journal.lines() if "done" in line]
    assert [(line["done"].rpartition("::")[2], line["status"]) for line in lines] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
        ("test_left_out", "skipped"),
    ]
    assert "assert 1 == 2" in lines[1]["text"]
    assert run_tests(Recorder(journal, "test", 60), [file])
    assert len(journal.done()) == 3


def test_every_test_that_needs_a_gpu_is_in_a_group():
    root = first_hour.ROOT
    groups = [root / file for files in first_hour.TESTS.values() for file in files]
    assert all(group.exists() for group in groups)
    text = re.compile(r"^pytestmark = pytest\.mark\.gpu|^ON_GPU", re.MULTILINE)
    marked = [path for path in (root / "tests").rglob("*.py") if text.search(path.read_text(encoding="utf-8"))]
    assert len(marked) >= 4
    for path in marked:
        assert any(path == group or group in path.parents for group in groups), path


def test_measurements_have_rows_and_the_model_beside_them(journal):
    sweep = Sweep(stencils=("3",), resolutions=("8",), batches=(2,), operations=("sample",))
    steps = measurements([sweep], {"solve T f=3 2x8^2": 1e-4}, Limits(0.0), "cpu")
    take_steps(Recorder(journal, "bench", 60), steps)
    line = journal.lines()[-1]
    assert line["status"] == "measured"
    row = next(row for row in line["rows"] if row["operation"] == "sample")
    assert row["seconds"] > 0
    assert row["predicted_seconds"] == 1e-4
    json.dumps(line, allow_nan=False)


def test_the_models_names():
    nll, gradient = "nll f=7 16x1024^2", "gradient f=7 16x1024^2"
    predictions = {nll: 1.0, gradient: 2.0, "solve T 3x3x3 8x64^3": 4.0, f"{nll} bfloat16": 8.0}
    large = Case("7", (1024, 1024), 16)
    assert predicted_seconds(large, "log_prob", predictions) == 1.0
    assert predicted_seconds(large, "log_prob_grad", predictions) == 3.0
    assert predicted_seconds(Case("7", (1024, 1024), 16, dtype="bfloat16"), "log_prob", predictions) == 8.0
    assert predicted_seconds(Case("3x3x3", (64, 64, 64), 8), "sample", predictions) == 4.0
    assert predicted_seconds(large, "sample", predictions) is None
    assert predicted_seconds(Case("7", (1024, 1024), 16, samples=2), "log_prob", predictions) is None
    assert predicted_seconds(large, "precision_solve", predictions) is None


def test_a_tool_that_is_not_there_is_named(tmp_path, capsys):
    first_hour.predict(tmp_path, tmp_path / "nowhere.py")
    assert first_hour.predictions_in(tmp_path) == {}
    assert str(tmp_path / "nowhere.py") in capsys.readouterr().out


def test_predictions_are_kept(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("import sys, json; json.dump({'nll': {'model, us': 5.0}}, open(sys.argv[2], 'w'))")
    first_hour.predict(tmp_path, tool)
    tool.unlink()
    first_hour.predict(tmp_path, tool)
    assert first_hour.predictions_in(tmp_path) == {"nll": 5e-6}


def test_a_tool_that_fails_is_said_and_costs_nothing_else(tmp_path, capsys):
    tool = tmp_path / "tool.py"
    tool.write_text("raise SystemExit('no such kernel')")
    first_hour.predict(tmp_path, tool)
    assert "no such kernel" in capsys.readouterr().out
    assert first_hour.predictions_in(tmp_path) == {}


def test_the_bench_has_what_the_model_has_first():
    modelled = plan(first_hour._MODELLED, "cpu")
    assert len(modelled) == 9 + 3 + 1 + 3 + 1 + 1 + 1 + 1
    assert [stage.name for stage in first_hour.STAGES][-2:] == ["bench of what the model has", "bench gpu"]
    assert plan(PRESETS["gpu"].sweeps, "cpu")
    assert Path(first_hour.__file__).parents[1] == first_hour.ROOT
