"""Table 3 of the SUPN paper for other images, with the paper's numbers beside."""

import math
from typing import Any

from torch import Tensor

from programs.tables import markdown_table

from ..results import data_text, where_text
from ..whiteness import excess_kurtosis, lag_autocorrelation
from .paper import PAPER, paper_gain
from .presets import BETAS, SOURCES, Config, Covariance
from .scores import Scores

_METRICS = ("bound", "nats")
LEVELS = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999)


def reference(base: str) -> str:
    """The row that gains of a base model's covariance networks are counted from: the diagonal likelihood of a VAE itself."""
    return Covariance(base, 1).name if BETAS[base] is None else base


def summarise(config: Config, scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    """For each row mean, standard deviation and standard error over images, gains per pixel, and how white residuals are."""
    rows: dict[str, dict[str, Any]] = {}
    for name, of_images in scores.items():
        rows[name] = {
            **{metric: _over_images(getattr(of_images, metric)) for metric in _METRICS},
            "whitened_variance": of_images.whitened.var().item(),
            "whitened_autocorrelation": lag_autocorrelation(of_images.whitened),
            "whitened_kurtosis": excess_kurtosis(of_images.whitened),
            "whitened_quantiles": _quantiles(of_images.whitened),
        }
    for covariance in config.covariances:
        row, diagonal = rows[covariance.name], rows[reference(covariance.base)]
        for metric in _METRICS:
            if row[metric] is not None and row is not diagonal:
                row[f"{metric}_gain_per_pixel"] = (diagonal[metric]["mean"] - row[metric]["mean"]) / config.size**2
    return rows


def compare_sources(config: Config, scores: dict[str, Scores], parameters: dict[str, int]) -> dict[str, dict[str, Any]]:
    """For each base model with networks from all sources, what each loses in -log p(x | z) against the best of them.

    Differences are taken image by image, so that their standard errors are not those of hard and easy images.

    Args:
        config: the run's.
        scores: by the names of covariance networks.
        parameters: how many each network has.
    """
    compared = {}
    for base in config.bases:
        of_base = [covariance for covariance in config.covariances if covariance.base == base]
        size = max(covariance.stencil_size for covariance in of_base)
        networks = {covariance.source: covariance.name for covariance in of_base if covariance.stencil_size == size}
        if set(networks) == set(SOURCES):
            nats = {source: scores[name].nats for source, name in networks.items()}
            best = min(nats, key=lambda source: nats[source].mean())
            compared[base] = {
                "stencil_size": size,
                "best": best,
                "loss": {source: _over_images(values - nats[best]) for source, values in nats.items()},
                "parameters": {source: parameters[name] for source, name in networks.items()},
            }
    return compared


def markdown_report(config: Config, results: dict[str, Any]) -> str:
    """The table of results, the paper's, and what is needed to read them."""
    header = ["", "-log p(x), bound", "-log p(x given z)", "gain, bound", "gain", "variance", "lag-1", "kurtosis"]
    rows = results["rows"]
    table = [
        [
            name,
            *(_plus_minus(row[metric]) for metric in _METRICS),
            *(f"{row[key]:.3f}" if key in row else "" for key in ("bound_gain_per_pixel", "nats_gain_per_pixel")),
            f"{row['whitened_variance']:.3f}",
            f"{row['whitened_autocorrelation']:.3f}",
            f"{row['whitened_kurtosis']:.2f}",
        ]
        for name, row in rows.items()
    ]
    paper_table = [
        [f"paper, CelebA: {name}", *(f"{row[m][0]} ± {row[m][1]}" if m in row else "-" for m in _METRICS)]
        for name, row in PAPER.items()
    ]
    rms = "; ".join(f"{name} {of['base_images']:.4f} and {of['test']:.4f}" for name, of in results["residual_rms"].items())
    seconds = results["seconds"]
    return (
        f"# Structured residuals on {config.data}, {config.size} x {config.size} pixels\n\n"
        + markdown_table(header, table)
        + "\n"
        + markdown_table(header[:3], paper_table)
        + f"\n{config.data}: {config.note}. Training images, and their mirror images: {config.base_images:,} for base models, "
        f"{config.covariance_images:,} {'others' if config.held_out else '(the same)'} for covariance networks. "
        f"{config.test:,} test images, of which {config.bound_images:,} for the bound, with {config.samples} samples each."
        f"{data_text(results)}\n\n"
        "Nats per image, mean ± standard deviation over test images; lower is better. z is the mean of the encoder. Gains are "
        "nats per pixel over the diagonal likelihood that the VAE was trained with, for AE over its diagonal network; in the "
        f"paper {paper_gain('bound'):.2f} for the bound and {paper_gain('nats'):.2f} given z. Variance, lag-1 and kurtosis are "
        "the variance, the correlation of neighbouring pixels and the excess kurtosis of the whitened residuals of test images "
        "(1, 0 and 0 for a perfect model). Root mean square of residuals, of images that trained the base model and of test "
        f"images: {rms}.\n\n"
        + _best_source(results["sources"])
        + "Not in the paper, and chosen here: dequantisation noise uniform over one gray level, mirror images, "
        f"{config.latent_size} numbers in a code, 5 x 5 convolutions of widths {'-'.join(map(str, config.channels))}, "
        "passes over images and mirror images, codes drawn from q(z | x) to train the covariance networks of a VAE. "
        f"{_schedule(config)}{_stopped(config, results)}{_given(config)}\n\n"
        f"Preset {config.preset}, seed {config.seed}, {'bfloat16' if config.bfloat16 else 'float32'} networks in training"
        f"{', compiled' if config.compiled else ''}; `{results['command']}`, training {seconds['training']:.0f} s, "
        f"scores {seconds['scores']:.0f} s in {results['processes']} process{'es' if results['processes'] > 1 else ''} on "
        f"{where_text(results)}.\n"
    )


def _schedule(config: Config) -> str:
    """Learning rates and passes, in sentences."""
    patience = config.patience
    cosine = f"passes at a learning rate that falls from {config.learning_rate:g} to 0 by a cosine"
    if patience is None:
        return f"{config.base_epochs} and {config.covariance_epochs} {cosine}, of base models and of covariance networks."
    return (
        f"Covariance networks: {config.covariance_epochs} {cosine}. Base models: at most {config.base_epochs} passes, ended by "
        f"their own loss of {config.validation_images:,} training images that no network was trained on; a learning rate of "
        f"{config.learning_rate:g} that falls to {patience.factor:g} of itself after {patience.epochs} passes without a lower "
        f"loss, {patience.drops} times before the end, never before {patience.least_epochs} passes."
    )


def _stopped(config: Config, results: dict[str, Any]) -> str:
    """How many passes the base models had, where they ended by themselves."""
    curves = results.get("curves")
    if not curves or config.patience is None:
        return ""
    passes = "; ".join(f"{name} {len(curve['validation'])}, the best {curve['best']}" for name, curve in curves.items())
    return f" Passes of base models: {passes}."


def _given(config: Config) -> str:
    """Where the base models are from, if they were not trained in the run."""
    return (
        ""
        if config.given_bases is None
        else (" The base models are those of an earlier run, which `--bases` names, with weights rounded to half precision.")
    )


def _best_source(compared: dict[str, dict[str, Any]]) -> str:
    """One paragraph for each base model that `compare_sources` is about."""
    lines = ""
    for base, of_base in compared.items():
        best, parameters = of_base["best"], of_base["parameters"]
        others = "; ".join(
            f"from {source} ({parameters[source]:,} parameters) {loss['mean']:.1f} ± {loss['standard_error']:.1f} more"
            f"{'' if loss['mean'] > 2 * loss['standard_error'] else ', not to be told apart'}"
            for source, loss in of_base["loss"].items()
            if source != best
        )
        lines += (
            f"What to predict from, {base}, f = {of_base['stencil_size']}: -log p(x | z) is least from {best} "
            f"({parameters[best]:,} parameters); {others} (mean difference over images and its standard error, networks of one "
            "seed).\n\n"
        )
    return lines


def _quantiles(whitened: Tensor) -> dict[str, float]:
    """The values below which each share of `LEVELS` of the whitened residuals lies."""
    ordered = whitened.double().flatten().sort().values
    return {f"{level:g}": ordered[round(level * (len(ordered) - 1))].item() for level in LEVELS}


def _over_images(values: Tensor | None) -> dict[str, float] | None:
    if values is None:
        return None
    values = values.double()
    stddev = values.std().item() if len(values) > 1 else 0.0
    return {"mean": values.mean().item(), "stddev": stddev, "standard_error": stddev / math.sqrt(len(values))}


def _plus_minus(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.0f} ± {value['stddev']:.0f}"
