"""``python -m bench toolbox`` from end to end on tiny grids, the fields that it is given, and what it does if a tool fails."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import toolbox, tools
from bench.__main__ import app
from bench.fields import load_fields, photograph_residuals
from bench.measure import GIB
from bench.rows import Limits

TINY = tools.Sizes(
    large=9, batch=2, sites=4, samples=30, eigenpairs=5, block=3, raster=17, sparse_raster=18, posterior_samples=3
)


def bench(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def saved(tmp_path):
    """Saves random factors, some of the arrays replaced or, with None, left out."""

    def save(**replaced):
        random = np.random.default_rng(0)
        log_diag, off_diag = (0.1 * random.standard_normal(shape) for shape in ((2, 6, 7), (2, 4, 6, 7)))
        arrays = {"log_diag": log_diag, "off_diag": off_diag, "stencil_size": np.array(3)} | replaced
        np.savez(tmp_path / "factors.npz", **{name: array for name, array in arrays.items() if array is not None})
        return tmp_path / "factors.npz"

    return save


def test_every_tool_is_measured(saved, tmp_path):
    fields = load_fields(saved())
    output = io.StringIO()
    folder = tmp_path / "new"
    folder.mkdir()
    results = toolbox.run_toolbox(fields, TINY, Limits(0.0, 4 * GIB, 600), "cpu", folder, Console(file=output, width=240))
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    text = (folder / "results.md").read_text(encoding="utf-8")
    rows = {row["tool"]: row for row in results["tools"]}
    assert rows.keys() == tools.tools(TINY, fields).keys()
    for row in rows.values():
        assert row["status"] == "measured", row
        assert row["first_seconds"] > 0
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        assert row["title"] in output.getvalue()
    for name in ("posterior", "condition_half", "condition_scattered", "condition_block"):
        assert rows[name]["aim"] == "under 100 iterations to 1e-6"
        assert 0 < rows[name]["figures"]["iterations"] <= 42  # in exact arithmetic n of them solve any system
        assert rows[name]["figures"]["relative residual"] <= 1e-6
    assert rows["leading_eigenpairs"]["figures"]["largest residual norm / eigenvalue"] <= 1e-6
    by_hand = [row for row in rows.values() if "hand" in row]
    assert len(by_hand) == 8
    for row in by_hand:
        assert row["hand_times_as_long"] > 0
        assert row["hand"] in text
    assert rows["divergence"]["figures"]["nats per pixel"] > 0
    assert results["machine"]["processor"] in text
    assert "2 factors of factors.npz with a sample of each" in text
    assert "| marginal variance, exact | f = 3, 9 × 9 |" in text


def test_failure_of_one_leaves_the_others(saved, tmp_path, monkeypatch):
    fields = load_fields(saved())
    sizes = replace(TINY, eigenpairs=42)  # as many as there are sites
    some = {name: tools.tools(sizes, fields)[name] for name in ("leading_eigenpairs", "covariance_columns")}
    monkeypatch.setattr(toolbox, "tools", lambda sizes, fields: some)
    results = toolbox.run_toolbox(fields, sizes, Limits(0.0, 4 * GIB, 600), "cpu", tmp_path, Console(file=io.StringIO()))
    failed, measured = results["tools"]
    assert failed["reason"].startswith("ValueError: k is 42, expected at least 1 and less than")
    assert measured["status"] == "measured"
    assert failed["reason"] in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_ctrl_c_keeps_what_was_measured(saved, tmp_path, monkeypatch):
    outcomes = iter([{"status": "failed", "reason": "none"}])

    def interrupted(*arguments):
        try:
            return next(outcomes)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(toolbox, "_measured", interrupted)
    outcome = bench("toolbox", "--factors", saved(), "--out", tmp_path / "new")
    assert outcome.exit_code == 130
    results = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert (results["interrupted"], len(results["tools"])) == (True, 1)
    assert "Interrupted" in (tmp_path / "new" / "results.md").read_text(encoding="utf-8")


def test_a_second_start_measures_what_the_first_left(saved, tmp_path, monkeypatch):
    measured = []

    def measure(name, *arguments):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"status": "failed", "reason": f"{name} as told"}

    monkeypatch.setattr(toolbox, "_measured", measure)
    names = list(tools.tools(tools.Sizes(), load_fields(saved())))
    command = ["toolbox", "--factors", saved(), "--out", tmp_path / "new"]
    assert bench(*command).exit_code == 130
    assert measured == names[:3]
    outcome = bench(*command)
    assert outcome.exit_code == 0, outcome.output
    assert measured == [*names[:3], *names[2:]]  # the third was under way
    results = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert [row["tool"] for row in results["tools"]] == names
    assert not results["interrupted"]
    other = bench("toolbox", "--out", tmp_path / "new")  # other factors
    assert other.exit_code == 2
    assert "holds steps of commit" in " ".join(other.output.replace("│", " ").split())


def test_no_tool_is_begun_when_the_time_is_over(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(toolbox, "_measured", lambda *arguments: pytest.fail("begun"))
    limits, console = Limits(0.0, GIB, 1), Console(file=io.StringIO())
    results = toolbox.run_toolbox(load_fields(saved()), TINY, limits, "cpu", tmp_path, console, seconds=0)
    assert (results["interrupted"], results["tools"]) == (True, [])


def test_residuals_of_a_file_are_observed(saved):
    residual = np.random.default_rng(1).standard_normal((2, 6, 7))
    fields = load_fields(saved(residual=residual))
    np.testing.assert_array_equal(fields.residuals, residual.astype(np.float32))
    assert fields.source == "2 factors of factors.npz with their residuals"


def test_residuals_of_photographs_have_a_factor():
    fields = photograph_residuals()
    assert fields.log_diag.shape == (1, 64, 64)
    assert fields.off_diag.shape == (1, 24, 64, 64)
    assert fields.residuals.shape == (16, 64, 64)
    for array in (fields.log_diag, fields.off_diag, fields.residuals):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"log_diag": None, "stencil_size": None},
            "has no log_diag, stencil_size; expected log_diag, off_diag and stencil_size",
        ),
        ({"stencil_size": np.array(4)}, "has stencil_size 4, expected an odd number of at least 3"),
        ({"stencil_size": np.array([3])}, r"has stencil_size \[3\], expected an odd number"),
        ({"stencil_size": np.array(5)}, r"off_diag \(2, 4, 6, 7\), expected .* \(B, 12, H, W\) for stencil_size 5"),
        ({"log_diag": np.zeros((6, 7))}, r"has log_diag \(6, 7\) and .*, expected \(B, H, W\)"),
        ({"residual": np.zeros((1, 6, 7))}, r"has residual \(1, 6, 7\), expected \(2, 6, 7\) as log_diag has"),
    ],
)
def test_bad_files_are_refused(saved, replaced, message):
    with pytest.raises(ValueError, match=message):
        load_fields(saved(**replaced))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factors", "no_such_file.npz"], "no_such_file.npz cannot be read as an .npz file"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_end_at_once(tmp_path, arguments, message):
    outcome = bench("toolbox", *arguments, "--out", tmp_path / "new")
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_by_hand_is_the_same():
    raster = tools.raster.Raster(17)  # more offsets than kernels are compiled for
    for name in ("mean", "counts", "constrained"):
        actual, by_hand = getattr(tools.raster, name)(raster)(), getattr(tools.raster, f"{name}_by_hand")(raster)()
        actual = actual[0] if isinstance(actual, tuple) else actual
        np.testing.assert_allclose(actual.flatten().numpy(), by_hand, rtol=1e-8, atol=1e-8)
    pairs = zip(tools.raster.variance(raster)(), tools.raster.variance_by_hand(raster)(), strict=True)
    for actual, by_hand in pairs:
        np.testing.assert_allclose(actual.flatten(), by_hand, rtol=1e-8, atol=1e-8)
    value, gradient = tools.raster.evidence_gradient(raster)()
    by_hand, differences = tools.raster.evidence_gradient_by_hand(raster)()
    np.testing.assert_allclose(value.detach(), by_hand, rtol=1e-8)
    np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-3)  # of rounding and of the step, 1e-6 each
    draws = [tools.raster.samples(raster, 400)().flatten(1).numpy(), tools.raster.samples_by_hand(raster, 400)().T]
    scale = raster.posterior().stddev.flatten().numpy()
    assert np.abs((draws[0].mean(0) - draws[1].mean(0)) / scale).max() < 6 * (2 / 400) ** 0.5
    assert tools.raster.blocks(raster, 5)().shape == (5,)
    covariance = raster.posterior().covariance_columns([(i, j) for i in range(5) for j in range(5)])[:, :5, :5]
    np.testing.assert_allclose(tools.raster.blocks_by_hand(raster, 5)()[0], covariance.sum() / 25**2, rtol=1e-8)
