"""Likelihoods of images: given a code, with a structured residual; and without one, by importance sampling over codes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import banded_gmrf as bg

from .autoencoder import ConvAutoencoder
from .covariance import CovarianceNetwork, LatentCovarianceNetwork
from .layers import check_evaluation, check_positive_int, unwrapped


class StructuredLikelihood(nn.Module):
    """p(x | z) = N(μ(z), (L Lᵀ)⁻¹): the mean of an autoencoder with the covariance that a network predicts.

    A network with ``num_factors`` adds its low-rank part to the covariance.

    Args:
        autoencoder: gives μ(z) for images of one channel; a `ConvVAE`, too.
        covariance: gives L from the mean, from the code, or from both. It may be compiled or distributed.

    Raises:
        TypeError: other networks.
        ValueError: an autoencoder for images of several channels.
    """

    def __init__(self, autoencoder: ConvAutoencoder, covariance: CovarianceNetwork | LatentCovarianceNetwork):
        super().__init__()
        if not isinstance(autoencoder, ConvAutoencoder):
            raise TypeError(f"autoencoder is a {type(autoencoder).__name__}, expected a ConvAutoencoder or a ConvVAE")
        inner = unwrapped(covariance)
        if not isinstance(inner, CovarianceNetwork | LatentCovarianceNetwork):
            raise TypeError(
                f"covariance is a {type(inner).__name__}, expected a CovarianceNetwork or a LatentCovarianceNetwork"
            )
        if autoencoder.config["in_channels"] != 1:
            raise ValueError(f"autoencoder has {autoencoder.config['in_channels']} image channels, expected 1")
        self.autoencoder, self.covariance = autoencoder, covariance

    def forward(self, code: Tensor) -> bg.GMRF | bg.LowRankGMRF:
        """Codes (B, latent_size) to a `banded_gmrf.GMRF`, or a `banded_gmrf.LowRankGMRF` if the network has factors.

        Its batch is (B,), its events (*grid): images without their channel.
        """
        return self.around(code, self.autoencoder.decode(code))

    def around(self, code: Tensor, mean: Tensor) -> bg.GMRF | bg.LowRankGMRF:
        """The distribution for codes (B, latent_size) and the means (B, 1, *grid) that the autoencoder decodes them to."""
        predicted = self._predicted(code, mean)
        # Not validated: a check of every coefficient would make a GPU wait, and one that is not finite shows in the densities.
        if isinstance(predicted, tuple):
            return bg.LowRankGMRF(mean[:, 0], *predicted, validate_args=False)
        return bg.GMRF(mean[:, 0], predicted, validate_args=False)

    def factor(self, code: Tensor, mean: Tensor) -> bg.StencilCholesky:
        """L for codes (B, latent_size) and the means (B, 1, *grid) that the autoencoder decodes them to."""
        predicted = self._predicted(code, mean)
        return predicted[0] if isinstance(predicted, tuple) else predicted

    def _predicted(self, code: Tensor, mean: Tensor) -> bg.StencilCholesky | tuple[bg.StencilCholesky, Tensor]:
        from_mean_alone = isinstance(unwrapped(self.covariance), CovarianceNetwork)
        return self.covariance(mean) if from_mean_alone else self.covariance(code, mean)


@torch.no_grad()
def importance_log_weights(
    images: Tensor,
    posterior: Distribution,
    likelihood: Callable[[Tensor], Distribution],
    num_samples: int,
    *,
    chunk_size: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(x | z) p(z) / q(z | x) in nats for codes z drawn from q(z | x), p(z) standard normal.

    Args:
        images: (B, channels, *grid).
        posterior: q(z | x), normal with independent components, batch (B,), events (latent_size,); from `ConvVAE.posterior`.
        likelihood: codes (N, latent_size) to p(x | z) with batch (N,) and events (channels, *grid), or (*grid) for one channel:
            ``vae.likelihood``, or a `StructuredLikelihood`; in evaluation mode.
        num_samples: codes per image, S.
        chunk_size: pairs of an image and a code whose likelihood is computed at one time. The memory is that of so many factors
            and of the networks that predict them, besides the B x S codes; the result is the same up to rounding.
        generator: draws the codes, on the device of ``posterior``.

    Returns:
        (B, S), float64.

    Raises:
        ValueError: numbers out of range, shapes that do not fit, or batch normalisation or dropout in training mode.
    """
    network = getattr(likelihood, "__self__", likelihood)
    if isinstance(network, nn.Module):
        check_evaluation("likelihood", network)
    check_positive_int("num_samples", num_samples)
    check_positive_int("chunk_size", chunk_size)
    mean, stddev = posterior.mean, posterior.stddev
    if mean.ndim != 2 or len(mean) != len(images):
        raise ValueError(f"posterior has mean {tuple(mean.shape)}, expected (batch, latent_size) with batch {len(images)}")
    if len(images) == 0:  # of which torch's Independent has no log_prob
        return mean.new_empty((0, num_samples), dtype=torch.float64)
    shape = (len(images), num_samples, mean.shape[1])
    noise = torch.randn(shape, dtype=mean.dtype, device=mean.device, generator=generator)
    codes = mean[:, None] + stddev[:, None] * noise
    # log p(z) / q(z | x), in which the constants of the two densities cancel.
    log_ratio = (noise.double().square() - codes.double().square()).sum(-1) / 2 + stddev.double().log().sum(-1, keepdim=True)
    rows = torch.arange(len(images), device=images.device).repeat_interleave(num_samples)
    pairs = zip(rows.split(chunk_size), codes.flatten(0, 1).split(chunk_size), strict=True)
    log_likelihood = [_log_prob(likelihood(chunk), images[row]) for row, chunk in pairs]
    return log_ratio + torch.cat(log_likelihood).double().reshape(shape[:2])


def importance_log_likelihood(
    images: Tensor,
    posterior: Distribution,
    likelihood: Callable[[Tensor], Distribution],
    num_samples: int,
    *,
    chunk_size: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A lower bound of log p(x) in nats, by importance sampling: the logarithm of the mean of `importance_log_weights`.

    A bound in expectation over the codes, the tighter the more of them, and exact where q(z | x) is the true posterior.

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, equation 8.

    Args:
        images, posterior, likelihood, num_samples, chunk_size, generator: as for `importance_log_weights`.

    Returns:
        (B,), float64.

    Raises:
        ValueError: as for `importance_log_weights`.
    """
    log_weights = importance_log_weights(images, posterior, likelihood, num_samples, chunk_size=chunk_size, generator=generator)
    return log_weights.logsumexp(1) - math.log(num_samples)


def _log_prob(distribution: Distribution, images: Tensor) -> Tensor:
    """log p of images (N, channels, *grid), (N,); events of the distribution may lack a single channel."""
    event = distribution.event_shape
    if images.shape[1:] not in (event, (1, *event)):
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (batch, {', '.join(map(str, event))})")
    return distribution.log_prob(images.reshape(len(images), *event))
