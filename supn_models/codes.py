"""The code of an image that is seen in part or with noise, with what is not known of it."""

import warnings
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import banded_gmrf as bg
from banded_gmrf.inference.low_rank_posterior import LowRankPosterior
from banded_gmrf.transformations import without_autocast
from banded_gmrf.validation import check_finite
from gmrf_kernels.checks import check_device, check_dtype, check_tensor

from .layers import check_evaluation, check_positive_int
from .likelihood import StructuredLikelihood
from .vae import ConvVAE


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
    max_iterations: int = 10,
    tolerance: float = 0.5,
) -> InferredCode:
    """Codes and images given observations of the images, by Laplace's approximation in the code.

    An encoder gives the code of a whole image without noise. Of half an image it gives a guess, as sure as of a whole one.
    Here the decoder is followed to first order around a code z₀: with its Jacobian J the image is::

        x = μ(z₀) + J (z - z₀) + L(z₀)⁻ᵀu,   z ~ N(0, I),   u ~ N(0, I)

    which is a `banded_gmrf.LowRankGMRF` with the factors J. Given the observation, the mean of its weights z is a step of Gauss
    and Newton, and at the last code their covariance is Laplace's. L is held fixed within a step and taken anew at the next, as
    in iteratively reweighted least squares: the codes are those whose mean fits, not those of which L makes the observation
    likely. A step is halved if the one after it is larger in standard deviations of the code (the natural monotonicity test:
    Deuflhard, Newton Methods for Nonlinear Problems, 2004).

    Args:
        likelihood: of a `ConvVAE`, in evaluation mode, in float32 or float64. Where its covariance network has factors, these
            are taken along.
        observe: what was observed: ``lambda q: q.condition(mask, values)``, or ``lambda q: q.posterior(y, noise_variance=v)``.
            Each iteration takes one such posterior of the whole batch.
        start: codes (B, latent_size) to begin with, such as those of the images filled in; of the networks' dtype.
        max_iterations: at least 1; if they do not suffice, it warns (RuntimeWarning).
        tolerance: an image has converged when the next step promises at most so many nats.

    Raises:
        TypeError: the likelihood is not that of a `ConvVAE`: the codes of an autoencoder have no prior; another dtype; or
            ``observe`` does not give a posterior of what it was given.
        ValueError: batch normalisation or dropout in training mode, codes of another shape or device or with NaN, a batch of
            posteriors that is not that of the codes, or a ``tolerance`` that is not positive.
    """
    if not isinstance(likelihood, StructuredLikelihood):
        raise TypeError(f"likelihood is a {type(likelihood).__name__}, expected a StructuredLikelihood")
    vae = likelihood.autoencoder
    if not isinstance(vae, ConvVAE):
        raise TypeError(f"likelihood is that of a {type(vae).__name__}, expected a ConvVAE, whose codes have a prior")
    check_evaluation("likelihood", likelihood)
    check_positive_int("max_iterations", max_iterations)
    if not isinstance(tolerance, Real):
        raise TypeError(f"tolerance is {tolerance!r}, expected a number")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected more than 0")
    check_tensor("start", start)
    latent_size = vae.config["latent_size"]
    if start.ndim != 2 or start.shape[1] != latent_size:
        raise ValueError(f"start has shape {tuple(start.shape)}, expected (batch, {latent_size})")
    weight = next(likelihood.parameters())
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"likelihood is {weight.dtype}, expected float32 or float64: steps of a code are lost in rounding")
    check_dtype("start", start, "likelihood", weight)
    check_device("start", start, "likelihood", weight)
    check_finite("start", start)
    with without_autocast(start):
        return _infer(likelihood, observe, start, max_iterations, tolerance)


def _infer(
    likelihood: StructuredLikelihood,
    observe: Callable[[bg.LowRankGMRF], LowRankPosterior],
    start: Tensor,
    max_iterations: int,
    tolerance: float,
) -> InferredCode:
    """`infer_code` of what was checked."""
    code = kept = start
    move = torch.zeros_like(start, dtype=torch.float64)
    promised = torch.full_like(move[:, 0], torch.inf)
    step = torch.ones_like(promised)
    for _ in range(max_iterations):
        found, image = _step(likelihood, observe, code)
        here = found.mean - code.double()
        nats = 0.5 * (here[:, None] @ found.precision_matrix @ here[:, :, None]).flatten()
        better = (nats < promised) & (promised > tolerance)
        kept = torch.where(better[:, None], code, kept)
        move = torch.where(better[:, None], here, move)
        step = torch.where(better, (2 * step).clamp(max=1), step / 2)
        promised = torch.where(better, nats, promised)
        converged = promised <= tolerance
        if converged.all():
            break
        onwards = kept + (step[:, None] * move).to(kept.dtype)
        code = torch.where(converged[:, None], kept, onwards)
    else:
        warnings.warn(
            f"infer_code has not converged for {int((~converged).sum())} of {len(start)} images in {max_iterations} "
            f"iterations: the next step of one of them promises {promised.max().item():.3g} nats",
            RuntimeWarning,
            stacklevel=4,  # `infer_code`, which `torch.no_grad` has wrapped, was called there
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
    # Validated as torch's default is: it is for the observations, which a user gives.
    prior = bg.LowRankGMRF(loc, q.precision_cholesky, factors)
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
