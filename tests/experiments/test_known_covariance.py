"""The synthetic experiments: their signals, their calibration, their scores, and a run from beginning to end."""

import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import banded_gmrf as bg
from experiments.__main__ import app
from experiments.checkpoints import CHECKPOINT, load_checkpoint
from experiments.known_covariance import scores as scoring
from experiments.known_covariance.calibration import calibrate, evenly_spread_latents, expected_rows, paper_rows
from experiments.known_covariance.presets import PRESETS, Config, config_for, layout
from experiments.known_covariance.report import summarise
from experiments.known_covariance.run import examples
from experiments.known_covariance.scores import Examples, factor_of_truth, score
from experiments.known_covariance.signals import Ellipses, Splines
from experiments.results import begin_run

FAMILIES = [Splines(), Ellipses()]
TINY = ["--train", "256", "--test", "12", "--epochs", "2", "--seeds", "1"]


@pytest.mark.parametrize("signals", FAMILIES)
def test_covariance_is_the_one_that_signals_are_drawn_with(signals):
    """Many signals of one mean: their covariance is Σ, within five standard errors of each entry."""
    latents, _, _ = signals.draw(1, torch.Generator().manual_seed(0))
    count = 2000
    whole = type(signals)
    fixed = type("Fixed", (whole,), {"latents": lambda self, uniform: latents.expand(len(uniform), -1)})()
    _, means, x = fixed.draw(count, torch.Generator().manual_seed(1))
    noise = (x - means).double().flatten(1)
    covariance = signals.covariance(latents)[0]
    variance = covariance.diagonal()
    standard_error = ((covariance.square() + variance[:, None] * variance) / count).sqrt()
    assert ((noise.mT @ noise / count - covariance).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("signals", FAMILIES)
def test_covariances_are_proper(signals):
    latents, means, x = signals.draw(5, torch.Generator().manual_seed(0))
    assert means.shape == x.shape == (5, *signals.grid)
    assert means.dtype == x.dtype == torch.float32
    covariance = signals.covariance(latents)
    torch.testing.assert_close(covariance, covariance.mT, rtol=1e-14, atol=0)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1).sqrt(), signals.stddev(signals.mean(latents)).flatten(1))


def test_ellipse_has_its_axes_and_its_lines_run_along_the_major_one():
    latents = torch.tensor([[6.0, 3.0, 0.0, 0.5, 0.5], [6.0, 3.0, math.pi / 2, 0.5, 0.5]]).double()
    signals = Ellipses()
    lying, standing = signals.mean(latents)
    torch.testing.assert_close(lying, standing.mT)
    assert lying[8, 8] > 0.95
    # The edge, where the mean is ½, lies 6 pixels to the right of the centre and 3 below it.
    torch.testing.assert_close(lying[8, 14], torch.tensor(0.5).double())
    torch.testing.assert_close(lying[11, 8], torch.tensor(0.5).double())
    correlation = signals.correlation(latents).reshape(2, 16, 16, 16, 16)
    torch.testing.assert_close(correlation[0, 8, 8], correlation[1, 8, 8].mT)
    assert correlation[0, 8, 8, 8, 10] > 10 * correlation[0, 8, 8, 10, 8]


@pytest.mark.parametrize(("name", "signals", "count"), [("splines", Splines(), 1024), ("ellipses", Ellipses(), 256)])
def test_default_scalars_give_the_rows_of_the_paper(name, signals, count):
    rows = expected_rows(signals, evenly_spread_latents(signals, count))
    # The scalars are rounded to four digits, and fewer means are averaged over than for the calibration.
    assert rows == pytest.approx(paper_rows(name), rel=0.005)


def test_calibration_finds_the_scalars_from_elsewhere():
    start = Splines(amplitude=0.7, slope=0.3, length=4.0, smoothness=0.6)
    found = calibrate("splines", start, count=1024)
    expected = Splines()
    for key in ("amplitude", "slope", "length", "smoothness"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-3)


def test_expected_rows_agree_with_scores():
    """The best diagonal, scored signal by signal, gives what the calibration calculates."""
    signals = Splines()
    test = Examples(*signals.draw(400, torch.Generator().manual_seed(0)))
    diagonal, grid = layout("diagonal", signals.grid)
    of_signals = score(signals, test, lambda _, covariance: dense_floor(covariance, diagonal, grid))
    expected = expected_rows(signals, test.latents)
    assert of_signals.kl.mean().item() == pytest.approx(expected["diagonal kl"], rel=1e-9)
    assert of_signals.norm.mean().item() == pytest.approx(expected["diagonal norm"], rel=1e-9)
    nll = of_signals.nll
    assert abs(nll.mean().item() - expected["diagonal nll"]) < 4 * nll.std().item() / 20


def dense_floor(covariance, stencil, grid):
    return bg.StencilCholesky.from_covariance(covariance, stencil, grid).to_dense()


@pytest.mark.parametrize("signals", FAMILIES)
def test_scores_are_those_of_dense_formulas(signals):
    test = Examples(*signals.draw(3, torch.Generator().manual_seed(0)))
    n = math.prod(signals.grid)
    L = torch.diag_embed(1 + torch.rand(3, n).double()) + 0.1 * torch.randn(3, n, n).double().tril(-1) / n**0.5
    got = score(signals, test, lambda means, covariance: L[: len(means)], batch=3)
    truth, predicted = signals.covariance(test.latents), torch.linalg.inv(L @ L.mT)
    residual = (test.x - test.means).double().flatten(1)
    ratio = torch.linalg.solve(truth, predicted)
    kl = 0.5 * (ratio.diagonal(dim1=-2, dim2=-1).sum(-1) - n - torch.linalg.slogdet(ratio).logabsdet)
    white = (residual[:, None] @ L)[:, 0]
    nll = 0.5 * (white.square().sum(1) + n * math.log(2 * math.pi)) - L.diagonal(dim1=-2, dim2=-1).log().sum(1)
    torch.testing.assert_close(got.kl, kl)
    torch.testing.assert_close(got.nll, nll)
    torch.testing.assert_close(got.norm, (predicted - truth).square().sum((1, 2)).sqrt())
    torch.testing.assert_close(got.whitened.flatten(1), white)


@pytest.mark.parametrize("signals", FAMILIES)
def test_truth_has_no_divergence_and_no_floor_is_better(signals):
    test = Examples(*signals.draw(4, torch.Generator().manual_seed(0)))
    truth = score(signals, test, lambda means, covariance: factor_of_truth(covariance))
    torch.testing.assert_close(truth.kl, torch.zeros(4).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(truth.norm, torch.zeros(4).double(), rtol=0, atol=1e-8)
    stencil, grid = layout("diagonal" if len(signals.grid) == 1 else 3, signals.grid)
    covariance = signals.covariance(test.latents)
    floor = dense_floor(covariance, stencil, grid)

    def expected_nll(L):
        return 0.5 * (L.mT @ covariance @ L).diagonal(dim1=-2, dim2=-1).sum(-1) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    assert (expected_nll(factor_of_truth(covariance)) < expected_nll(floor)).all()
    for scale in (0.9, 1.1):
        disturbed = floor.clone()
        disturbed[:, 3, 3] *= scale
        assert (expected_nll(floor) < expected_nll(disturbed)).all()


def test_dense_stencil_holds_every_pair_of_sites():
    stencil, grid = layout("dense", (3, 4))
    assert grid == (12,)
    assert stencil.mask(grid).sum() == 12 * 11 / 2


def test_gap_closed_is_measured_from_the_diagonal_network_to_the_floor():
    def row(nll):
        return [scoring.Scores(torch.full((4,), nll), torch.zeros(4), torch.zeros(4), torch.randn(4, 5))]

    config = config_for("ellipses", "quick")
    names = [model.name for model in config.models]
    rows = summarise(
        config,
        {"truth": row(-9.0), "floor, f = 5": row(-8.0), "floor, f = 3": row(-4.0)}
        | dict(zip(names, [row(0.0), row(-6.0), row(-7.6), row(-3.0)], strict=True)),
    )
    closed = [rows[name].get("gap_closed") for name in names]
    assert closed == [None, pytest.approx(0.75), pytest.approx(0.95), pytest.approx(0.75)]


@pytest.mark.parametrize("experiment", PRESETS)
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_presets_survive_json(experiment, preset):
    config = config_for(experiment, preset)
    assert json.loads(json.dumps(config.as_dict()))["models"][0]["name"] == "diagonal"
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_train_and_test_signals_differ_and_come_from_the_seed():
    config = config_for("ellipses", "quick", train=256, test=256)
    train, test = (examples(config, purpose, torch.device("cpu")) for purpose in ("train", "test"))
    assert not torch.equal(train.x, test.x)
    assert torch.equal(examples(config, "train", torch.device("cpu")).x, train.x)


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of the ellipses on a tiny configuration."""
    folder = tmp_path_factory.mktemp("ellipses") / "run"
    outcome = invoke("ellipses", "--out", folder, *TINY)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1] == f"Results: {folder}"
    return folder


def test_run_leaves_tables_figures_and_networks(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "covariances.png",
        "coverage.png",
        "reconstructions.png",
        "results.json",
        "results.md",
        "training.png",
    ]
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    models = [model["name"] for model in results["config"]["models"]]
    assert set(results["rows"]) == {"truth", "floor, diagonal", "floor, f = 5", "floor, f = 3", *models}
    table = (finished / "results.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in [*results["rows"], "paper: structured"])
    networks, about = load_checkpoint(finished / "checkpoint.safetensors")
    assert set(networks) == {f"{name}, seed 0" for name in models}
    assert about["config"] == results["config"]


def test_report_writes_table_and_figures_again(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for name in ("results.md", "covariances.png"):
        (folder / name).unlink()
    assert invoke("report", folder).exit_code == 0
    for name in ("results.md", "covariances.png", "reconstructions.png"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    outcome = invoke("report", tmp_path)
    assert outcome.exit_code == 2
    assert "holds no finished run" in " ".join(outcome.output.replace("│", " ").split())


def test_report_needs_the_networks_and_says_how_to_get_them(finished, tmp_path):
    """As in the folders of results that the repository has: numbers and figures, no networks."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / CHECKPOINT).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = invoke("report", folder)
    assert outcome.exit_code == 2
    message = " ".join(outcome.output.replace("│", " ").split())
    assert f"has no {CHECKPOINT}, the networks of its run: train them again, into a new folder" in message
    assert "as this command did: python -m experiments" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / CHECKPOINT).write_bytes(b"not whole")
    outcome = invoke("report", folder)
    assert outcome.exit_code == 2
    assert "cannot be read: Error while deserializing" in " ".join(outcome.output.replace("│", " ").split())


def test_splines_run(tmp_path):
    """With the reference backend: compiling code for 49 offsets takes longer than this run."""
    with bg.use_backend("reference"):
        outcome = invoke("splines", "--out", tmp_path, *TINY)
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert rows["truth"]["nll"]["mean"] < rows["diagonal"]["nll"]["mean"]


def test_killed_run_resumes_to_the_same_numbers(finished, tmp_path):
    """SIGKILL to a real process as soon as one network is trained."""
    command = [sys.executable, "-m", "experiments", "ellipses", "--out", str(tmp_path), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "training" / "0-0.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "results.json").exists()
    outcome = invoke("ellipses", "--out", tmp_path, "--resume", *TINY)
    assert outcome.exit_code == 0, outcome.output
    expected, resumed = (
        json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"] for folder in (finished, tmp_path)
    )
    assert resumed == expected


def test_other_configuration_is_not_resumed(tmp_path, finished):
    begin_run(config_for("ellipses", "quick", train=256), tmp_path, torch.device("cpu"))
    before = (tmp_path / "config.json").read_bytes()
    outcome = invoke("ellipses", "--out", tmp_path, "--resume", "--train", "300")
    assert outcome.exit_code == 2
    assert "train is 256 there, 300 here" in " ".join(outcome.output.replace("│", " ").split())
    outcome = invoke("ellipses", "--out", tmp_path, "--resume", "--train", "256", "--epochs", "7")
    assert "models[0].epochs is 10 there, 7 here" in " ".join(outcome.output.replace("│", " ").split())
    outcome = invoke("splines", "--out", tmp_path, "--resume", "--train", "256")
    assert outcome.exit_code == 2
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "quick"),
        (["--train", "100"], "train is 100, expected at least 256"),
        (["--epochs", "0"], "--epochs"),
        (["--resume"], "--resume needs the folder"),
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "meta is not a CPU or CUDA device"),
    ],
)
def test_bad_options(arguments, message):
    outcome = invoke("splines", *arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())


def test_folders_that_cannot_be_used(finished, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for arguments, message in [
        (["--out", finished], "already exists"),
        (["--out", finished, "--resume", *TINY], "is finished"),
        (["--out", tmp_path], "already exists"),
        (["--out", tmp_path, "--resume"], "no run of this experiment was begun there"),
    ]:
        outcome = invoke("ellipses", *arguments)
        assert outcome.exit_code == 2
        assert message in " ".join(outcome.output.replace("│", " ").split())
    (tmp_path / "config.json").write_text("[]")
    outcome = invoke("ellipses", "--out", tmp_path, "--resume")
    assert "is not the configuration of a run" in " ".join(outcome.output.replace("│", " ").split())
    outcome = invoke("ellipses", "--out", tmp_path / "note.txt" / "x")
    assert "cannot be made" in " ".join(outcome.output.replace("│", " ").split())
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "note.txt"]
