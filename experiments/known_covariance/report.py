"""Tables of the synthetic experiments, with the paper's numbers beside."""

import math
from typing import Any

import torch

from banded_gmrf import diagnostics
from programs.tables import markdown_table

from ..results import where_text
from ..whiteness import lag_autocorrelation
from .paper import PAPER
from .presets import Config
from .scores import Scores

COVERAGE_LEVELS = [level / 100 for level in range(1, 100)]
_METRICS = ("nll", "kl", "norm")


def floor_name(stencil: str | int) -> str:
    """The row of the best factor with the stencil of a `presets.Model`."""
    return "floor, diagonal" if stencil == "diagonal" else f"floor, f = {stencil}"


def summarise(config: Config, scores: dict[str, list[Scores]]) -> dict[str, dict[str, Any]]:
    """For each row the mean of each metric over signals and seeds, its standard error, and how white the residuals are."""
    rows: dict[str, dict[str, Any]] = {}
    for name, of_seeds in scores.items():
        row = rows[name] = {}
        for metric in _METRICS:
            values = [getattr(one, metric) for one in of_seeds]
            mean = sum(values) / len(values)
            row[metric] = {
                "mean": mean.mean().item(),
                "standard_error": (mean.std() / math.sqrt(len(mean))).item(),
                "by_seed": [value.mean().item() for value in values],
            }
        whitened = [one.whitened for one in of_seeds]
        row["whitened_variance"] = sum(one.var().item() for one in whitened) / len(whitened)
        row["whitened_autocorrelation"] = sum(lag_autocorrelation(one) for one in whitened) / len(whitened)
        row["coverage"] = diagnostics.chi_squared_coverage(
            torch.cat(whitened), COVERAGE_LEVELS, ndim=whitened[0].ndim - 1
        ).tolist()
    diagonal = rows[config.models[0].name]["nll"]["mean"]
    for model in config.models[1:]:
        floor = rows["truth" if model.stencil == "dense" else floor_name(model.stencil)]["nll"]["mean"]
        rows[model.name]["gap_closed"] = (diagonal - rows[model.name]["nll"]["mean"]) / (diagonal - floor)
    return rows


def markdown_report(config: Config, results: dict[str, Any]) -> str:
    """The table of results with the paper's, and what is needed to read it."""
    header = ["", "-log p(x)", "KL", "norm", "gap closed", "variance", "lag-1"]
    table = []
    for name, row in results["rows"].items():
        exact = name == "truth"
        table.append(
            [
                name,
                *("-" if exact and metric != "nll" else _plus_minus(row[metric]) for metric in _METRICS),
                f"{100 * row['gap_closed']:.1f} %" if "gap_closed" in row else "",
                f"{row['whitened_variance']:.3f}",
                f"{row['whitened_autocorrelation']:.3f}",
            ]
        )
    paper = PAPER[config.experiment]
    table += [
        [f"paper: {name}", *(f"{row[metric]:g}" if metric in row else "-" for metric in _METRICS), "", "", ""]
        for name, row in paper.items()
    ]
    paper_gap = (paper["diagonal"]["nll"] - paper["structured"]["nll"]) / (paper["diagonal"]["nll"] - paper["truth"]["nll"])
    kinds = ", ".join(f"{model.name}: {model.seeds}" for model in config.models)
    spread = "; ".join(
        f"{name}: {min(row['nll']['by_seed']):.2f} to {max(row['nll']['by_seed']):.2f}"
        for name, row in results["rows"].items()
        if len(row["nll"]["by_seed"]) > 1
    )
    return (
        f"# {config.experiment.capitalize()}: recovering a known covariance\n\n"
        + markdown_table(header, table)
        + f"\nMeans over {config.test} test signals and over the networks of a kind ({kinds}), ± their standard errors over "
        "the test signals. -log p(x) in nats, KL(N(0, Σ̂) ‖ N(0, Σ)) in nats, norm is the Frobenius norm of Σ̂ - Σ: lower is "
        "better. Variance and lag-1 are the variance and the correlation of neighbours of the whitened residuals (1 and 0 for "
        "the truth). The floor is the factor with that stencil whose expected -log p(x) is lowest "
        "(`StencilCholesky.from_covariance`): no network with that stencil has a lower one, though it may have a lower KL or "
        "norm. A dense factor's floor is the truth. "
        "Gap closed is the part of the distance in -log p(x) from the diagonal network to the floor; the paper's model closed "
        f"{100 * paper_gap:.0f} % of the distance to the truth.\n\n"
        "The paper does not publish its covariance function. This one follows its words, with four free scalars calibrated so "
        "that the expected rows of the truth and of the diagonal are the paper's (`python -m experiments calibrate`). How hard "
        "a covariance is for a stencil or a network is not fixed by these rows: read the paper's third row with that in mind. "
        "What the paper leaves open is this library's choice: outputs that start from zero, an initial standard deviation from "
        "the training residuals, gradients clipped at a norm of 10, batches of 256"
        + (", and the network, which is that of the splines" if config.experiment == "ellipses" else "")
        + ".\n\n"
        + (f"Range of -log p(x) over the networks of a kind: {spread}.\n\n" if spread else "")
        + f"{config.train} training signals; networks and schedules in results.json. Preset {config.preset}, seed "
        f"{config.seed}; `{results['command']}`, {results['seconds']['all']:.0f} s on {where_text(results)}.\n"
    )


def _plus_minus(value: dict[str, Any]) -> str:
    return f"{value['mean']:.2f} ± {value['standard_error']:.2f}"
