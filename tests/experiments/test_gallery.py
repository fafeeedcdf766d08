"""The gallery from end to end on small images, and the covariance function that it draws."""

import json

import torch
from typer.testing import CliRunner

from experiments import gallery
from experiments.__main__ import app


def test_gallery(tmp_path):
    folder = tmp_path / "new"
    outcome = CliRunner().invoke(app, ["gallery", "--size", "24", "--out", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1] == f"Results: {folder}"
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    report = (folder / "results.md").read_text(encoding="utf-8")
    for kind in ("divergence", "likelihood"):
        for name, nats in results["nats_per_pixel"][kind].items():
            assert f"| {name} |" in report
            assert list(nats.values()) == sorted(nats.values(), reverse=True)  # a larger stencil contains the smaller
            assert kind == "likelihood" or min(nats.values()) > 0

    refused = CliRunner().invoke(app, ["gallery", "--out", str(folder)])
    assert refused.exit_code == 2
    assert "--out" in refused.output


def test_the_swirl_is_a_covariance_whose_correlations_run_around_the_centre():
    grid = (9, 9)
    sites = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    matrix = gallery.swirl_covariance(grid)(sites[None, :, None], sites[None, None])[0]
    torch.testing.assert_close(matrix.diagonal(), torch.ones(81, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    right_of_centre = torch.tensor([[20, 38], [21, 38], [20, 39]])
    itself, below, beyond = gallery.swirl_covariance((41, 41))(right_of_centre[:1], right_of_centre)
    assert itself > below > beyond
