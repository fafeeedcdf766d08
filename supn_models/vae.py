"""A variational autoencoder with a diagonal Gaussian likelihood."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from gmrf_kernels.checks import accumulate_dtype

from .autoencoder import ConvAutoencoder
from .layers import soft_bound

# Standard deviations within exp(±10): far beyond what images in any usual units need, and far within float32.
_MAX_LOG_VARIANCE = 20.0


class ConvVAE(ConvAutoencoder):
    """An autoencoder whose encoder and decoder give a mean and a log-variance for each number: q(z | x) and p(x | z).

    The prior p(z) is standard normal. `encode`, `decode` and the call itself give means, so that a covariance network explains
    the residual of a VAE as it does that of a `ConvAutoencoder`. Densities are float32 where the networks compute in less.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, and, for the factor β, Higgins et al., beta-VAE,
    ICLR 2017. As the base model, Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5.2, which leaves
    latent size and widths open.

    Args:
        grid, in_channels, latent_size, channels, kernel_size, norm: as for `ConvAutoencoder`, with defaults for 64 x 64 pixels.

    Raises:
        ValueError: as for `ConvAutoencoder`.
    """

    _outputs_per_value = 2

    def __init__(
        self,
        grid: Sequence[int],
        in_channels: int = 1,
        latent_size: int = 128,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        kernel_size: int = 5,
        norm: str = "batch",
    ):
        super().__init__(grid, in_channels, latent_size, channels, kernel_size, norm)

    def posterior(self, images: Tensor) -> Independent:
        """q(z | x) of images (B, in_channels, *grid): a diagonal Gaussian with batch (B,) and events (latent_size,)."""
        return _diagonal_gaussian(self.encoder(images))

    def likelihood(self, code: Tensor) -> Independent:
        """p(x | z) of codes (B, latent_size): a diagonal Gaussian with batch (B,) and events (in_channels, *grid)."""
        return _diagonal_gaussian(self.decoder(code))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, *grid) to the means of q(z | x), (B, latent_size)."""
        return self.posterior(images).mean

    def decode(self, code: Tensor) -> Tensor:
        """Codes (B, latent_size) to the means of p(x | z), (B, in_channels, *grid), in the units of the images."""
        return self.likelihood(code).mean

    @staticmethod
    def divergence(q: Independent) -> Tensor:
        """KL(q(z | x) | p(z)) in nats of a `posterior` q: (B,)."""
        # Written out: torch's kl_divergence looks up a formula by types, which torch.compile does not follow.
        return (0.5 * (q.mean.square() + q.variance - 1) - q.stddev.log()).sum(1)

    def loss(self, images: Tensor, beta: float = 1.0, noise: Tensor | None = None) -> Tensor:
        """-log p(x | z) + β KL(q(z | x) | p(z)) in nats, all constants included, with one z drawn from q(z | x) for each image.

        With β = 1 its expectation is an upper bound of -log p(x).

        Args:
            images: (B, in_channels, *grid).
            beta: weight of the divergence.
            noise: (B, latent_size), standard normal, of which z is made; None to draw it.

        Returns:
            (B,).

        Raises:
            ValueError: images or noise of another shape.
        """
        q = self.posterior(images)
        if noise is None:
            noise = torch.randn_like(q.mean)
        elif noise.shape != q.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(q.mean.shape)}")
        return beta * self.divergence(q) - self.likelihood(q.mean + q.stddev * noise).log_prob(images)


def _diagonal_gaussian(mean_and_log_variance: Tensor) -> Independent:
    """The Gaussian of parameters (B, 2 C, *grid): batch (B,), events (C, *grid)."""
    mean, log_variance = mean_and_log_variance.to(accumulate_dtype(mean_and_log_variance.dtype)).chunk(2, dim=1)
    stddev = (soft_bound(log_variance, _MAX_LOG_VARIANCE) / 2).exp()
    # Not validated: the checks would make a GPU wait, and parameters that are not finite show in the densities.
    return Independent(Normal(mean, stddev, validate_args=False), mean.ndim - 1, validate_args=False)
