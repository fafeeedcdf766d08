"""What reaches further than a stencil, end to end on tiny images; the choice of offsets and the measures on known fields."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import banded_gmrf as bg
from experiments.__main__ import app
from experiments.checkpoints import CHECKPOINT, load_checkpoint
from experiments.faces import figures
from experiments.faces.images import TrainingImages
from experiments.faces.presets import PRESETS, Covariance
from experiments.reach import measures, networks, offsets, presets, report, run
from experiments.reach.measures import measure
from experiments.reach.presets import ROWS
from experiments.reach.report import paired_difference, summarise
from supn_models import ConvVAE, CovarianceNetwork, StructuredLikelihood
from tests.experiments.tiny_faces import PRESET

TINY = replace(PRESET, covariances=(Covariance("VAE", 1),), train=16, held_out=0.5)


@pytest.fixture(scope="module")
def faces(npz, tmp_path_factory):
    """A finished run of faces."""
    folder = tmp_path_factory.mktemp("reach") / "faces"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["faces"], "quick", TINY)
        patch.setattr(figures, "draw", lambda *args: None)
        outcome = CliRunner().invoke(app, ["faces", "--data", str(npz), "--test", "12", "--out", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    return folder


def run_reach(faces, data, folder, *more):
    command = ["reach", str(faces), "--data", str(data), "--out", str(folder), "--epochs", "1", *more]
    return CliRunner().invoke(app, command)


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(faces, npz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reach") / "finished"
    outcome = run_reach(faces, npz, folder, "--seeds", "2")
    assert outcome.exit_code == 0, outcome.output
    return folder


def test_results_are_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "measured.json",
        "results.json",
        "results.md",
        "samples.png",
        "training.png",
        CHECKPOINT,
    }
    results = read(finished)
    assert list(results["rows"]) == [row.name for row in ROWS.values()]
    assert {len(stencil) for stencil in results["stencils"].values()} == {24}
    for name, row in results["rows"].items():
        assert set(row["pixels"]) == set(row["blocks"]) == {"0.5", "0.9", "0.99"}
        assert all(math.isfinite(row[key]) for key in ("nats", "bound", "variance", "lag_1", "lag_16", "kurtosis", "eyes"))
        assert row["conformal_scale"] > 0
        assert ("nats_difference" in row) == (name != "dense")
    one = results["rows"]["dilated"]
    assert one["nats_difference"]["mean"] == pytest.approx(one["nats"] - results["rows"]["dense"]["nats"])
    kept, _ = load_checkpoint(finished / CHECKPOINT)
    assert kept["dense + 32 factors"].config["num_factors"] == 32
    assert kept["greedy"].stencil.offsets == tuple(map(tuple, results["stencils"]["greedy"]))
    assert "dense, from scratch with the mean: VAE" in kept
    assert "dense, all images: VAE" not in kept


def test_an_interrupted_run_resumes_to_the_same_numbers(faces, npz, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        step, count = torch.optim.Adam.step, 0

        def interrupted_step(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == 30:  # of the twelfth training, the second one with 32 factors
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(torch.optim.Adam, "step", interrupted_step)
        assert run_reach(faces, npz, tmp_path, "--seeds", "2").exit_code == 130
    outcome = run_reach(faces, npz, tmp_path, "--seeds", "2", "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert read(tmp_path)["rows"] == read(finished)["rows"]


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def begun(faces, npz, tmp_path_factory):
    """A finished run of two rows of the table."""
    folder = tmp_path_factory.mktemp("reach") / "begun"
    outcome = run_reach(faces, npz, folder, "--seeds", "2", "--rows", "dense,greedy")
    assert outcome.exit_code == 0, outcome.output
    return folder


def test_networks_are_added_to_an_earlier_table_to_the_same_numbers(faces, npz, finished, begun, tmp_path, monkeypatch):
    trained, train = [], run.train_row

    def train_row(config, row, seed, *args, **options):
        trained.append((row, seed))
        return train(config, row, seed, *args, **options)

    second, third = tmp_path / "second", tmp_path / "third"
    more = ["--rows", "dense,fine-tuned,r8", "--seeds", "1", "--earlier", str(begun)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", interrupted)
        assert run_reach(faces, npz, second, *more).exit_code == 130
    outcome = run_reach(faces, npz, second, *more[:-2], "--resume")
    assert outcome.exit_code == 2
    assert "earlier is" in " ".join(outcome.output.replace("│", " ").split())
    monkeypatch.setattr(run, "train_row", train_row)
    # On another machine a greedy choice might be another: a row has one stencil.
    monkeypatch.setattr(run, "stencils", lambda *args: {"dense": bg.Stencil.square(7), "greedy": bg.Stencil.square(7)})
    outcome = run_reach(faces, npz, second, *more, "--resume")
    assert outcome.exit_code == 0, outcome.output
    outcome = run_reach(faces, npz, third, "--rows", "r8", "--seeds", "2", "--earlier", str(second))
    assert outcome.exit_code == 0, outcome.output
    assert trained == [(ROWS["dense"], 0), (ROWS["fine-tuned"], 0), (ROWS["r8"], 0), (ROWS["r8"], 1)]
    results, all_at_once = read(third), read(finished)
    tuned = ROWS["fine-tuned"].name
    assert list(results["rows"]) == ["dense", "greedy", tuned, "dense + 8 factors"]
    assert results["stencils"]["greedy"] == all_at_once["stencils"]["greedy"]
    for name in ("dense", "greedy", "dense + 8 factors"):
        assert results["rows"][name] == all_at_once["rows"][name]
    kept = {folder: json.loads((folder / "measured.json").read_text(encoding="utf-8")) for folder in (finished, third)}
    assert kept[third][tuned] == kept[finished][tuned][:1]
    own, reference = kept[third][tuned][:1], kept[third]["dense"][:1]
    difference = paired_difference(*([of_seed["nats"] for of_seed in row] for row in (own, reference)))
    assert results["rows"][tuned]["nats_difference"] == pytest.approx(difference, nan_ok=True)
    assert [of["trained"] for of in results["earlier"]] == [
        {"dense": [0, 1], "greedy": [0, 1]},
        {tuned: [0], "dense + 8 factors": [0]},
    ]
    written = (third / "results.md").read_text(encoding="utf-8")
    assert "dense, seeds 0 1; greedy, seeds 0 1: `" in written
    assert "dense + 8 factors, seeds 1: `" in written


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "dense,r8", "--measured", "5"], "measured is 12 there, 5 here"),
        (["--seeds", "2", "--rows", "greedy,dense"], "has 2 networks of each row already: greedy; dense"),
    ],
)
def test_an_earlier_table_that_does_not_fit_is_refused(faces, npz, begun, tmp_path, more, words):
    outcome = run_reach(faces, npz, tmp_path / "new", *more, "--earlier", str(begun))
    assert outcome.exit_code == 2
    assert words in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_experiment_is_no_earlier_table(faces, npz, tmp_path):
    outcome = run_reach(faces, npz, tmp_path / "new", "--earlier", str(faces))
    assert outcome.exit_code == 2
    assert "experiment is 'faces' there, 'reach' here" in " ".join(outcome.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "dense,r16"], "rows is dense,r16, expected some of dense, r8"),
        (["--rows", "dense,dense"], "each once"),
        (["--rows", "fine-tuned,dense"], "rows has fine-tuned without dense before it"),
        (["--rows", "dense-all,fine-tuned-unseen"], "rows has fine-tuned-unseen without dense before it"),
    ],
)
def test_bad_rows_are_named(faces, npz, tmp_path, more, words):
    outcome = run_reach(faces, npz, tmp_path / "new", *more)
    assert outcome.exit_code == 2
    assert words in " ".join(outcome.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_rows_that_differ_in_images_alone_need_a_vae_that_has_not_seen_them_all(monkeypatch, tmp_path):
    seen_all = replace(TINY, held_out=0.0, test=4).as_dict()
    monkeypatch.setattr(presets, "load_bases", lambda file: ({"VAE": None}, {"config": seen_all}))
    monkeypatch.setattr(presets, "check_same_data", lambda *args: None)
    file = tmp_path / "bases.safetensors"
    file.touch()
    rows = presets.config_for(None, file).rows
    assert [row.name for row in rows if row.is_control] == []
    assert len(rows) == len(ROWS) - 2
    with pytest.raises(ValueError, match=r"rows has dense-all, but the VAE of .* has seen all training images"):
        presets.config_for(None, file, ["dense", "dense-all"])


@pytest.mark.parametrize(
    ("name", "count"), [("dense", 2), ("dense-all", 5), ("fine-tuned-unseen", 2), ("fine-tuned", 5), ("scratch", 5)]
)
def test_which_images_train_a_row(name, count):
    images = TrainingImages((torch.zeros(3, 1, 8, 8),), (torch.ones(2, 1, 8, 8),), torch.empty(0, 1, 8, 8))
    (found,) = networks._images_of(ROWS[name], images)
    assert (len(found), found.sum().item()) == (count, 2 * 64)


def test_the_file_of_base_models_is_enough(faces, npz, finished, tmp_path):
    file = tmp_path / "bases.safetensors"
    file.write_bytes((faces / "bases.safetensors").read_bytes())
    outcome = run_reach(file, npz, tmp_path / "new", "--rows", "dense", "--seeds", "2")
    assert outcome.exit_code == 0, outcome.output
    assert read(tmp_path / "new")["rows"]["dense"] == read(finished)["rows"]["dense"]


def test_a_folder_without_a_run_is_refused(npz, tmp_path):
    outcome = run_reach(tmp_path, npz, tmp_path / "new")
    assert outcome.exit_code == 2
    # The frame of the message may break a path anywhere.
    assert "a run of faces or cifar10 leaves it" in " ".join(outcome.output.replace("│", " ").split())


def test_greedy_offsets_are_those_that_predict():
    """Of a field in which each pixel depends on two others, known by construction."""
    stencil = bg.Stencil([(0, 5), (3, -2)], ndim=2)
    coefficients = torch.zeros(2, 40, 40)
    coefficients[0], coefficients[1] = -0.5, -0.4
    q = bg.GMRF(torch.zeros(40, 40), bg.StencilCholesky(torch.zeros(40, 40), coefficients, stencil))
    torch.manual_seed(0)
    found = offsets.greedy(q.sample((60,)), 2, reach=6)
    assert set(found.offsets) == {(0, 5), (3, -2)}


def test_greedy_choice_equals_regression_by_least_squares():
    torch.manual_seed(0)
    fields = torch.randn(4, 9, 9)
    around = offsets._autocovariance(fields.double() / fields.double().square().mean(0).sqrt(), 4)
    candidates = [(y, x) for y in range(3) for x in range(-2, 3) if (y, x) > (0, 0)]
    chosen = []
    for _ in range(3):

        def left(sites):
            lags = [[around[a[0] - b[0] + 4, a[1] - b[1] + 4] for b in [(0, 0), *sites]] for a in [(0, 0), *sites]]
            covariance = torch.tensor(lags)
            return covariance[0, 0] - covariance[0, 1:] @ torch.linalg.solve(covariance[1:, 1:], covariance[1:, 0])

        chosen.append(min((one for one in candidates if one not in chosen), key=lambda one: left([*chosen, one])))
    assert set(offsets.greedy(fields, 3, reach=2).offsets) == set(chosen)


def test_dilated_offsets():
    patch = [(0, 1), (1, -1), (1, 0), (1, 1)]
    assert set(offsets.dilated(8).offsets) == {*patch, *((2 * y, 2 * x) for y, x in patch)}
    assert len(offsets.dilated(24)) == 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: offsets.dilated(10), "count is 10, expected a multiple of 4"),
        (lambda x: offsets.greedy(x, 24, 2), "count is 24, expected 1 to 12"),
        (lambda x: offsets.greedy(x, 4, 5), "reach is 5, expected at least 1 and less than half of 9"),
    ],
)
def test_impossible_offsets(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 9, 9))


def test_principal_components_gain_what_factors_gain():
    """Of whitened residuals with two directions of larger variance, known by construction."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(64, 2)).Q * torch.tensor([5.0, 3.0])
    training, validation, images = (
        (torch.randn(count, 64) + torch.randn(count, 2) @ directions.T).view(-1, 1, 8, 8) for count in (4000, 2000, 500)
    )
    zeros = torch.zeros(1, 8, 8)
    q = bg.GMRF(zeros, bg.StencilCholesky(zeros, torch.zeros(1, 4, 8, 8), bg.Stencil.square(3)))

    def plain(code):
        return q.expand([len(code)])

    plain.autoencoder = SimpleNamespace(encode=lambda x: x)
    gains = measures.principal_gains(plain, training, validation, images, seed=0)
    exact = bg.LowRankGMRF(q.loc, q.precision_cholesky, directions.T.reshape(2, 8, 8))
    expected = (exact.log_prob(images[:, 0]) - q.log_prob(images[:, 0])).mean().item()
    # Eight components with variances estimated from 2,000 images: each of six too many loses at most some hundredths.
    assert gains["8"] == pytest.approx(expected, abs=0.2)
    assert list(gains) == ["8", "32"]


def test_who_sees_which_images_is_said():
    held_out = replace(PRESET, train=100, held_out=0.25, validation=0.05)
    text = report._images_text(held_out)
    assert "learn from the 25 training images" in text
    assert text.endswith("trained together, from all 95, unless the row says otherwise.")
    assert report._images_text(replace(PRESET, train=100)) == ""


def test_differences_are_of_the_networks_that_both_rows_have():
    measured = {"a": [{"nats": [1.0, 2.0]}, {"nats": [5.0, 9.0]}], "b": [{"nats": [4.0, 4.0]}]}
    rows = summarise(measured)
    assert (rows["a"]["seeds"], rows["a"]["nats"]) == (2, 4.25)
    assert (rows["b"]["seeds"], rows["b"]["nats"], rows["b"]["nats_difference"]["mean"]) == (1, 4.0, 2.5)


def test_paired_differences():
    found = paired_difference([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]], [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert found["mean"] == pytest.approx(2)
    assert found["over_images"] == pytest.approx(torch.tensor([0.0, 1.0, 5.0]).std().item() / 3**0.5)
    assert found["over_seeds"] == pytest.approx(1)
    assert math.isnan(paired_difference([[1.0, 2.0]], [[0.0, 0.0]])["over_seeds"])


def test_measures_of_a_likelihood_that_is_right():
    """About its own samples; the correlation of both regions is that of the dense covariance."""
    size, weights = 8, measures.regions(8)
    torch.manual_seed(0)
    factors = 0.5 * torch.ones(1, size, size)
    local = bg.StencilCholesky(torch.zeros(size, size), 0.1 * torch.randn(4, size, size), bg.Stencil.square(3))
    q = bg.LowRankGMRF(torch.zeros(size, size), local, factors)

    class Right(StructuredLikelihood):
        def forward(self, code):
            return q.expand((len(code),))

    vae, network = ConvVAE((size, size), latent_size=3, channels=(4, 8)), CovarianceNetwork(1, bg.Stencil.square(3))
    likelihood = Right(vae, network).eval()
    images = q.sample((400,))[:, None]
    found = measure(replace(PRESET, bound_images=2), likelihood, images, 400, "right", None)
    vectors = weights.flatten(1)
    covariance = vectors @ q.covariance_matrix.double() @ vectors.T
    expected = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    assert found["eyes"] == pytest.approx(expected.item(), rel=1e-4)
    # Standard errors of a correlation and of shares of 400 fields, four times.
    assert found["eyes_of_the_data"] == pytest.approx(expected.item(), abs=4 * 400**-0.5)
    assert found["pixels"]["0.9"] == pytest.approx(0.9, abs=0.05)
    assert found["blocks"]["0.5"] == pytest.approx(0.5, abs=4 * 0.5 * 400**-0.5)
    assert found["conformal_scale"] == pytest.approx(1, abs=0.1)
    assert found["variance"] == pytest.approx(1, abs=0.05)
    assert found["kurtosis"] == pytest.approx(0, abs=0.15)
