"""The demo from end to end on a tiny configuration, and what happens when it is interrupted."""

import base64
import json
import math
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

import banded_gmrf as bg
from experiments import demo, photographs
from experiments.__main__ import app
from experiments.checkpoints import load_checkpoint, save_checkpoint
from experiments.page import PAGE, write_page
from supn_models import ConvAutoencoder, CovarianceNetwork

TINY = ["--patches", "60", "--autoencoder-steps", "3", "--covariance-steps", "3"]


def run_demo(folder, *options):
    return CliRunner().invoke(app, ["demo", "--out", str(folder), *TINY, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    outcome = run_demo(folder, "--seed", "3")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1] == f"Results: {folder / PAGE}"
    return folder


def test_results_are_complete(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert list(results["scores"]) == ["isotropic", "diagonal", "structured"]
    for score in results["scores"].values():
        assert score["standard_error"] > 0
        assert -1 <= score["whitened_autocorrelation"] <= 1
        assert score["whitened_variance"] > 0
    assert results["config"]["seed"] == 3
    table = (finished / "results.md").read_text()
    assert all(f"| {name} |" in table for name in results["scores"])
    assert all(name in table for name in photographs.TRAIN + photographs.TEST)
    for figure in ("samples.png", "correlations.png", "training.png"):
        assert (finished / figure).read_bytes().startswith(b"\x89PNG")


class PageReader(HTMLParser):
    """The cells and images of a page, which fails where an end tag does not match."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.images, self.styles = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
            self.styles.append(dict(attrs)["style"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)


def test_page_holds_the_table_and_the_figures(finished):
    reader = PageReader()
    reader.feed((finished / PAGE).read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    header, _, *rows = [
        line for line in (finished / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    assert reader.cells == [cell.strip() for line in (header, *rows) for cell in line.strip("|").split("|")]
    prefix = "data:image/png;base64,"
    assert all(image.startswith(prefix) for image in reader.images)
    shown = [base64.b64decode(image.removeprefix(prefix)) for image in reader.images]
    assert shown == [(finished / name).read_bytes() for name in demo.CAPTIONS]
    # Letters stay readable in a narrow window.
    widths = [matplotlib.image.imread(finished / name).shape[1] for name in demo.CAPTIONS]
    assert reader.styles == [f"min-width: {round(0.38 * width)}px" for width in widths]


def test_page_shows_markup_as_text_and_needs_its_figures(finished, tmp_path):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8")) | {"command": "run <b> & 'c'"}
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write_page(tmp_path, results, "# Title\n", {"none.png": ""})
    assert list(tmp_path.iterdir()) == []
    page = write_page(tmp_path, results, "# A <i> title\n\n<script>x</script>\n", {}).read_text(encoding="utf-8")
    assert "<title>A &lt;i&gt; title</title>" in page
    assert "run &lt;b&gt; &amp; " in page
    assert "<script>" not in page


def test_checkpoint_gives_the_reported_numbers(finished):
    networks, about = load_checkpoint(finished / demo.CHECKPOINT)
    assert about["interrupted"] is False
    config = demo.DemoConfig(**about["config"])
    _, test, names = demo.load_patches(config)
    with torch.no_grad():
        means = networks["autoencoder"](test)
        residuals = (test - means)[:, 0]
        score = demo.evaluate(demo.at_best_level(networks["structured"](means), residuals), residuals, names)
    reported = json.loads((finished / "results.json").read_text(encoding="utf-8"))["scores"]["structured"]
    assert score["nats_per_pixel"] == pytest.approx(reported["nats_per_pixel"], rel=1e-4)
    assert score["within_90"] == pytest.approx(reported["within_90"], abs=1e-3)


def test_level_is_the_one_under_which_a_residual_is_most_likely():
    torch.manual_seed(0)
    network = CovarianceNetwork(1, bg.Stencil.square(3), channels=4).double()
    torch.nn.init.normal_(network.head.conv.weight, std=0.1)
    factor = network(torch.rand(5, 1, 6, 7).double())
    scale = torch.tensor([1e-5, 0.03, 1.0, 40.0, 1e5], dtype=torch.float64)[:, None, None]
    residuals = (scale * bg.GMRF(torch.zeros(6, 7).double(), factor).sample()).detach()
    found = demo.at_best_level(factor, residuals)
    levels = demo.LEVELS.double()[:, None, None, None]
    each = bg.StencilCholesky(factor.log_diag - levels.log(), factor.off_diag / levels[..., None], factor.stencil)
    nats = -bg.GMRF(torch.zeros(6, 7).double(), each).log_prob(residuals)  # (levels, residuals)
    ratio = (factor.log_diag - found.log_diag)[:, 0, 0].exp()
    torch.testing.assert_close(ratio, demo.LEVELS.double()[nats.argmin(0)], rtol=1e-6, atol=0)
    torch.testing.assert_close(demo.nats_per_pixel(found, residuals) * 42, nats.amin(0) + math.log(81), rtol=1e-6, atol=0)
    # Derivatives are those at the level that was chosen.
    found_gradient, expected = (
        torch.autograd.grad(loss.sum(), network.head.conv.weight, retain_graph=True)[0]
        for loss in (demo.nats_per_pixel(found, residuals) * 42, nats.amin(0))
    )
    torch.testing.assert_close(found_gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_samples_of_a_model_are_white_and_within_90_percent():
    means = torch.rand(30, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = CovarianceNetwork(1, bg.Stencil.square(3), channels=4)
    torch.nn.init.normal_(network.head.conv.weight, std=0.1)
    names = ["camera"] * 20 + ["chelsea"] * 10
    with torch.no_grad():
        rough = torch.tensor([3.0] * 20 + [0.1] * 10)[:, None, None]
        residuals = rough * bg.GMRF(torch.zeros(32, 32), network(means)).sample()
        score = demo.evaluate(demo.at_best_level(network(means), residuals), residuals, names)
    # 30720 and 10240 values: standard errors of 0.17 and 0.3 percent. A level is at most 6 % from the best one.
    assert score["within_90_by_photograph"] == pytest.approx({"camera": 0.9, "chelsea": 0.9}, abs=0.02)
    assert abs(score["whitened_autocorrelation"]) < 0.02
    assert score["whitened_variance"] == pytest.approx(1.0, abs=0.12)


def test_same_seed_same_numbers(finished, tmp_path):
    scores = []
    for folder, seed in ((finished, 3), (tmp_path / "same", 3), (tmp_path / "other", 4)):
        if folder != finished:
            assert run_demo(folder, "--seed", str(seed)).exit_code == 0
        scores.append(json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"])
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


def test_used_results_folder_is_refused(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    for out in (tmp_path, note):
        outcome = run_demo(out)
        assert outcome.exit_code == 2
        assert "--out" in outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert note.read_text() == "mine"


@pytest.mark.parametrize(("calls", "trained"), [(1, {"autoencoder"}), (5, {"autoencoder", "diagonal"})])
def test_interrupt_leaves_a_checkpoint(tmp_path, monkeypatch, calls, trained):
    step, count = torch.optim.Adam.step, 0

    def interrupted_step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted_step)
    outcome = run_demo(tmp_path)
    assert outcome.exit_code == 130
    assert str(tmp_path / demo.CHECKPOINT) in outcome.stderr.replace("\n", "")
    networks, about = load_checkpoint(tmp_path / demo.CHECKPOINT)
    assert set(networks) == trained
    assert about["interrupted"] is True
    assert [path.name for path in tmp_path.iterdir()] == [demo.CHECKPOINT]


def test_ctrl_c_ends_without_a_traceback(tmp_path):
    """A real SIGINT to a real process, once training has begun."""
    command = [sys.executable, "-m", "experiments", "demo", "--out", str(tmp_path), "--patches", "60"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}

    def heed_sigint():
        # Whatever runs in the background of a shell without job control ignores it, and so would its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_sigint
    )
    with process:
        for line in process.stdout:
            if line.startswith("test on"):
                break
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors


def test_train_and_test_photographs_differ():
    assert not set(photographs.TRAIN) & set(photographs.TEST)


def test_photographs_are_gray_values_in_the_unit_interval():
    photograph = photographs.load_photograph("coffee", shrink=3)
    assert photograph.shape == (400 // 3, 600 // 3)
    assert photograph.dtype == torch.float32
    assert 0 <= photograph.min() < photograph.max() <= 1


def test_patches_come_from_the_photograph():
    photograph = torch.arange(35 * 47.0).reshape(35, 47)
    tiles = photographs.tile_patches(photograph, 16)
    assert tiles.shape == (4, 1, 16, 16)
    torch.testing.assert_close(tiles[3, 0], photograph[16:32, 16:32])
    patches = photographs.random_patches(photograph, 16, 40, torch.Generator().manual_seed(0))
    windows = photograph.unfold(0, 16, 1).unfold(1, 16, 1).reshape(-1, 16, 16)
    for patch in patches[:, 0]:
        corner = windows[:, 0, 0] == patch.min()
        assert torch.equal(windows[corner][0].flatten(), patch.flatten().sort().values)


def test_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    networks = {
        "autoencoder": ConvAutoencoder((9, 8), latent_size=3, channels=(4,)),
        "covariance": CovarianceNetwork(1, bg.Stencil.square(3), channels=4, initial_stddev=0.2),
    }
    torch.nn.init.normal_(networks["covariance"].head.conv.weight)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, networks, {"seed": 7})
    loaded, about = load_checkpoint(path)
    assert about == {"seed": 7}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    images = torch.rand(2, 1, 9, 8)
    assert torch.equal(loaded["autoencoder"](images), networks["autoencoder"](images))
    assert torch.equal(loaded["covariance"](images).off_diag, networks["covariance"](images).off_diag)


def test_foreign_checkpoint_is_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")
