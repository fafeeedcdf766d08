"""Errors of estimates, and the tables of the experiment."""

from typing import Any

import numpy as np
from skimage.metrics import structural_similarity
from torch import Tensor

from programs.tables import markdown_table

from ..results import data_text, where_text
from .estimators import BM3D, DENOISER, INFERRED_POSTERIOR, PROJECTION
from .inpainting import LEVELS
from .presets import Config

# Table 4 of the paper, mean squared error and its deviation over images.
PAPER = {DENOISER: (5.13e-3, 2.52e-3), PROJECTION: (2.99e-3, 7.98e-4)}


def table_rows(images: Tensor, estimates: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far estimates of images in [-1, 1] are from them, black being 0 and white 1.

    Mean squared error with its deviation over images, and its ratio to the denoising autoencoder's on the same images; peak
    signal-to-noise ratio in dB and structural similarity with the Gaussian window of Wang et al. (IEEE Transactions on Image
    Processing 2004), both means over images.

    Args:
        images: (count, 1, height, width).
        estimates: by name, of all images or of the first ones.
    """
    images = _unit_range(images)
    bar = np.square(images - _unit_range(estimates[DENOISER])).mean((1, 2))
    return {name: _row(images[: len(found)], _unit_range(found), bar[: len(found)]) for name, found in estimates.items()}


def _unit_range(images: Tensor) -> np.ndarray:
    return (images[:, 0].double().cpu().numpy() + 1) / 2


def _row(images: np.ndarray, estimates: np.ndarray, bar: np.ndarray) -> dict[str, float]:
    squared = np.square(images - estimates).mean((1, 2))
    window = min(11, images.shape[-1] // 2 * 2 - 1)
    similarity = [
        structural_similarity(
            image,
            estimate,
            data_range=1.0,
            win_size=window,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for image, estimate in zip(images, estimates, strict=True)
    ]
    return {
        "images": len(images),
        "mse": squared.mean().item(),
        "mse_stddev": squared.std(ddof=1).item() if len(images) > 1 else 0.0,
        "ratio": (squared.mean() / bar.mean()).item(),
        "psnr": (-10 * np.log10(squared)).mean().item(),
        "ssim": np.mean(similarity).item(),
    }


def markdown_report(config: Config, results: dict[str, Any]) -> str:
    """The tables, and what is needed to read them."""
    faces, seconds = config.faces, results["seconds"]
    what = "Denoising and inpainting" if config.noises else "Inpainting"
    parts = [f"# {what} of {faces.data}, {faces.size} x {faces.size} pixels\n"]
    for noise, rows in results["denoising"].items():
        parts += [f"## {noise[0].upper()}{noise[1:]}\n", _table(rows)]
    if config.noises:
        paper = [[name, f"{1e3 * mean:.2f} ± {1e3 * stddev:.2f}"] for name, (mean, stddev) in PAPER.items()]
        ratio = PAPER[PROJECTION][0] / PAPER[DENOISER][0]
        parts += [
            "## The paper's, on CelebA, noise not stated\n",
            markdown_table(["", "MSE x 1000"], paper),
            f"Ratio {ratio:.2f}.\n",
        ]
    parts += [
        "## Inpainting: mean squared error x 1000 of the unknown pixels\n",
        _inpainting_table(results["inpainting"]),
        f"{faces.data}: {faces.note}. The first {config.images:,} test images, without dequantisation noise; black is 0 and "
        f"white 1 in errors; nothing is clipped.{data_text(results)}\n",
    ]
    if config.noises:
        parts += [
            f"MSE is mean ± standard deviation over images; the ratio is that of means to the {DENOISER}'s. {BM3D} and "
            f"{INFERRED_POSTERIOR}: the first {config.slow_images:,} of them; their ratio is to the {DENOISER} on the same "
            "ones. PSNR and SSIM are means over images.\n",
            f"The VAE and its covariance networks never saw noise; code and Σ come from the noisy image. {PROJECTION}: of the "
            f"residual on the {config.eigenvectors:,} leading eigenvectors of Σ (f = 7, from z), by a polynomial of degree "
            f"{config.degree:,}. Posterior mean: Wiener filter with the known noise; encoded again: with code and Σ from the "
            "first posterior mean; code inferred: with the code's posterior given the noisy image, by Laplace, of which the "
            f"decoder's derivatives make a low-rank term. The {DENOISER} has the VAE's widths and code and was trained on the "
            f"same images {_passes(config)}, with mean squared error and with the noise of each table.\n",
        ]
    parts += [
        f"Inpainting: the first {config.inpainted:,} test images; codes from the image filled in, {config.rounds} rounds, and "
        "taken for known; or inferred from there, given the known pixels. Coverage is the share of unknown pixels within "
        f"intervals of 50, 90 and 99 %.{_not_converged_text(results)}\n",
        f"Training images {faces.base_images:,} and their mirror images, {'at most ' if faces.patience else ''}"
        f"{faces.base_epochs} passes; networks "
        f"{'of a finished run of faces' if config.checkpoint else 'trained in this run'}, preset {faces.preset}, seed "
        f"{faces.seed}; `{results['command']}`, training {seconds['training']:.0f} s, all else {seconds['evaluation']:.0f} s"
        f" on {where_text(results)}.\n",
    ]
    return "\n".join(parts)


def _not_converged_text(results: dict[str, Any]) -> str:
    """For how many images the search for the code has not converged; nothing for results that do not say it."""
    key, tables = "not_converged", {**results["denoising"], **results["inpainting"]}
    counts = {title: row[key] for title, rows in tables.items() for row in rows.values() if key in row}
    told = "; ".join(f"{title}, {count}" for title, count in counts.items() if count) or "none"
    return f" Images for which the search for the code had not converged after its last iteration: {told}." if counts else ""


def _passes(config: Config) -> str:
    """How long the denoising autoencoders were trained."""
    if config.denoiser_epochs is not None:
        return f"for {config.denoiser_epochs} passes, at a rate that falls by a cosine"
    if config.faces.patience is not None:
        return f"for at most {config.faces.base_epochs} passes, ended by its own loss of validation images"
    return "for as many steps"


def _table(rows: dict[str, dict[str, Any]]) -> str:
    table = [
        [
            name,
            f"{1e3 * row['mse']:.2f} ± {1e3 * row['mse_stddev']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.3f}",
        ]
        for name, row in rows.items()
    ]
    return markdown_table(["", "MSE x 1000", "ratio", "PSNR", "SSIM"], table)


def _inpainting_table(masks: dict[str, dict[str, dict[str, float]]]) -> str:
    table = [
        [
            mask if number == 0 else "",
            name,
            *(f"{1e3 * row[key]:.2f}" if key in row else "" for key in ("mse", "mse_of_a_sample")),
            *(f"{row[f'coverage_{level:g}']:.3f}" if len(row) > 1 else "" for level in LEVELS),
        ]
        for mask, rows in masks.items()
        for number, (name, row) in enumerate(rows.items())
    ]
    header = ["missing", "completed by", "mean", "one sample", *(f"in {level:.0%}" for level in LEVELS)]
    return markdown_table(header, table, text_columns=2)
