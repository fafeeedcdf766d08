"""A picture of the means and samples of each row."""

from pathlib import Path

import torch
from torch import Tensor

from supn_models import ConvVAE, StructuredLikelihood

from ..faces.figures import GRAY, gray, grid_by_scale, residual_scale, spread
from ..figures import Column
from ..training import derived_seed

_IMAGES = 4


@torch.no_grad()
def draw_rows(path: Path, vae: ConvVAE, likelihoods: dict[str, StructuredLikelihood], images: Tensor, seed: int) -> None:
    """Images, every mean that there is and what it misses, and a sample of each row, all from the same noise.

    Args:
        path: PNG file to write.
        vae: the frozen one.
        likelihoods: by the names of rows, behind that VAE or one of their own.
        images: for testing, (count, 1, H, W); some, evenly spread, are shown.
        seed: of the noise.
    """
    images = spread(images, _IMAGES)
    columns, residuals = [Column("image", gray(images), "gray")], []

    def show_mean(title: str, mean: Tensor) -> None:
        columns.append(Column(f"{title}\nmean", gray(mean), "gray"))
        residuals.append(Column(f"{title}\nresidual", gray(images - mean), "residual"))

    show_mean("frozen", vae(images))
    for name, likelihood in likelihoods.items():
        title = name.replace(" with the mean", "").replace(", ", ",\n").replace(" + ", "\n+ ")
        q = likelihood(likelihood.autoencoder.encode(images))
        if likelihood.autoencoder is not vae:
            show_mean(title, q.mean[:, None])
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(derived_seed(seed, "samples of rows"))
            columns.append(Column(f"{title}\nsample", gray(q.sample()), "gray"))
    scales = {"gray": GRAY, "residual": residual_scale(torch.cat([column.images for column in residuals]))}
    grid_by_scale(path, [*columns, *residuals], scales)
