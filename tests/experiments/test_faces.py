"""The experiment with real images on tiny ones: end to end, interrupted, in two processes, streamed, compiled."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import banded_gmrf as bg
from bench.fields import load_fields
from experiments.__main__ import app
from experiments.checkpoints import load_checkpoint
from experiments.faces import figures
from experiments.faces.bases import BASES
from experiments.faces.images import Mirrored, images_for_training
from experiments.faces.networks import base_loss, build_base, build_covariance, train_covariance
from experiments.faces.presets import PRESETS, Config, Covariance, config_for
from experiments.faces.run import CHECKPOINT
from experiments.stopping import Patience
from supn_models import StructuredLikelihood
from tests.experiments.celeba import make_celeba
from tests.experiments.tiny_faces import PRESET, image_data, train_and_score
from tests.marks import needs_inductor


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS["faces"], "quick", PRESET)


def arguments(data, folder, *options):
    return ["faces", "--data", str(data), "--test", "2", "--out", str(folder), *options]


def run_faces(data, folder, *options):
    return CliRunner().invoke(app, arguments(data, folder, *options))


def start_process(*command, threads=1):
    """What a new process of Python with so many threads has to say; ``command`` is behind ``python -m``."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def start_two_processes(*command):
    return start_process("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *command)


def read_results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["faces"], "quick", PRESET)
        outcome = run_faces(npz, folder, "--note", "went through JPEG")
    assert outcome.exit_code == 0, outcome.output
    return folder


def test_a_dry_run_on_a_whole_layout_of_celeba(tmp_path, monkeypatch):
    """The networks of --preset paper would take a minute: a dry run of it is what it was for this preset."""
    monkeypatch.setitem(PRESETS["faces"], "paper", replace(PRESET, preset="paper", samples=500, base_epochs=25))
    make_celeba(tmp_path, "0" * 30 + "1" * 6 + "2" * 6, "Img/img_align_celeba", "Eval/list_eval_partition.txt")
    folder = tmp_path / "new"
    options = ["--preset", "paper", "--dry-run", "--models", "AE"]
    outcome = CliRunner().invoke(app, ["faces", *options, "--data", str(tmp_path), "--out", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    assert "GiB in memory" in outcome.output
    results = read_results(folder)
    config = results["config"]
    assert config["data"] == "CelebA"
    assert [config[key] for key in ("train", "test", "base_epochs", "covariance_epochs", "samples")] == [32, 4, 1, 1, 2]
    assert config["channels"] == list(PRESET.channels)
    assert list(results["rows"]) == ["AE, diagonal from z", "AE, f = 3 from z"]
    assert results["peak_memory"]["in memory"] > 2**26  # torch alone


def test_results_are_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "results.json",
        "results.md",
        "training.png",
        "whitened.png",
        BASES,
        *(f"figure{number}.png" for number in (1, 7, 8, 9, 10)),
        CHECKPOINT,
    }
    results = read_results(finished)
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
        cost = results["cost"][name]
        assert (cost["nats"]["images"], cost["nats"]["samples"]) == (2, 1)
        assert cost.keys() == ({"nats"} if name.startswith("AE") else {"nats", "bound"})
        assert all(of["seconds"] > 0 for of in cost.values())
    assert (results["cost"]["VAE"]["bound"]["images"], results["cost"]["VAE"]["bound"]["samples"]) == (2, 3)
    assert results["left_out"] == []
    assert set(results["seconds"]) == {"training", "scores"}
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


def test_autoencoders_of_other_errors(npz, tmp_path):
    outcome = run_faces(npz, tmp_path, "--models", "AE,AE-L1,AE-gradient")
    assert outcome.exit_code == 0, outcome.output
    rows = read_results(tmp_path)["rows"]
    bases = ("AE", "AE-L1", "AE-gradient")
    assert list(rows) == [f"{base}, {kind} from z" for base in bases for kind in ("diagonal", "f = 3")]
    assert len({row["nats"]["mean"] for row in rows.values()}) == 6
    for row in rows.values():
        assert row["whitened_kurtosis"] > -2
        quantiles = list(row["whitened_quantiles"].values())
        assert quantiles == sorted(quantiles)


def test_errors_of_known_residuals():
    class Zero(torch.nn.Module):
        def forward(self, images):
            return torch.zeros_like(images)

    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert base_loss("AE", Zero(), ramp).item() == pytest.approx(17.5)
    assert base_loss("AE-L1", Zero(), ramp).item() == pytest.approx(3.5)
    # The mean is 3.5 at each resolution; neighbours differ by 1, 2 and 4 along one axis.
    assert base_loss("AE-gradient", Zero(), ramp).item() == pytest.approx(3.5 + (1 + 2 + 4) / 3)


def test_checkpoint_holds_all_networks(finished):
    networks, about = load_checkpoint(finished / CHECKPOINT)
    assert set(networks) == {"AE", "VAE", "β-VAE", *(covariance.name for covariance in PRESET.covariances)}
    assert about["config"]["note"] == "went through JPEG"
    code = networks["VAE"].encode(torch.zeros(2, 1, 8, 8))
    assert networks["VAE, f = 3 from z"](code).off_diag.shape == (2, 4, 8, 8)


def test_base_models_of_another_run(npz, finished, tmp_path):
    """Weights in half precision differ by 2⁻¹² of themselves at most; the covariance networks are new ones of the same seed."""
    given = finished / BASES
    options = ("--note", "went through JPEG", "--models", "AE,VAE")
    outcome = run_faces(npz, tmp_path / "new", *options, "--bases", str(given))
    assert outcome.exit_code == 0, outcome.output
    assert not (tmp_path / "new" / BASES).exists()
    there, here = load_checkpoint(finished / CHECKPOINT)[0], load_checkpoint(tmp_path / "new" / CHECKPOINT)[0]
    for name in ("AE", "VAE"):
        for key, value in there[name].state_dict().items():
            torch.testing.assert_close(here[name].state_dict()[key], value, rtol=2**-11, atol=2**-24)
    rows, results = read_results(finished)["rows"], read_results(tmp_path / "new")
    assert list(results["rows"]) == [name for name in rows if not name.startswith("β-VAE")]
    for name, row in results["rows"].items():
        # Rounding moves codes by some 10⁻³, and with them what four steps teach; another seed moves the nats by 1 in 10.
        assert row["nats"]["mean"] == pytest.approx(rows[name]["nats"]["mean"], rel=1e-2)
    assert results["config"]["given_bases"]
    assert "of an earlier run, which `--bases` names" in (tmp_path / "new" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "have seed 0, the run has 1"),
        (["--train", "12"], "have train 16, the run has 12"),
        (["--held-out", "0.25"], "have held_out 0.0, the run has 0.25"),
        (["--models", "AE-L1"], "has no AE-L1, expected some of AE, VAE, β-VAE"),
    ],
)
def test_base_models_that_do_not_fit_are_named(npz, finished, tmp_path, options, words):
    outcome = run_faces(npz, tmp_path / "new", "--bases", str(finished / BASES), *options)
    assert outcome.exit_code == 2
    assert words in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_a_file_without_base_models_is_refused(npz, finished, tmp_path):
    outcome = run_faces(npz, tmp_path / "new", "--bases", str(finished / CHECKPOINT))
    assert outcome.exit_code == 2
    assert "holds no base models" in " ".join(outcome.output.replace("│", " ").split())


def test_factors_are_what_the_networks_predict(npz, finished, tmp_path):
    path = tmp_path / "factors.npz"
    command = ["factors", str(finished), str(path), "--data", str(npz), "--images", "2"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    fields = load_fields(path)
    assert (fields.stencil_size, fields.off_diag.shape) == (3, (2, 4, 8, 8))
    results = read_results(finished)
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
    assert read_results(tmp_path)["rows"] == read_results(finished)["rows"]


def assert_killed_within_a_training(folder):
    """After 18 steps of trainings of 4 steps each."""
    *done, begun = (len(torch.load(folder / "training" / f"{number}.pt")["losses"]) for number in range(5))
    assert (done, begun) == ([4, 4, 4, 4], 2)
    assert not (folder / "training" / "5.pt").exists()
    assert not (folder / "results.json").exists()
    return json.loads((folder / "training" / "seconds.json").read_text(encoding="utf-8"))["training"]


def test_run_killed_within_a_training_resumes_to_the_same_numbers(npz, finished, tmp_path, monkeypatch):
    command = arguments(npz, tmp_path, "--note", "went through JPEG")
    # As many threads as here: another number adds in another order.
    killed = start_process("tests.experiments.tiny_program", 19, *command, threads=torch.get_num_threads())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seconds = assert_killed_within_a_training(tmp_path)
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    outcome = run_faces(npz, tmp_path, "--note", "went through JPEG", "--resume")
    assert outcome.exit_code == 0, outcome.output
    results = read_results(tmp_path)
    assert results["rows"] == read_results(finished)["rows"]
    # Those before the kill are counted too, rounded to tenths.
    assert results["seconds"]["training"] > seconds - 0.05
    assert not (tmp_path / "training").exists()


def test_two_processes_killed_within_a_training_end_as_one_does(image_folder, finished, tmp_path):
    """The program as torchrun starts it, from files of images to the figures."""
    command = arguments(image_folder, tmp_path, "--note", "went through JPEG")
    killed = start_two_processes("tests.experiments.tiny_program", 19, *command)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert_killed_within_a_training(tmp_path)
    outcome = start_two_processes("tests.experiments.tiny_program", 0, *command, "--resume")
    assert outcome.returncode == 0, outcome.stderr
    # The first process alone speaks, and leaves what one process does.
    for words in ("left out, 1 files", "reading training images", "VAE, bound", "Structured residuals on blocks", "Results:"):
        assert outcome.stdout.count(words) == 1 + (words == "VAE, bound"), words  # that of the β-VAE too
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in finished.iterdir()}
    together, alone = read_results(tmp_path), read_results(finished)
    assert (together["processes"], alone["processes"]) == (2, 1)
    (reason,) = together["left_out"]
    assert reason.startswith("train/broken.png: ")
    assert "each. Left out 1 file that could not be used" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert list(together["rows"]) == list(alone["rows"])
    for name, row in alone["rows"].items():
        for metric in ("nats", "bound"):
            if row[metric] is not None:
                # Adam makes 5 parts in 10⁵ of float32's rounding within four steps, as below; another seed makes 1 in 10.
                assert together["rows"][name][metric]["mean"] == pytest.approx(row[metric]["mean"], rel=1e-3)


def test_two_processes_find_what_one_finds(tmp_path):
    path = tmp_path / "found.pt"
    outcome = start_two_processes("tests.experiments.tiny_faces", path)
    assert outcome.returncode == 0, outcome.stderr
    together = torch.load(path, weights_only=True)
    for name, value in train_and_score(dtype=torch.float64).items():
        # In float64 only rounding differs, near 1e-16 in a sum. Of float32 Adam makes more in a few steps: it divides
        # gradients by their own size, and those that are rounding alone become steps as large as any. The covariance network
        # starts behind the VAE's four steps, so that float32 is compared from the VAE's first loss to its second: one step.
        torch.testing.assert_close(together["torch.float64"][name], value, rtol=1e-9, atol=1e-9)
    losses = train_and_score()["VAE"]
    torch.testing.assert_close(together["torch.float32"]["VAE"][:2], losses[:2], rtol=1e-5, atol=0)


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


@needs_inductor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when inductor is first imported
def test_training_compiled_by_inductor(keep_torch_defaults):
    def losses(compiled):
        config = config_for("faces", "quick", image_data(), channels=(4,), features=2, compiled=compiled)
        (images,) = images_for_training(config, image_data(), torch.device("cpu"), workers=0).base
        base = build_base(config, "VAE").double().eval().requires_grad_(False)
        covariance = config.covariances[3]
        likelihood = StructuredLikelihood(base, build_covariance(config, covariance, 0.5).double())
        return train_covariance(config, covariance, likelihood, (images.double(),), console=Console(quiet=True))

    # In float64, for which rounding does not grow in a few steps of Adam.
    assert losses(compiled=True) == pytest.approx(losses(compiled=False), rel=1e-9)


def test_held_out_images_train_the_covariance_networks_alone():
    config = config_for("faces", "quick", image_data(), held_out=0.25)
    parts = images_for_training(config, image_data(), torch.device("cpu"), workers=0)
    for_base, for_covariance = (
        {tuple(image.flatten().tolist()) for image in images} for (images,) in (parts.base, parts.covariance)
    )
    assert (len(for_base), len(for_covariance)) == (24, 8)
    assert not for_base & for_covariance


def test_validation_images_train_no_network():
    config = config_for("faces", "quick", image_data(), held_out=0.25, validation=0.125)
    parts = images_for_training(config, image_data(), torch.device("cpu"), workers=0)
    seen = {tuple(image.flatten().tolist()) for (images,) in (parts.base, parts.covariance) for image in images}
    assert len(seen) == 2 * (config.base_images + config.covariance_images) == 28
    assert len(parts.validation) == config.validation_images == 2
    for image in (*parts.validation, *parts.validation.flip(-1)):
        assert tuple(image.flatten().tolist()) not in seen


def test_base_models_end_by_validation_images_and_leave_their_curves(npz, tmp_path, monkeypatch):
    patience = Patience(epochs=1, least_epochs=2, drops=0)
    preset = replace(PRESET, base_epochs=40, validation=0.25, patience=patience, covariances=(Covariance("VAE", 1),))
    monkeypatch.setitem(PRESETS["faces"], "quick", preset)
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    outcome = run_faces(npz, tmp_path)
    assert outcome.exit_code == 0, outcome.output
    curve = read_results(tmp_path)["curves"]["VAE"]
    assert 2 <= len(curve["validation"]) == len(curve["training"]) < 40
    assert curve["validation"][curve["best"] - 1] == min(curve["validation"])
    assert (tmp_path / "validation.png").is_file()
    again = run_faces(npz, tmp_path / "again", "--bases", str(tmp_path / BASES))
    assert again.exit_code == 0, again.output
    assert read_results(tmp_path / "again")["curves"]["VAE"] == curve
    assert (
        f"Passes of base models: VAE {len(curve['validation'])}, the best {curve['best']}."
        in (tmp_path / "results.md").read_text()
    )
    config = Config.from_dict(read_results(tmp_path)["config"])
    assert config.patience == patience


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
        (["--validation", "-0.1"], "validation is -0.1"),
        (["--held-out", "0.5", "--validation", "0.5"], "held_out and validation are 0.5 and 0.5"),
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
