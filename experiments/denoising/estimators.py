"""Estimates of images from noisy ones."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import banded_gmrf as bg
from banded_gmrf.inference.low_rank_posterior import LowRankPosterior
from supn_models import ConvAutoencoder, InferredCode, StructuredLikelihood, infer_code

from .noise import Sampler
from .presets import Config

DENOISER, VAE, PROJECTION = "denoising autoencoder", "VAE", "projection"
DIAGONAL_POSTERIOR, POSTERIOR, SECOND_POSTERIOR = "posterior mean, diagonal", "posterior mean", "posterior mean, encoded again"
INFERRED_POSTERIOR = "posterior mean, code inferred"
BM3D = "BM3D"

# Images (count, 1, height, width) to estimates of them.
Estimator = Callable[[Tensor], dict[str, Tensor]]


def estimator(
    config: Config,
    denoiser: ConvAutoencoder,
    diagonal: StructuredLikelihood,
    structured: StructuredLikelihood,
    sampler: Sampler,
) -> Estimator:
    """All estimates but those of `inferred_estimates` and `bm3d_estimates`, by name.

    Args:
        config: the run's.
        denoiser: an autoencoder trained with this noise.
        diagonal, structured: the VAE, which never saw noise, with both covariance networks.
        sampler: the noise.
    """
    vae = structured.autoencoder

    @torch.no_grad()
    def estimates(noisy: Tensor) -> dict[str, Tensor]:
        code, y = vae.encode(noisy), noisy[:, 0]
        q = structured(code)
        leading = q.project_on_leading(y - q.mean, config.eigenvectors, config.degree)
        first = sampler.posterior_mean(q, y)
        found = {
            DENOISER: denoiser(noisy)[:, 0],
            VAE: q.mean,
            PROJECTION: q.mean + leading,
            DIAGONAL_POSTERIOR: sampler.posterior_mean(diagonal(code), y),
            POSTERIOR: first,
            SECOND_POSTERIOR: sampler.posterior_mean(structured(vae.encode(first[:, None])), y),
        }
        return {name: image[:, None] for name, image in found.items()}

    return estimates


def inferred(
    likelihood: StructuredLikelihood, observe: Callable[[bg.LowRankGMRF], LowRankPosterior], start: Tensor
) -> InferredCode:
    """`supn_models.infer_code`, which does not warn: tables say for how many images the search has not converged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "infer_code has not converged", RuntimeWarning)
        return infer_code(likelihood, observe, start)


def inferred_estimates(noisy: Tensor, likelihood: StructuredLikelihood, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Posterior means of images (count, 1, height, width) with codes inferred from the noisy images, and which have converged.

    Args:
        noisy: few images: all are in memory with the decoder's derivatives.
        likelihood: the VAE, which never saw noise, with its structured covariance network.
        sampler: the noise.
    """
    y = noisy[:, 0]
    start = likelihood.autoencoder.encode(noisy)
    found = inferred(likelihood, lambda q: sampler.posterior(q, y), start)
    return found.image.mean[:, None], found.converged


def bm3d_estimates(noisy: Tensor, sampler: Sampler) -> Tensor:
    """Block matching and 3-D filtering of images (count, 1, height, width).

    It knows the variance of white noise, and of correlated noise the spectral density on a torus.

    Source: Mäkinen, Azzari and Foi, Collaborative filtering of correlated noise, IEEE Transactions on Image Processing 2020.

    Raises:
        ImportError: the package bm3d is not installed.
    """
    from bm3d import bm3d

    # bm4d 4.2.5, under bm3d, calls it for a spectrum; numpy 2.4 has it by its new name alone.
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # noqa: NPY201
    noise = sampler.noise
    # Black 0 and white 1, for which its thresholds are made.
    spectrum = noise.spectral_density(noisy.shape[-1]) / 4 if noise.correlation_length else noise.stddev / 2
    images = (noisy[:, 0].double().cpu().numpy() + 1) / 2
    found = np.stack([bm3d(image, spectrum) for image in images])
    return 2 * torch.from_numpy(found)[:, None].to(noisy) - 1
