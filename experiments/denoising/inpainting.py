"""Unknown pixels of faces from the others, by conditioning a structured residual on what is known."""

from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

from supn_models import StructuredLikelihood

from ..training import seeded_generator
from .presets import Config

# Draws of each image, from which the standard deviations of the unknown pixels are estimated.
DRAWS = 32
_BATCH = 50
# Of Student's t: standard deviations are estimated from the draws.
_QUANTILE_95 = scipy.stats.t.ppf(0.95, DRAWS - 1)


@dataclass(frozen=True)
class Inpainted:
    """Images of which some pixels are unknown, completed.

    Args:
        vae: the VAE's own completion, (count, height, width).
        mean: the conditional mean.
        samples: (DRAWS, count, height, width) of the same distribution.
    """

    vae: Tensor
    mean: Tensor
    samples: Tensor


def masks(config: Config) -> dict[str, Tensor]:
    """Bool (count or 1, size, size), true where a pixel is known."""
    size, count = config.faces.size, config.inpainted
    half, block = torch.ones(2, 1, size, size, dtype=torch.bool)
    half[..., size // 2 :] = False
    edge = 3 * size // 16
    block[..., size // 2 - edge : size // 2 + edge, size // 2 - edge : size // 2 + edge] = False
    scattered = torch.rand(count, size, size, generator=seeded_generator(config.faces.seed, "missing pixels")) < 0.1
    return {
        "right half missing": half,
        f"block of {2 * edge} x {2 * edge} missing": block,
        "90 % missing": scattered,
    }


@torch.no_grad()
def inpaint(config: Config, likelihood: StructuredLikelihood, average: Tensor, images: Tensor, known: Tensor) -> Inpainted:
    """Complete images.

    The code of an image with unknown pixels is that of the image filled in: with the average image at first, then with what was
    found, ``config.rounds`` times; with the conditional mean, or with the VAE's mean alone.

    Args:
        config: the run's.
        likelihood: the VAE with its structured covariance network.
        average: of the training images, (height, width).
        images: (count, 1, height, width), of which the known pixels are read.
        known: bool (count, height, width).
    """
    parts = [
        _inpaint(config, likelihood, average, *part) for part in zip(images.split(_BATCH), known.split(_BATCH), strict=True)
    ]
    return Inpainted(*(torch.cat([getattr(part, key) for part in parts], -3) for key in ("vae", "mean", "samples")))


def _inpaint(config: Config, likelihood: StructuredLikelihood, average: Tensor, images: Tensor, known: Tensor) -> Inpainted:
    image, vae = images[:, 0], likelihood.autoencoder
    plain = conditional = image.where(known, average)
    for _ in range(config.rounds):
        plain = image.where(known, vae(plain[:, None])[:, 0])
        q = likelihood(vae.encode(conditional[:, None])).condition(known, image)
        conditional = q.mean
    return Inpainted(plain, conditional, q.sample((DRAWS,)))


def scores(images: Tensor, known: Tensor, average: Tensor, found: Inpainted) -> dict[str, float]:
    """Mean squared errors of the unknown pixels, black being 0 and white 1, and the share of them in 90 % intervals."""
    unknown, image = ~known, images[:, 0]

    def error(estimate: Tensor) -> float:
        return (estimate - image).square()[unknown].mean().item() / 4

    inside = (image - found.mean).abs() <= _QUANTILE_95 * found.samples.std(0)
    return {
        "average face": error(average.expand_as(image)),
        "VAE": error(found.vae),
        "conditional mean": error(found.mean),
        "one sample": error(found.samples[0]),
        "coverage": inside[unknown].double().mean().item(),
    }
