"""Gaussian noise of a stated strength, white or correlated, in images with values in [-1, 1]."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import banded_gmrf as bg
from banded_gmrf.inference.inferred_field import InferredField

_STENCIL = bg.Stencil.square(7)


@dataclass(frozen=True)
class Noise:
    """Noise added to images.

    Args:
        level: standard deviation in gray levels, of which there are 255 from black to white.
        correlation_length: in pixels, that of an exponential covariance; 0 for white noise. Correlated noise is the GMRF with a
            7 x 7 stencil nearest to that covariance.
    """

    level: float
    correlation_length: float = 0.0

    @property
    def name(self) -> str:
        """What tables call it."""
        kind = f"correlated over {self.correlation_length:g} pixels" if self.correlation_length else "white"
        return f"{kind}, σ = {self.level:g}/255"

    @property
    def stddev(self) -> float:
        """In units of images in [-1, 1]."""
        return self.level / 127.5

    def distribution(self, size: int, device: torch.device) -> bg.GMRF:
        """Correlated noise as a GMRF on size x size pixels."""

        def covariance(a: Tensor, b: Tensor) -> Tensor:
            distance = (a - b).double().square().sum(-1).sqrt()
            return self.stddev**2 * (-distance / self.correlation_length).exp()

        factor = bg.StencilCholesky.from_covariance(covariance, _STENCIL, (size, size))
        factor = bg.StencilCholesky(*(t.to(device, torch.float32) for t in (factor.log_diag, factor.off_diag)), _STENCIL)
        return bg.GMRF(torch.zeros(size, size, device=device), factor)

    def spectral_density(self, size: int) -> np.ndarray:
        """Of correlated noise, (size, size), for BM3D: n times the transform of the covariance on n pixels of a torus."""
        along = np.minimum(np.arange(size), size - np.arange(size))
        distance = np.hypot(along[:, None], along)
        covariance = self.stddev**2 * np.exp(-distance / self.correlation_length)
        return size**2 * np.fft.fft2(covariance).real


class Sampler:
    """Noise from standard normal numbers.

    Args:
        noise: which.
        size: pixels along each side of an image.
        device: where to.
    """

    def __init__(self, noise: Noise, size: int, device: torch.device):
        self.noise, self._size, self._device = noise, size, device

    @cached_property
    def distribution(self) -> bg.GMRF:
        """Of correlated noise."""
        return self.noise.distribution(self._size, self._device)

    def __call__(self, u: Tensor) -> Tensor:
        """Noise (..., size, size) from standard normal u of that shape."""
        if not self.noise.correlation_length:
            return self.noise.stddev * u
        return self.distribution.precision_cholesky.solve(u, transpose=True)

    def posterior(self, prior: bg.GMRF | bg.LowRankGMRF, observation: Tensor) -> InferredField:
        """``prior`` given ``observation`` (*batch, size, size) with this noise."""
        known = {"noise": self.distribution} if self.noise.correlation_length else {"noise_variance": self.noise.stddev**2}
        return prior.posterior(observation, **known)

    def posterior_mean(self, prior: bg.GMRF, observation: Tensor) -> Tensor:
        """The mean of `posterior`."""
        return self.posterior(prior, observation).mean
