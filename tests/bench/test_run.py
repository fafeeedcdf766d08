"""``python -m bench`` from end to end on tiny cases, Ctrl-C in the middle of it, and the comparison of two runs."""

import copy
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import run
from bench.__main__ import app
from bench.compare import faster_rows, slower_rows
from bench.quality import PATCH
from bench.report import why_slower
from bench.results import read_results, write_results

TINY = ["--resolutions", "8,16", "--batch", "2", "--stencils", "3,5", "--ops", "log_prob_grad,sample", "--seconds", "0"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (3, PATCH, PATCH), dtype=np.uint8)
    np.savez(path, train=images, test=images)
    return path


def bench(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("bench") / "new"
    outcome = bench(*TINY, "--peers", "scipy,shifts,cupy", "--data", photographs, "--out", folder)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1] == f"Results: {folder}"
    assert "SciPy spsolve_triangular" in outcome.output
    results, lines = read_results(folder), [line.split() for line in outcome.output.splitlines()]
    for score in results["quality"]["scores"]:  # the table of nats beside that of times
        nats = f"{score['nats_per_pixel']:.3f}"
        assert any(line[:3] == [score["stencil"], str({"3": 5, "5": 13}[score["stencil"]]), nats] for line in lines)
    return folder


def test_results_are_complete(finished):
    results = read_results(finished)
    assert results["interrupted"] is False
    assert {"processor", "cpus", "threads"} <= results["machine"].keys()
    assert {"torch", "numpy", "scipy", "torchsparsegradutils"} <= results["versions"].keys()
    assert results["command"].startswith("python -m bench")
    works = {(row["stencil"], row["grid"][0], row["operation"], row["implementation"]) for row in results["rows"]}
    assert len(works) == len(results["rows"])
    for stencil in ("3", "5"):
        for side in (8, 16):
            expected = {("sum", "torch"), ("copy_", "torch"), ("sample", "scipy"), ("sample", "cupy")}
            expected |= {("log_prob_grad", "cpu"), ("log_prob_grad", "shifts"), ("sample", "cpu")}
            assert {work[2:] for work in works if work[:2] == (stencil, side)} == expected
    assert [score["stencil"] for score in results["quality"]["scores"]] == ["3", "5"]


def test_report_and_plots_are_written(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    for heading in ("Which stencil?", "Against other software", "All measurements", "Not measured", "How it was measured"):
        assert f"## {heading}\n" in text
    assert "CuPy spsolve_triangular: " in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| 3, 2 × 16 × 16 | sample | SciPy") for line in tables)
    for name in ("quality.png", "time.png", "bandwidth.png", "peers.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_three_axes_and_a_diagonal_alone_make_a_report(tmp_path, photographs):
    arguments = ["--stencils", "1x3x3", "--resolutions", "2x6", "--batch", "1", "--ops", "log_prob", "--peers", "none"]
    outcome = bench(*arguments, "--seconds", 0, "--data", photographs, "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "results.json"]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    measure_work, calls = run.measure_work, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure_work(*arguments)

    monkeypatch.setattr(run, "measure_work", interrupted)
    outcome = bench(*TINY, "--peers", "none", "--out", tmp_path)
    assert outcome.exit_code == 130
    results = read_results(tmp_path)
    assert results["interrupted"] is True
    assert {row["operation"] for row in results["rows"]} == {"log_prob_grad", "sum", "copy_"}
    assert "Interrupted" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "'huge', expected one of quick, full, peers, gpu"),
        (["--stencils", "4"], "sizes are odd"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--stencils", "3x3x3"], "nothing to measure"),
        (["--data", "no_such_file.npz"], "no_such_file.npz cannot be read"),
    ],
)
def test_bad_options_end_at_once(tmp_path, arguments, message):
    outcome = bench(*arguments, "--out", tmp_path / "new")
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_help_says_what_data_are():
    words = " ".join(bench("--help").output.replace("│", " ").split())
    assert "arrays train and test, both (count, height, width)" in words
    assert "gray levels from 0 to 255" in words


def test_used_folder_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    outcome = bench(*TINY, "--out", tmp_path)
    assert outcome.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_compare_finds_slower_and_failed_rows(finished, tmp_path):
    before = read_results(finished)
    after = copy.deepcopy(before)
    slow, fast, failed = [row for row in after["rows"] if row["implementation"] == "cpu"][:3]
    for row, factor in ((slow, 3.0), (fast, 0.2)):
        for key in ("seconds", "seconds_low", "seconds_high", "times_copy"):
            row[key] *= factor
    # Measured with zero spread, so that the change is beyond it.
    for row in (*before["rows"], *after["rows"]):
        if row["status"] == "measured":
            row["seconds_low"] = row["seconds_high"] = row["seconds"]
    failed |= {"status": "failed", "reason": "takes longer than 30 s"}
    assert [pair[1] for pair in slower_rows(before, after, 0.1)] == [slow]
    assert [pair[1] for pair in faster_rows(before, after, 0.1)] == [fast]

    for name, results in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, results, "")
    outcome = bench("compare", tmp_path / "a", tmp_path / "b" / "results.json")
    assert outcome.exit_code == 1
    assert "1 slower, 1 faster, 1 failed." in outcome.output
    assert "3.00" in outcome.output
    assert "takes longer than 30 s" in outcome.output
    same = bench("compare", tmp_path / "a", tmp_path / "a")
    assert same.exit_code == 0
    assert "0 slower, 0 faster, 0 failed." in same.output


def test_small_changes_and_changes_within_the_spread_are_not_slower(finished):
    before = read_results(finished)
    after = copy.deepcopy(before)
    for row in after["rows"]:
        if row["status"] == "measured":
            row["seconds"] *= 1.05
    assert slower_rows(before, after, 0.1) == []
    for row in after["rows"]:
        if row["status"] == "measured":
            row["seconds"] *= 2
            row["seconds_low"] = 0.0
    assert slower_rows(before, after, 0.1) == []


def test_compare_refuses_other_files(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"scores": []}))
    for given, message in ((path, "was not written by this program"), (tmp_path, "cannot be read")):
        outcome = bench("compare", given, given)
        assert outcome.exit_code == 2
        assert message in " ".join(outcome.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("ours", "call", "peer", "expected"),
    [
        (2e-5, 1e-5, 2e-5, ""),
        (2e-5, 1.5e-5, 1e-5, "the call takes 0.015 ms, the pixels 0.005"),
        (2e-5, 2.1e-5, 1e-5, "the call takes 0.021 ms, the pixels 0"),
        (2e-5, 5e-6, 1e-5, "the call takes 0.005 ms, the pixels 0.015: more than all of the peer"),
    ],
)
def test_a_row_of_a_faster_peer_says_why(ours, call, peer, expected):
    assert why_slower({"seconds": ours, "call_seconds": call}, {"seconds": peer}) == expected


def test_the_cost_of_a_call_is_measured_beside_peers(finished):
    for row in read_results(finished)["rows"]:
        assert (row.get("call_seconds", 0) > 0) == bool(row.get("peers"))
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "| conversion, ms | why not faster |" in text
    assert "rows; other software is faster in" in text
