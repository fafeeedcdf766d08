"""Figures 1 and 7 to 10 of the SUPN paper for other images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import banded_gmrf as bg
from supn_models import ConvAutoencoder, StructuredLikelihood

from ..figures import Column, image_grid
from ..training import seeded_generator
from .presets import Config

GRAY = ("gray value", "gray", -1.0, 1.0)
_STEPS = 7


@torch.no_grad()
def draw(
    config: Config,
    folder: Path,
    bases: dict[str, ConvAutoencoder],
    likelihoods: dict[str, StructuredLikelihood],
    images: Tensor,
) -> None:
    """Write figure1.png and figure7.png to figure10.png into ``folder``: those whose base models the run has.

    Args:
        config: the run's.
        folder: where to.
        bases: by name.
        likelihoods: of all base models, by the names of their covariance networks.
        images: for testing, (count, 1, H, W); some, evenly spread, are shown.
    """
    reconstructing = [name for name in ("AE", "VAE") if name in bases]
    if reconstructing:
        draw_reconstructions(folder / "figure7.png", config, bases, likelihoods, reconstructing, spread(images, 6))
    if "VAE" in bases:
        draw_reconstructions(folder / "figure1.png", config, bases, likelihoods, ["VAE"], spread(images, 3))
        draw_interpolations(folder / "figure9.png", config, bases["VAE"], likelihoods, spread(images, 3))
        draw_variances(folder / "figure10.png", config, bases["VAE"], likelihoods, spread(images, 4))
    if "β-VAE" in bases:
        draw_prior_samples(folder / "figure8.png", config, likelihoods, images.device)


def draw_reconstructions(
    path: Path,
    config: Config,
    bases: dict[str, ConvAutoencoder],
    likelihoods: dict[str, StructuredLikelihood],
    names: Sequence[str],
    images: Tensor,
) -> None:
    """Figures 1 and 7: images, reconstructions, and reconstructions with samples of both residuals from the same noise."""
    noise = _noise(config, len(images), images)
    columns = [Column("image", gray(images), "gray")]
    residuals = []
    for name in names:
        diagonal, structured = (likelihoods[shown.name](bases[name].encode(images)) for shown in config.shown(name))
        mean, prefix = structured.mean, f"{name} " if len(names) > 1 else ""
        columns.append(Column(f"{prefix}mean", gray(mean), "gray"))
        residuals.append(gray(images[:, 0] - mean))
        columns.append(Column(f"{prefix}residual", residuals[-1], "residual"))
        for title, q in (("structured", structured), ("diagonal", diagonal)):
            sample = _coloured(q, noise)
            columns.append(Column(f"{prefix}mean +\n{title}", gray(mean + sample), "gray"))
            columns.append(Column(f"{prefix}{title}\nsample", gray(sample), "residual"))
    grid_by_scale(path, columns, {"gray": GRAY, "residual": residual_scale(torch.cat(residuals))})


def draw_prior_samples(path: Path, config: Config, likelihoods: dict[str, StructuredLikelihood], device: torch.device) -> None:
    """Figure 8: codes from the prior of the β-VAE, their means, and samples of the structured residual."""
    count = 6
    code = torch.randn(count, config.latent_size, generator=seeded_generator(config.seed, "prior samples")).to(device)
    diagonal, structured = (likelihoods[shown.name](code) for shown in config.shown("β-VAE"))
    noise = _noise(config, count, structured.mean)
    samples = _coloured(structured, noise)
    columns = [
        Column("mean", gray(structured.mean), "gray"),
        Column("mean +\nstructured", gray(structured.mean + samples), "gray"),
        Column("another\nsample", gray(structured.mean + _coloured(structured, noise.roll(1, 0))), "gray"),
        Column("mean +\ndiagonal", gray(diagonal.mean + _coloured(diagonal, noise)), "gray"),
        Column("structured\nsample", gray(samples), "residual"),
    ]
    grid_by_scale(path, columns, {"gray": GRAY, "residual": residual_scale(columns[-1].images)})


def draw_interpolations(
    path: Path, config: Config, base: ConvAutoencoder, likelihoods: dict[str, StructuredLikelihood], images: Tensor
) -> None:
    """Figure 9: codes between that of an image and that of its mirror image; one noise for all samples of a row."""
    structured = likelihoods[config.shown("VAE")[1].name]
    ends = base.encode(images), base.encode(images.flip(-1))
    noise = _noise(config, len(images), images)
    columns = []
    for step in range(_STEPS):
        q = structured(torch.lerp(*ends, step / (_STEPS - 1)))
        rows = torch.stack((q.mean, q.mean + _coloured(q, noise)), dim=1).flatten(0, 1)
        columns.append(Column(f"{step}/{_STEPS - 1}", gray(rows), "gray"))
    shown = torch.stack((images, images), dim=1).flatten(0, 1)
    columns = [
        Column("image", gray(shown), "gray"),
        *columns,
        Column("mirror\nimage", gray(shown.flip(-1)), "gray"),
    ]
    grid_by_scale(path, columns, {"gray": GRAY}, ["mean", "sample"] * len(images))


def draw_variances(
    path: Path, config: Config, base: ConvAutoencoder, likelihoods: dict[str, StructuredLikelihood], images: Tensor
) -> None:
    """Figure 10: standard deviations of each pixel, and samples, of the diagonal and of the structured residual."""
    noise = _noise(config, len(images), images)
    columns = [Column("image", gray(images), "gray")]
    for title, shown in zip(("diagonal", "structured"), config.shown("VAE"), strict=True):
        q = likelihoods[shown.name](base.encode(images))
        if title == "diagonal":
            columns.append(Column("mean", gray(q.mean), "gray"))
            residuals = gray(images[:, 0] - q.mean)
        columns += [
            Column(f"{title}\nst. dev.", gray(q.stddev), "stddev"),
            Column(f"{title}\nsample", gray(_coloured(q, noise)), "residual"),
            Column(f"mean +\n{title}", gray(q.mean + _coloured(q, noise)), "gray"),
        ]
    reach = torch.cat([column.images for column in columns if column.scale == "stddev"]).quantile(0.99).item()
    scales = {
        "gray": GRAY,
        "stddev": ("standard deviation", "magma", 0.0, reach),
        "residual": residual_scale(residuals),
    }
    grid_by_scale(path, columns, scales)


def spread(images: Tensor, count: int) -> Tensor:
    """``count`` images, or all if there are fewer, evenly spread."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def _noise(config: Config, count: int, like: Tensor) -> Tensor:
    """White noise (count, H, W), the same in all figures."""
    return torch.randn(count, config.size, config.size, generator=seeded_generator(config.seed, "figures")).to(like)


def _coloured(q: bg.GMRF, noise: Tensor) -> Tensor:
    """A sample of the residual: L⁻ᵀ of the noise."""
    return q.precision_cholesky.solve(noise, transpose=True)


def gray(images: Tensor) -> Tensor:
    """(count, H, W) on the CPU, from that or from (count, 1, H, W)."""
    return images.reshape(-1, *images.shape[-2:]).cpu()


def residual_scale(residuals: Tensor) -> tuple[str, str, float, float]:
    """Colours for residuals as large as these."""
    reach = residuals.abs().flatten().quantile(0.99).item()
    return ("residual", "RdBu_r", -reach, reach)


def grid_by_scale(
    path: Path, columns: list[Column], scales: dict[str, tuple[str, str, float, float]], row_labels: list[str] | None = None
) -> None:
    """`experiments.figures.image_grid` with columns of one scale side by side, above its colour bar."""
    columns = [column for scale in scales for column in columns if column.scale == scale]
    image_grid(path, columns, scales, row_labels or [""] * len(columns[0].images))
