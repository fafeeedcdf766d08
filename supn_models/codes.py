"""The code of an image that is seen in part or with noise, with what is not known of it."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from banded_gmrf.inference.low_rank_posterior import LowRankPosterior

from .layers import check_positive_int
from .likelihood import StructuredLikelihood
from .vae import ConvVAE

_SMALLEST_STEP = 2.0**-6


class InferredCode(NamedTuple):
    """What an observation says about a code, and about the image.

    Attributes:
        code: p(z | y) near its mode, batch (B,), events (latent_size,), in float64.
        image: p(x | y), batch (B,), events (*grid); with what is not known of the code, as factors.
        converged: bool (B,).
    """

    code: MultivariateNormal
    image: LowRankPosterior
    converged: Tensor


@torch.no_grad()
def infer_code(
    likelihood: StructuredLikelihood,
    observe: Callable[[bg.LowRankGMRF], LowRankPosterior],
    start: Tensor,
    *,
    max_iterations: int = 20,
    tolerance: float = 0.05,
) -> InferredCode:
    """Codes and images given observations of the images, by Laplace's approximation in the code.

    An encoder gives the code of a whole image without noise. Of half an image it gives a guess, as sure as of a whole one.
    Here the decoder is followed to first order around a code z₀: with its Jacobian J the image is

        x = μ(z₀) + J (z - z₀) + L(z₀)⁻ᵀu,   z ~ N(0, I),   u ~ N(0, I)

    which is a `banded_gmrf.LowRankGMRF` with the factors J. Given the observation, the mean of its weights z is a step of Gauss
    and Newton towards the mode of p(z | y), and at the mode their covariance is Laplace's. How L moves with the code is left
    out of a step, but not of the density that tells whether the step was a good one: one that lowers it is halved.

    Args:
        likelihood: of a `ConvVAE`, in evaluation mode. Where its covariance network has factors, these are taken along.
        observe: what was observed: ``lambda q: q.condition(mask, values)``, or ``lambda q: q.posterior(y, noise_variance=v)``.
            Each iteration takes one such posterior of the whole batch.
        start: codes (B, latent_size) to begin with, such as those of the images filled in.
        max_iterations: at least 1; if they do not suffice, it warns (RuntimeWarning).
        tolerance: an image has converged when the next step promises at most so many nats.

    Raises:
        TypeError: the likelihood is not that of a `ConvVAE`: the codes of an autoencoder have no prior; or ``observe`` does not
            give a posterior of what it was given.
        ValueError: codes of another shape, a batch of posteriors that is not that of the codes, a ``tolerance`` that is not
            positive, or a grid that is too large for a log evidence.
    """
    vae = likelihood.autoencoder
    if not isinstance(vae, ConvVAE):
        raise TypeError(f"likelihood is that of a {type(vae).__name__}, expected a ConvVAE, whose codes have a prior")
    check_positive_int("max_iterations", max_iterations)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected more than 0")
    latent_size = vae.config["latent_size"]
    if start.ndim != 2 or start.shape[1] != latent_size:
        raise ValueError(f"start has shape {tuple(start.shape)}, expected (batch, {latent_size})")

    code = kept = target = start
    best = start.new_full(start.shape[:1], -torch.inf, dtype=torch.float64)
    step, converged = torch.ones_like(best), torch.zeros_like(best, dtype=torch.bool)
    for _ in range(max_iterations):
        found, image = _step(likelihood, observe, code)
        density = image.log_evidence + found.log_prob(code.double())  # log p(y, z) at the code
        better = (density > best) | best.isneginf()
        kept, best = torch.where(better[:, None], code, kept), torch.where(better, density, best)
        target = torch.where(better[:, None], found.mean.to(code.dtype), target)
        step = torch.where(better, (2 * step).clamp(max=1), step / 2)
        move = (target - kept).double()
        promised = 0.5 * (move[:, None] @ found.precision_matrix @ move[:, :, None]).flatten()
        # Steps so short that are still too long: the linear decoder and the density do not agree on where to go.
        converged = (better & (promised <= tolerance)) | (step < _SMALLEST_STEP)
        if converged.all():
            break
        code = torch.where(converged[:, None], kept, kept + step[:, None].to(code.dtype) * move.to(code.dtype))
    else:
        warnings.warn(
            f"infer_code has not converged for {int((~converged).sum())} of {len(start)} images in {max_iterations} "
            f"iterations: the next step of one of them promises {promised[~converged].max().item():.3g} nats",
            RuntimeWarning,
            stacklevel=2,
        )
    if not torch.equal(code, kept):
        found, image = _step(likelihood, observe, kept)
    return InferredCode(found, image, converged)


def _step(
    likelihood: StructuredLikelihood, observe: Callable[[bg.LowRankGMRF], LowRankPosterior], code: Tensor
) -> tuple[MultivariateNormal, LowRankPosterior]:
    """Codes and images given the observations, the decoder linear around ``code``."""
    q = likelihood(code)
    jacobian = _jacobian(likelihood, code)
    loc = q.mean - torch.einsum("bl,bl...->b...", code, jacobian)
    factors = jacobian if isinstance(q, bg.GMRF) else torch.cat((jacobian, q.factors), 1)
    prior = bg.LowRankGMRF(loc, q.precision_cholesky, factors, validate_args=False)
    image = observe(prior)
    if not isinstance(image, LowRankPosterior):
        raise TypeError(f"observe gives {type(image).__name__}, expected a posterior of the distribution that it is given")
    if image.batch_shape != prior.batch_shape:
        raise ValueError(f"observe gives a batch {tuple(image.batch_shape)}, expected {tuple(prior.batch_shape)}")
    weights, latent_size = image.weights, code.shape[1]
    covariance = weights.covariance_matrix[:, :latent_size, :latent_size]
    return MultivariateNormal(weights.mean[:, :latent_size], covariance, validate_args=False), image


def _jacobian(likelihood: StructuredLikelihood, code: Tensor) -> Tensor:
    """The derivatives of the decoded means by each number of the code, (B, latent_size, *grid)."""

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(likelihood.autoencoder.decode, (code,), (direction.expand_as(code),))[1]

    directions = torch.eye(code.shape[1], dtype=code.dtype, device=code.device)
    return torch.func.vmap(along)(directions)[:, :, 0].movedim(0, 1)
