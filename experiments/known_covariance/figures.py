"""Figures 3 to 6 of the SUPN paper on the signals of `signals`: reconstructions with samples, and covariances."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supn_models import CovarianceMLP

from ..figures import Column, coverage_figure, image_grid, line_grid
from ..training import seeded_generator
from .presets import Config
from .report import COVERAGE_LEVELS
from .scores import Examples, factor_of_truth

_EXAMPLES = 4
_SAMPLES = 3


@torch.no_grad()
def draw(config: Config, networks: dict[str, CovarianceMLP], test: Examples, rows: dict[str, Any], folder: Path) -> None:
    """Write reconstructions.png, covariances.png and coverage.png into ``folder``.

    Args:
        config: the run's.
        networks: on the CPU; those of the first seeds are shown, of images only the diagonal ones and those with f = 5.
        test: the first few signals are shown.
        rows: what `report.summarise` gives.
        folder: where to.
    """
    latents, means, x = (part[:_EXAMPLES].cpu() for part in (test.latents, test.means, test.x))
    factors = {"truth": factor_of_truth(config.signals.covariance(latents))}
    for model in config.models:
        if model.stencil in ("diagonal", 5) or len(config.signals.grid) == 1:
            factors[model.name] = networks[model.network_name(0)](means).to_dense().double()
    noise = torch.randn(
        (_SAMPLES, *means.flatten(1).shape), generator=seeded_generator(config.seed, "figures"), dtype=torch.float64
    )
    samples = {name: means + _colour(factor, noise).reshape(-1, *means.shape) for name, factor in factors.items()}
    draw_reconstructions = _draw_signals if means.ndim == 2 else _draw_images
    draw_reconstructions(folder / "reconstructions.png", means, x, samples)
    _draw_covariances(
        folder / "covariances.png", config.signals.grid, {name: torch.cholesky_inverse(L) for name, L in factors.items()}
    )
    shown = {name: row["coverage"] for name, row in rows.items() if not name.startswith("floor")}
    coverage_figure(folder / "coverage.png", COVERAGE_LEVELS, shown)


def _wrapped(title: str) -> str:
    # No line break within "f = 5" or "sample 1".
    return textwrap.fill(title.replace(" = ", "\u00a0=\u00a0").replace("sample ", "sample\u00a0"), width=13)


def _colour(factor: Tensor, noise: Tensor) -> Tensor:
    """Samples L⁻ᵀu: (samples, B, n) of factors (B, n, n) and white noise (samples, B, n)."""
    return torch.linalg.solve_triangular(factor.mT, noise[..., None], upper=True)[..., 0]


def _draw_signals(path: Path, means: Tensor, x: Tensor, samples: dict[str, Tensor]) -> None:
    """Each row an example: the mean with the signal it was drawn for, and with samples of each covariance."""
    panels = {"mean and signal": x[None], **{f"{name}: samples": values for name, values in samples.items()}}
    line_grid(path, means, panels, "point")


def _draw_images(path: Path, means: Tensor, x: Tensor, samples: dict[str, Tensor]) -> None:
    """Each row an example: the mean, the image that was drawn for it, and two samples of each covariance."""
    columns = [Column("mean", means, "gray"), Column("image", x, "gray")]
    for name, values in samples.items():
        columns += [Column(_wrapped(f"{name}: sample {i + 1}"), values[i], "gray") for i in range(2)]
    low, high = x.quantile(0.005).item(), x.quantile(0.995).item()
    image_grid(path, columns, {"gray": ("gray value", "gray", low, high)}, [f"example {i + 1}" for i in range(len(means))])


def _draw_covariances(path: Path, grid: tuple[int, ...], covariances: dict[str, Tensor]) -> None:
    """Each row an example: the matrices, and for images also the covariances of one pixel with all others."""
    columns = [Column(_wrapped(name), covariance, "matrix") for name, covariance in covariances.items()]
    reach = covariances["truth"].abs().quantile(0.999).item()
    scales = {"matrix": ("covariance", "RdBu_r", -reach, reach)}
    if len(grid) == 2:
        variances = covariances["truth"].diagonal(dim1=-2, dim2=-1)
        sites = variances.argmax(1)
        examples = torch.arange(len(sites))
        columns += [
            Column(_wrapped(f"{name}: one pixel"), covariance[examples, sites].reshape(-1, *grid), "pixel")
            for name, covariance in covariances.items()
            if name != "diagonal"
        ]
        highest = variances.max().item()
        scales["pixel"] = ("covariance with the pixel of highest variance", "RdBu_r", -highest, highest)
    image_grid(path, columns, scales, [f"example {i + 1}" for i in range(len(covariances["truth"]))])
