"""The experiment with real images on tiny ones: end to end, interrupted, in two processes, streamed, compiled."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import banded_gmrf as bg
from bench.fields import load_fields
from experiments.__main__ import app
from experiments.checkpoints import load_checkpoint
from experiments.faces import figures
from experiments.faces.images import Mirrored, images_for_training
from experiments.faces.presets import PRESETS, config_for
from experiments.faces.run import CHECKPOINT
from tests.experiments.tiny_faces import PRESET, image_data, train_and_score


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS["faces"], "quick", PRESET)


def run_faces(npz, folder, *options):
    return CliRunner().invoke(app, ["faces", "--data", str(npz), "--test", "2", "--out", str(folder), *options])


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["faces"], "quick", PRESET)
        outcome = run_faces(npz, folder, "--note", "went through JPEG")
    assert outcome.exit_code == 0, outcome.output
    return folder


def test_results_are_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "results.json",
        "results.md",
        "training.png",
        *(f"figure{number}.png" for number in (1, 7, 8, 9, 10)),
        CHECKPOINT,
    }
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert list(results["rows"]) == [
        "AE, diagonal from z",
        "AE, f = 3 from z",
        "VAE",
        "VAE, diagonal from z",
        "VAE, f = 3 from z",
        "VAE, f = 3 from μ",
        "VAE, f = 3 from both",
        "β-VAE",
        "β-VAE, f = 3 from z",
    ]
    for name, row in results["rows"].items():
        assert (row["bound"] is None) == name.startswith("AE")
        assert row["whitened_variance"] > 0
    gain = results["rows"]["VAE"]["nats"]["mean"] - results["rows"]["VAE, f = 3 from μ"]["nats"]["mean"]
    assert results["rows"]["VAE, f = 3 from μ"]["nats_gain_per_pixel"] == pytest.approx(gain / 64)
    report = (finished / "results.md").read_text(encoding="utf-8")
    assert "went through JPEG" in report
    assert "What to predict from, VAE, f = 3: -log p(x | z) is least from" in report
    compared = results["sources"]["VAE"]
    assert compared["loss"][compared["best"]]["mean"] == 0
    for source, loss in compared["loss"].items():
        nats = results["rows"][f"VAE, f = 3 from {source}"]["nats"]["mean"]
        best = results["rows"][f"VAE, f = 3 from {compared['best']}"]["nats"]["mean"]
        assert loss["mean"] == pytest.approx(nats - best, abs=1e-4)
    assert compared["parameters"]["both"] > compared["parameters"]["z"]
    assert "| paper, CelebA: VAE with structured residual | -7753 ± 1323 | -8386 ± 1339 |" in report


def test_one_model_with_another_stencil(npz, tmp_path):
    outcome = run_faces(npz, tmp_path, "--models", "VAE", "--stencils", "5")
    assert outcome.exit_code == 0, outcome.output
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["rows"]) == ["VAE", "VAE, diagonal from z", "VAE, f = 5 from z"]
    assert {path.stem for path in tmp_path.glob("figure*.png")} == {f"figure{number}" for number in (1, 7, 9, 10)}


def test_checkpoint_holds_all_networks(finished):
    networks, about = load_checkpoint(finished / CHECKPOINT)
    assert set(networks) == {"AE", "VAE", "β-VAE", *(covariance.name for covariance in PRESET.covariances)}
    assert about["config"]["note"] == "went through JPEG"
    code = networks["VAE"].encode(torch.zeros(2, 1, 8, 8))
    assert networks["VAE, f = 3 from z"](code).off_diag.shape == (2, 4, 8, 8)


def test_factors_are_what_the_networks_predict(npz, finished, tmp_path):
    path = tmp_path / "factors.npz"
    command = ["factors", str(finished), str(path), "--data", str(npz), "--images", "2"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    fields = load_fields(path)
    assert (fields.stencil_size, fields.off_diag.shape) == (3, (2, 4, 8, 8))
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    L = bg.StencilCholesky(torch.from_numpy(fields.log_diag), torch.from_numpy(fields.off_diag), bg.Stencil.square(3))
    nats = -bg.GMRF(torch.zeros(8, 8), L).log_prob(torch.from_numpy(fields.residuals)).mean().item()
    assert nats == pytest.approx(results["rows"]["VAE, f = 3 from z"]["nats"]["mean"], rel=1e-5)
    outcome = CliRunner().invoke(app, [*command, "--base", "other"])
    assert "has no other, expected one of AE, VAE, β-VAE" in " ".join(outcome.output.replace("│", " ").split())


def test_interrupted_run_resumes_to_the_same_numbers(npz, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    with monkeypatch.context() as patch:
        step, count = torch.optim.Adam.step, 0

        def interrupted_step(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == 18:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(torch.optim.Adam, "step", interrupted_step)
        outcome = run_faces(npz, tmp_path, "--note", "went through JPEG")
        assert outcome.exit_code == 130
        assert "--resume" in outcome.stderr
    refused = run_faces(npz, tmp_path, "--note", "went through JPEG", "--resume", "--seed", "1")
    assert refused.exit_code == 2
    assert "seed is 0 there, 1 here" in refused.output
    outcome = run_faces(npz, tmp_path, "--note", "went through JPEG", "--resume")
    assert outcome.exit_code == 0, outcome.output
    rows = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"] for folder in (finished, tmp_path)]
    assert rows[0] == rows[1]


def test_two_processes_find_what_one_finds(tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.experiments.tiny_faces"]
    path = tmp_path / "found.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-m", *command, str(path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    together, alone = torch.load(path, weights_only=True), train_and_score(dtype=torch.float64)
    for name, value in alone.items():
        # In float64 only rounding differs, near 1e-16 in a sum. Of float32 Adam would make more in a few steps: it divides
        # gradients by their own size, and those that are rounding alone become steps as large as any.
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-9)


def test_streaming_gives_the_same_numbers_as_memory():
    streamed, in_memory = train_and_score(workers=1), train_and_score()
    for name, value in in_memory.items():
        assert torch.equal(streamed[name], value), name


def test_bfloat16_and_compilation_train(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    exact, fast = train_and_score(), train_and_score(bfloat16=True, compiled=True)
    # bfloat16 has 8 bits.
    torch.testing.assert_close(fast["covariance"], exact["covariance"], rtol=0.05, atol=0.05)
    assert not torch.equal(fast["covariance"], exact["covariance"])


def test_held_out_images_train_the_covariance_networks_alone():
    config = config_for("faces", "quick", image_data(), held_out=0.25)
    parts = images_for_training(config, image_data(), torch.device("cpu"), workers=0)
    for_base, for_covariance = ({tuple(image.flatten().tolist()) for image in images} for (images,) in parts)
    assert (len(for_base), len(for_covariance)) == (24, 8)
    assert not for_base & for_covariance


def test_mirror_images_follow_the_images():
    images = image_data().train
    mirrored = Mirrored(images)
    assert len(mirrored) == 2 * len(images)
    assert torch.equal(mirrored[len(images) + 3], images[3].flip(-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train", "3"], "3 images to train the base models"),
        (["--held-out", "1"], "held_out is 1.0"),
        (["--held-out", "0.1"], "2 images to train the covariance networks"),
        (["--models", "VAE,GAN"], "models is VAE,GAN, expected some of"),
        (["--stencils", "4"], "stencils is 4, expected odd sizes"),
        (["--stencils", "seven"], "--stencils"),
        (["--resume"], "no run of this experiment was begun there"),
        (["--device", "nowhere"], "--device"),
    ],
)
def test_bad_options_are_named(npz, tmp_path, options, words):
    outcome = run_faces(npz, tmp_path, *options)
    assert outcome.exit_code == 2
    # Words of a message in a frame, which breaks its lines.
    assert words in " ".join(outcome.output.replace("│", "").split())
    assert not any(tmp_path.iterdir())


def test_missing_data_says_what_to_get(tmp_path, monkeypatch):
    monkeypatch.delenv("BANDED_GMRF_DATA", raising=False)
    outcome = CliRunner().invoke(app, ["cifar10", "--out", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "--data builtin" in outcome.output
