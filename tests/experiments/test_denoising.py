"""Denoising and inpainting of tiny images, end to end, and the parts of it against dense algebra."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import banded_gmrf as bg
from experiments.__main__ import app
from experiments.checkpoints import CHECKPOINT, load_checkpoint
from experiments.datasets import ImageData
from experiments.denoising import estimators, inpainting, report, run
from experiments.denoising.estimators import BM3D, DENOISER, INFERRED_POSTERIOR, POSTERIOR, PROJECTION, bm3d_estimates
from experiments.denoising.noise import Noise, Sampler
from experiments.denoising.presets import DIAGONAL, STRUCTURED, Config, config_for
from experiments.denoising.report import table_rows
from experiments.faces import figures
from experiments.faces.presets import PRESETS
from supn_models import ConvVAE, LatentCovarianceNetwork, StructuredLikelihood, infer_code
from tests.experiments.tiny_faces import PRESET

# Of torch's own, when its rules of forward mode are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

TINY = replace(PRESET, covariances=(DIAGONAL, STRUCTURED), train=16)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS["faces"], "quick", TINY)
    # It takes images of at least 8 x 8 pixels and a second for each.
    monkeypatch.setattr(run, "bm3d_estimates", lambda noisy, sampler: noisy)


def denoise(data, folder, *options):
    return CliRunner().invoke(app, ["denoising", "--data", str(data), "--images", "3", "--out", str(folder), *options])


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def finished(image_folder, tmp_path):
    outcome = denoise(image_folder, tmp_path / "finished")
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "finished"


def test_results_are_complete_and_an_interrupted_run_resumes_to_them(image_folder, finished, tmp_path, monkeypatch):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "results.json",
        "results.md",
        "training.png",
        "figure11.png",
        "noises.png",
        "inpainting.png",
        CHECKPOINT,
    }
    results = read(finished)
    assert len(results["denoising"]) == len(Config(TINY, checkpoint=None).noises)
    for rows in results["denoising"].values():
        assert rows[DENOISER]["ratio"] == 1
        assert rows[PROJECTION]["images"] == rows[BM3D]["images"] == rows[INFERRED_POSTERIOR]["images"] == 3
        assert 0 <= rows[INFERRED_POSTERIOR]["not_converged"] <= 3
    assert len(results["inpainting"]) == 3
    assert len(results["left_out"]) == 1
    assert "Left out 1 file" in (finished / "results.md").read_text(encoding="utf-8")
    networks, _ = load_checkpoint(finished / CHECKPOINT)
    assert set(networks) == set(results["denoising"])

    def interrupt(noisy, sampler):
        if sampler.noise.level == 50:
            raise KeyboardInterrupt
        return noisy

    monkeypatch.setattr(run, "bm3d_estimates", interrupt)
    outcome = denoise(image_folder, tmp_path / "again")
    assert outcome.exit_code == 130
    assert "--resume" in outcome.stderr
    monkeypatch.setattr(run, "bm3d_estimates", lambda noisy, sampler: noisy)
    outcome = denoise(image_folder, tmp_path / "again", "--resume")
    assert outcome.exit_code == 0, outcome.output
    again = read(tmp_path / "again")
    assert (again["denoising"], again["inpainting"]) == (results["denoising"], results["inpainting"])


def test_networks_of_a_finished_run_are_used(npz, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    faces = tmp_path / "faces"
    outcome = CliRunner().invoke(app, ["faces", "--data", str(npz), "--test", "2", "--out", str(faces)])
    assert outcome.exit_code == 0, outcome.output

    def no_bm3d(noisy, sampler):
        raise ImportError

    monkeypatch.setattr(run, "bm3d_estimates", no_bm3d)
    outcome = denoise(npz, tmp_path / "with faces", "--faces", str(faces))
    assert outcome.exit_code == 0, outcome.output
    assert "pip install bm3d" in outcome.output
    # The same seeds train the same networks here and there.
    for name, rows in read(finished)["denoising"].items():
        found = read(tmp_path / "with faces")["denoising"][name]
        assert BM3D not in found
        assert found[POSTERIOR] == rows[POSTERIOR]


def test_denoising_autoencoders_have_the_passes_that_are_asked_for(image_folder, finished, tmp_path, monkeypatch):
    losses, train = {}, run.train_denoiser

    def train_denoiser(config, network, sampler, *args):
        losses[sampler.noise.name] = train(config, network, sampler, *args)
        return losses[sampler.noise.name]

    monkeypatch.setattr(run, "train_denoiser", train_denoiser)
    outcome = denoise(image_folder, tmp_path / "longer", "--denoiser-epochs", "3")
    assert outcome.exit_code == 0, outcome.output
    steps = 2 * TINY.train // TINY.batch_size
    assert TINY.base_epochs != 3
    assert {len(of_noise) for of_noise in losses.values()} == {3 * steps}
    results, before = read(tmp_path / "longer"), read(finished)
    assert results["inpainting"] == before["inpainting"]
    for name, rows in results["denoising"].items():
        assert rows[INFERRED_POSTERIOR]["mse"] == before["denoising"][name][INFERRED_POSTERIOR]["mse"]
        assert rows[DENOISER]["mse"] != before["denoising"][name][DENOISER]["mse"]
    assert "on the same images for 3 passes, at a rate that falls by a cosine" in (
        tmp_path / "longer" / "results.md"
    ).read_text(encoding="utf-8")


def test_inpainting_alone_gives_the_same_and_trains_no_denoiser(image_folder, finished, tmp_path):
    outcome = denoise(image_folder, tmp_path / "alone", "--inpainting-only")
    assert outcome.exit_code == 0, outcome.output
    assert read(tmp_path / "alone")["inpainting"] == read(finished)["inpainting"]
    assert read(tmp_path / "alone")["denoising"] == {}
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"config.json", "results.json", "results.md", "inpainting.png"}
    report = (tmp_path / "alone" / "results.md").read_text(encoding="utf-8")
    assert report.startswith("# Inpainting of")
    assert "denoising autoencoder" not in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results, folder: (folder / CHECKPOINT).unlink(), f"has no {CHECKPOINT}"),
        (lambda results, folder: results["config"].update(data="others"), "trained on others, the data is blocks"),
        (
            lambda results, folder: results["config"].update(experiment="splines"),
            "holds a run of splines, expected one of faces",
        ),
        (
            lambda results, folder: results["config"].update(covariances=[]),
            "has no covariance network VAE, diagonal from z and no VAE",
        ),
        (lambda results, folder: results.pop("config"), "holds no finished run"),
    ],
)
def test_runs_that_do_not_fit_are_refused(npz, tmp_path, change, message):
    results = {"config": replace(TINY, data="blocks").as_dict()}
    (tmp_path / CHECKPOINT).touch()
    change(results, tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    outcome = denoise(npz, tmp_path / "new", "--faces", str(tmp_path))
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_passes_of_denoisers_that_are_not_trained_are_refused(npz, tmp_path):
    outcome = denoise(npz, tmp_path / "new", "--inpainting-only", "--denoiser-epochs", "3")
    assert outcome.exit_code == 2
    assert "denoiser_epochs is 3, expected none" in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("images", "alone", "expected"), [(None, True, 200), (300, True, 300), (300, False, 200)])
def test_as_many_images_are_inpainted_as_are_asked_for(images, alone, expected):
    train, test = (torch.zeros(count, 1, 8, 8) for count in (16, 400))
    data = ImageData("blocks", train, test, "made here")
    assert config_for(data, "quick", None, images, inpainting_only=alone).inpainted == expected


def test_correlated_noise_has_its_covariance():
    noise, size = Noise(25, correlation_length=2), 9
    q = noise.distribution(size, torch.device("cpu"))
    covariance = q.covariance_matrix.double()
    site = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    expected = noise.stddev**2 * (-torch.cdist(site, site) / 2).exp()
    # An exponential covariance is not that of a 7 x 7 stencil exactly.
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.02 * noise.stddev**2)
    # White noise is the limit of no correlation, and has the same power at all frequencies.
    spectrum = Noise(25, correlation_length=1e-3).spectral_density(size)
    np.testing.assert_allclose(spectrum, size**2 * noise.stddev**2, rtol=1e-10)


@pytest.mark.parametrize("noise", [Noise(25), Noise(25, correlation_length=2)])
def test_posterior_means_equal_dense_wiener_filters(noise):
    size = 6
    sampler = Sampler(noise, size, torch.device("cpu"))
    stencil = bg.Stencil.square(3)
    factor = bg.StencilCholesky(0.3 * torch.randn(2, size, size) + 1, 0.3 * torch.randn(2, len(stencil), size, size), stencil)
    q = bg.GMRF(torch.randn(2, size, size), factor)
    y = q.sample() + sampler(torch.randn(2, size, size))
    prior = q.covariance_matrix.double()
    noise_covariance = noise.stddev**2 * torch.eye(size**2, dtype=torch.float64)
    if noise.correlation_length:
        noise_covariance = sampler.distribution.covariance_matrix.double()
    gain = prior @ torch.linalg.inv(prior + noise_covariance)
    expected = q.loc.double() + (gain @ (y - q.loc).double().flatten(1)[..., None]).reshape(2, size, size)
    # Conjugate gradients end at a relative residual of 10⁻⁶; the result is rounded to float32.
    torch.testing.assert_close(sampler.posterior_mean(q, y).double(), expected, rtol=1e-4, atol=1e-5)


def test_searches_that_have_not_converged_are_counted_not_shown(recwarn, monkeypatch):
    """One image begins at its mode, the other far from it."""
    torch.manual_seed(0)
    size, stencil = 8, bg.Stencil.square(3)
    vae = ConvVAE((size, size), latent_size=2, channels=(4,)).eval().requires_grad_(False)
    network = LatentCovarianceNetwork((size, size), 2, stencil, decoder_channels=(4,), channels=4).eval().requires_grad_(False)
    likelihood = StructuredLikelihood(vae, network)
    y = 0.5 * torch.randn(2, size, size)
    mode = infer_code(likelihood, lambda q: q.posterior(y, 0.1), vae.encode(y[:, None]), max_iterations=100).code.mean.float()
    start = mode + torch.tensor([[0.0], [3.0]])
    monkeypatch.setattr(estimators, "infer_code", partial(infer_code, max_iterations=1))
    found = estimators.inferred(likelihood, lambda q: q.posterior(y, 0.1), start)
    assert found.converged.tolist() == [True, False]
    assert not any("converged" in str(warning.message) for warning in recwarn)
    results = {
        "denoising": {"white": {"rows": {"not_converged": 0}}},
        "inpainting": {"half": {"a": {}, "b": {"not_converged": 2}}},
    }
    assert report._not_converged_text(results).endswith("last iteration: half, 2.")
    results["inpainting"] = {}
    assert report._not_converged_text(results).endswith("last iteration: none.")
    assert report._not_converged_text({"denoising": {"white": {"rows": {}}}, "inpainting": {}}) == ""


def test_table_of_known_errors():
    images = torch.zeros(4, 1, 16, 16)
    rows = table_rows(images, {DENOISER: images + 0.2, BM3D: images[:2] + 0.1})
    # 0.2 in [-1, 1] is 0.1 between black and white.
    assert rows[DENOISER]["mse"] == pytest.approx(0.01, rel=1e-5)
    assert rows[DENOISER]["psnr"] == pytest.approx(20, rel=1e-5)
    assert rows[BM3D]["ratio"] == pytest.approx(0.25, rel=1e-5)
    assert rows[BM3D]["images"] == 2
    perfect = table_rows(torch.rand(2, 1, 16, 16), {DENOISER: torch.zeros(2, 1, 16, 16)})
    assert perfect[DENOISER]["ssim"] < 0.5


@pytest.mark.parametrize("noise", [Noise(25), Noise(25, correlation_length=2)])
def test_bm3d_removes_noise(noise):
    pytest.importorskip("bm3d")
    clean = torch.linspace(-0.8, 0.8, 32).expand(2, 1, 32, 32)
    noisy = clean + Sampler(noise, 32, torch.device("cpu"))(torch.randn(2, 1, 32, 32))
    found = bm3d_estimates(noisy, Sampler(noise, 32, torch.device("cpu")))
    assert found.shape == noisy.shape
    assert (found - clean).square().mean() < 0.5 * (noisy - clean).square().mean()


def test_inpainting_conditions_on_the_known_pixels():
    torch.manual_seed(0)
    vae = ConvVAE((8, 8), latent_size=3, channels=(4, 8)).eval()
    covariance = LatentCovarianceNetwork((8, 8), 3, bg.Stencil.square(3), decoder_channels=(4, 8), channels=4).eval()
    likelihood = StructuredLikelihood(vae, covariance).requires_grad_(False)
    config = replace(Config(TINY, checkpoint=None), inpainted=5, rounds=1)
    images, average = torch.randn(5, 1, 8, 8), torch.randn(8, 8)
    for known in inpainting.masks(config).values():
        known = known.expand(5, 8, 8)
        plain, completions = inpainting.inpaint(config, likelihood, average, images, known)
        found = completions[inpainting.FILLED]
        for one in completions.values():
            assert (one.stddev[known] == 0).all()
            for completed in (plain, one.mean, *one.samples):
                assert torch.equal(completed[known], images[:, 0][known])
        filled = images[:, 0].where(known, average)
        q = likelihood(vae.encode(filled[:, None]))
        precision, site = q.precision_matrix[0].double(), known[0].flatten()
        residual = (images[0, 0] - q.loc[0]).double().flatten()
        shift = torch.linalg.solve(precision[~site][:, ~site], -precision[~site][:, site] @ residual[site])
        expected = q.loc[0].double().flatten()[~site] + shift
        torch.testing.assert_close(found.mean[0].double().flatten()[~site], expected, rtol=1e-4, atol=1e-4)
        rows = inpainting.scores(images, known, average, plain, completions)
        assert list(rows) == ["average face", "VAE", inpainting.FILLED, inpainting.INFERRED]
        columns = {"mse", "mse_of_a_sample", *(f"coverage_{p}" for p in (0.5, 0.9, 0.99))}
        assert set(rows[inpainting.FILLED]) == columns
        assert set(rows[inpainting.INFERRED]) == {*columns, "not_converged"}


def test_coverage_of_known_deviations():
    image, known = torch.zeros(1, 1, 1, 4), torch.tensor([[[True, False, False, False]]])
    mean, stddev = torch.tensor([[[0.0, 0.5, 1.0, 2.0]]]), torch.tensor([[[0.0, 1.0, 1.0, 1.0]]])
    completed = {inpainting.FILLED: inpainting.Inpainted(mean, stddev, mean[None])}
    row = inpainting.scores(image, known, mean[0], mean, completed)[inpainting.FILLED]
    # Normal quantiles of deviations of 0.5, 1 and 2: 0.67 holds one of them, 1.64 two, 2.58 all.
    assert [row[f"coverage_{p}"] for p in (0.5, 0.9, 0.99)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert row["mse"] == pytest.approx((0.25 + 1 + 4) / 3 / 4)
