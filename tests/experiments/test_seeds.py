"""The table of several runs: `experiments/faces/seeds.py`."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.faces.presets import Covariance
from experiments.faces.seeds import runs_of, summarise, write_table
from experiments.results import environment
from tests.experiments.tiny_faces import PRESET

NETWORKS = {base: (Covariance(base, 1), Covariance(base, 3)) for base in ("AE", "AE-L1")}
# Of the diagonal network and of f = 3, by base model and seed.
NATS = {
    ("AE", 0): (1.0, -4.0),
    ("AE", 1): (3.0, -2.0),
    ("AE", 2): (2.0, -6.0),
    ("AE-L1", 0): (2.0, -5.0),
    ("AE-L1", 2): (5.0, -3.0),
}


@pytest.fixture
def folders(tmp_path):
    """Finished runs, one for each base model and seed, of which only the numbers are there."""
    found = []
    for (base, seed), nats in NATS.items():
        config = replace(PRESET, covariances=NETWORKS[base], seed=seed, data="blocks", note="", train=16, test=30)
        rows = {
            covariance.name: {
                "nats": {"mean": value, "stddev": 1.0, "standard_error": 0.1},
                "whitened_variance": 1.0 + seed,
                "whitened_autocorrelation": 0.5,
                "whitened_kurtosis": 3.0,
                **({} if covariance.stencil_size == 1 else {"nats_gain_per_pixel": 0.25}),
            }
            for covariance, value in zip(NETWORKS[base], nats, strict=True)
        }
        run = {"rows": rows, "residual_rms": {base: {"base_images": 0.1, "test": 0.2}}, "config": config.as_dict()}
        run |= {"seconds": {"training": 1.0}, **environment("cpu")}
        found.append(tmp_path / f"{base}{seed}")
        found[-1].mkdir()
        (found[-1] / "results.json").write_text(json.dumps(run))
    return found


def test_means_and_differences_are_those_of_seeds(folders):
    rows = {(row["base"], row["network"]): row for row in summarise(runs_of(folders))}
    assert list(rows) == [(base, network) for base in NETWORKS for network in ("diagonal from z", "f = 3 from z")]
    structured, other = rows["AE", "f = 3 from z"], rows["AE-L1", "f = 3 from z"]
    assert structured["nats"] == {"mean": -4.0, "stddev": 2.0, "standard_error": pytest.approx(2 / math.sqrt(3))}
    assert structured["whitened_variance"]["mean"] == 2.0
    assert structured["nats_gain_per_pixel"]["mean"] == 0.25
    assert rows["AE", "diagonal from z"]["nats_gain_per_pixel"] is None
    assert "difference" not in structured
    # Of seeds 0 and 2, which both have: -1 and 3.
    assert other["difference"] == {"mean": 1.0, "stddev": pytest.approx(8**0.5), "standard_error": pytest.approx(2.0)}
    assert list(structured["seeds"]) == ["0", "1", "2"]


def test_the_table_says_how_many_seeds_it_is_of(folders, tmp_path):
    out = tmp_path / "table"
    out.mkdir()
    write_table(runs_of(folders), out, Console(quiet=True))
    report = (out / "results.md").read_text()
    assert "| AE, f = 3 from z | 3 | 0.2000 ± 0.0000 | -4 ± 2 |  | 0.250 ± 0.000 | 2.000 ± 1.000 |" in report
    assert "| AE-L1, f = 3 from z | 2 | 0.2000 ± 0.0000 | -4 ± 1 | 1 ± 2 |" in report
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == len(folders)
    with pytest.raises(ValueError, match="holds a run of seeds"):
        runs_of([out])
    one = tmp_path / "one"
    one.mkdir()
    write_table(runs_of(folders[:1]), one, Console(quiet=True))
    assert "| AE, f = 3 from z | 1 | 0.2000 | -4 |  | 0.250 | 1.000 |" in (one / "results.md").read_text()


def test_runs_that_are_no_seeds_of_each_other_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="both have AE, diagonal from z of seed 0"):
        runs_of([*folders, folders[0]])
    path = folders[1] / "results.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"config": run["config"] | {"base_epochs": 9}}))
    with pytest.raises(ValueError, match="base_epochs is 1 there, 9 here"):
        runs_of(folders)
    path.write_text(json.dumps(run | {"config": run["config"] | {"bfloat16": True}}))
    with pytest.raises(ValueError, match="AE, diagonal from z with bfloat16 True, a run before it has another"):
        runs_of(folders)
    path.write_text(json.dumps(run | {"config": {"experiment": "reach"}}))
    with pytest.raises(ValueError, match="holds a run of reach, expected one of faces or cifar10"):
        runs_of(folders)
    outcome = CliRunner().invoke(app, ["seeds", str(folders[0]), str(tmp_path), "--out", str(tmp_path / "new")])
    assert outcome.exit_code == 2
    assert "Invalid value for RUNS" in outcome.output
    assert not (tmp_path / "new").exists()
