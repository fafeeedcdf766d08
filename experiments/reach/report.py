"""The table of rows, as means over seeds, with paired differences."""

import math
import statistics
from typing import Any

import torch

from programs.tables import markdown_table

from ..faces.presets import Config as Faces
from ..results import data_text, where_text
from .measures import BLOCK, LEVELS
from .presets import Config


def paired_difference(values: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """Of nats per image (seeds, images), less those of a reference: the mean, and two standard errors of it.

    "over_images" is that of the means over seeds, image by image: of other test images. "over_seeds" is that of the means over
    images, seed by seed: of other networks; NaN for one seed.
    """
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    seeds, images = difference.shape
    over_images = difference.mean(0).std().item() / math.sqrt(images) if images > 1 else math.nan
    over_seeds = difference.mean(1).std().item() / math.sqrt(seeds) if seeds > 1 else math.nan
    return {"mean": difference.mean().item(), "over_images": over_images, "over_seeds": over_seeds}


def summarise(measured: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each row means over seeds, and differences from the first row, of as many seeds as both have.

    Args:
        measured: for each row what `measures.measure` gives for each seed.
    """
    rows = {}
    reference = next(iter(measured.values()))
    for name, seeds in measured.items():
        row: dict[str, Any] = {"seeds": len(seeds)}
        for key, first in seeds[0].items():
            values = [of_seed[key] for of_seed in seeds]
            if isinstance(first, list):
                row[key] = statistics.fmean(statistics.fmean(of_images) for of_images in values)
                if seeds is not reference:
                    both = min(len(seeds), len(reference))
                    row[f"{key}_difference"] = paired_difference(values[:both], [of_seed[key] for of_seed in reference[:both]])
            elif isinstance(first, dict):
                row[key] = {level: statistics.fmean(value[level] for value in values) for level in first}
            else:
                row[key] = None if first is None else statistics.fmean(values)
        rows[name] = row
    return rows


def markdown_report(config: Config, results: dict[str, Any]) -> str:
    """The tables, and what is needed to read them."""
    rows, faces = results["rows"], config.faces
    first = next(iter(rows))
    nats = [
        [
            name,
            str(row["seeds"]),
            *(cell for key in ("bound", "nats") for cell in (f"{row[key]:.0f}", _difference(row.get(f"{key}_difference")))),
        ]
        for name, row in rows.items()
    ]
    white = [
        [name, *(f"{row[key]:.3f}" for key in ("variance", "lag_1", "lag_16", "kurtosis", "eyes", "eyes_of_the_data"))]
        for name, row in rows.items()
    ]
    coverage = [
        [
            name,
            *(f"{row[what][str(level)]:.3f}" for what in ("pixels", "blocks") for level in LEVELS),
            "-" if row["conformal_scale"] is None else f"{row['conformal_scale']:.3f}",
        ]
        for name, row in rows.items()
    ]
    shares = [f"{what} in {level:.0%}" for what in ("pixels", "blocks") for level in LEVELS]
    greedy = results["stencils"].get("greedy")
    return (
        f"# What reaches further than a dense stencil, {faces.data}, {faces.size} x {faces.size} pixels\n\n"
        + markdown_table(["", "networks", "-log p(x), bound", f"less {first}", "-log p(x given z)", f"less {first}"], nats)
        + "\n"
        + markdown_table(["", "variance", "lag-1", "lag-16", "kurtosis", "eyes", "eyes, data"], white)
        + "\n"
        + markdown_table(["", *shares, "scale"], coverage)
        + f"\nNats per image, lower is better, means over {faces.test:,} test images ({faces.bound_images:,} for the bound) "
        "and the networks of each row; differences, of the networks that both rows have, image by image ± "
        "standard error over images, and over networks. "
        "Variance, correlations along an axis and excess kurtosis are of whitened residuals (1, 0, 0, 0 for a perfect model). "
        "Eyes: correlation of the means of the residual over both eyes, under the model and in the data. Coverage: shares of "
        f"pixels, and of means over {BLOCK} x {BLOCK} pixels, within central intervals; scale: the conformal one of 90 % "
        f"intervals of pixels, 1 if they are right; of the first {config.measured:,} test images.{data_text(results)}\n\n"
        f"All stencils have the {len(results['stencils']['dense'])} offsets of f = {config.stencil_size} in number. Dilated: a "
        "3 x 3 patch dilated by 1, 2, 3, 4, 8 and 16. "
        + ("" if greedy is None else f"Greedy, from training residuals: {' '.join(f'({y}, {x})' for y, x in greedy)}. ")
        + f"{config.epochs} passes, {config.scratch_epochs} from scratch.{_images_text(faces)}\n\n"
        + _principal_text(results["principal"])
        + f"The VAE is of the run {results['networks']}. "
        + " ".join(_run_text(run) for run in [*results["earlier"], {**results, "where": where_text(results)}])
        + "\n"
    )


def _images_text(faces: Faces) -> str:
    """Who sees which images, where a frozen VAE's networks and those that are trained with one differ in it."""
    if not faces.held_out:
        return ""
    return (
        f" Networks behind the VAE that stays as it is learn from the {faces.covariance_images:,} training images that it has "
        f"not seen; mean and covariance trained together, from all {faces.base_images + faces.covariance_images:,}, unless the "
        "row says otherwise."
    )


def _principal_text(gains: dict[str, float]) -> str:
    """What factors alike for all images could gain, a paragraph; nothing where that was not measured."""
    if not gains:
        return ""
    nats = " and ".join(f"{gain:.1f}" for gain in gains.values())
    return (
        f"Over the first network of dense, {' and '.join(gains)} factors that are alike for all images once whitened could "
        f"gain {nats} nats per image: the leading principal components of whitened training residuals, with the variances of "
        "validation images.\n\n"
    )


def _run_text(run: dict[str, Any]) -> str:
    """What a run trained, its command, time and machine."""
    seconds = ", ".join(f"{part} {run['seconds'][part]:.0f} s" for part in ("training", "measures"))
    trained = "; ".join(f"{name}, seeds {' '.join(map(str, seeds))}" for name, seeds in run["trained"].items())
    return f"{trained}: `{run['command']}`, {seconds} on {run['where']}."


def _difference(of: dict[str, float] | None) -> str:
    if of is None:
        return ""
    seeds = "" if math.isnan(of["over_seeds"]) else f", {of['over_seeds']:.1f}"
    return f"{of['mean']:+.1f} ± {of['over_images']:.1f}{seeds}"
