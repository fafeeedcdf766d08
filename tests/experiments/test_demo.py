"""The demo from end to end on a tiny configuration, and what happens when it is interrupted."""

import base64
import json
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
        factor = demo.at_level(networks["structured"])(means, demo.levels_of(residuals))
        score = demo.evaluate(factor, residuals, names)
    reported = json.loads((finished / "results.json").read_text(encoding="utf-8"))["scores"]["structured"]
    assert score["nats_per_pixel"] == pytest.approx(reported["nats_per_pixel"], rel=1e-4)


def test_level_is_the_nearest_to_the_root_mean_square_of_differences():
    rows, columns = torch.arange(7)[:, None], torch.arange(6)
    slope = (3 * rows + columns).double()  # differences of 3 and 1: a root mean square of √5
    rms = torch.tensor([0.5, 0.02, 0.0525, 0.0, 7.0], dtype=torch.float64)
    levels = demo.levels_of(rms[:, None, None] * slope / 5**0.5)
    torch.testing.assert_close(levels, torch.tensor([10 ** (-6 / 20), 10 ** (-34 / 20), 10 ** (-26 / 20), 1e-3, 1.0]))
    assert set(levels.tolist()) <= set(demo.LEVELS.tolist())


def test_models_are_in_units_of_the_level():
    means, levels = torch.rand(2, 1, 4, 5), demo.LEVELS[[3, 40]]
    q = bg.GMRF(means[:, 0], demo.isotropic_model(2.0)(means, levels))
    torch.testing.assert_close(q.stddev, 2 * levels[:, None, None].expand(2, 4, 5))
    network = CovarianceNetwork(2, bg.Stencil.square(3), channels=4, initial_stddev=2.0)
    q = bg.GMRF(means[:, 0], demo.at_level(network)(means, levels))
    torch.testing.assert_close(q.stddev, 2 * levels[:, None, None].expand(2, 4, 5))
    torch.nn.init.normal_(network.head.conv.weight)
    found = demo.at_level(network)(means[:1].expand(2, 1, 4, 5), levels)
    place = (levels.log() - demo.LEVELS[30].log())[:, None, None, None].expand(2, 1, 4, 5)
    unit = network(torch.cat((means[:1].expand(2, 1, 4, 5), place), 1))
    expected = unit.to_dense() / levels[:, None, None]
    torch.testing.assert_close(found.to_dense(), expected)


def test_nats_hold_what_a_level_costs():
    levels = demo.LEVELS[[20, 30, 30]]
    residuals = levels[:, None, None] * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    factor = demo.isotropic_model(1.0)(residuals[:, None], levels)
    score = demo.evaluate(factor, residuals, ["camera", "camera", "chelsea"])
    density = torch.distributions.Normal(0.0, levels[:, None, None]).log_prob(residuals).mean((1, 2))
    expected = 4.110874 / 20 - density  # log 61
    assert score["nats_per_pixel"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert score["by_photograph"] == pytest.approx(
        {"camera": expected[:2].mean().item(), "chelsea": expected[2].item()}, rel=1e-5
    )


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
