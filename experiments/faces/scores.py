"""Score the likelihoods of test images: -log p(x | z), the bound of -log p(x), and how white whitened residuals are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

import banded_gmrf as bg
from supn_models import ConvAutoencoder, ConvVAE, importance_log_likelihood

from .. import distributed
from ..training import derived_seed
from .presets import Config

# Images at a time. Part of the configuration in all but name: the codes of the bound are drawn for each batch.
_BATCH = 20

Likelihood = Callable[[Tensor], Distribution]


@dataclass(frozen=True)
class Scores:
    """For each of B test images.

    Args:
        nats: -log p(x | z), z the mean of the encoder: (B,) in nats.
        whitened: L_z^T (x - μ(z)), or (x - μ(z)) / σ(z) of a diagonal likelihood, standard normal under it: (B, H, W).
        bound: an upper bound of -log p(x) in nats of the first images; None for an autoencoder without a prior.
    """

    nats: Tensor
    whitened: Tensor
    bound: Tensor | None


@torch.no_grad()
def score(config: Config, base: ConvAutoencoder, likelihood: Likelihood, images: Tensor) -> Scores:
    """Scores of ``images`` (B, 1, H, W); each process evaluates some batches and has the scores of all."""
    nats = images.new_zeros(len(images))
    whitened = torch.zeros_like(images[:, 0])
    for _, rows in distributed.own_batches(len(images), _BATCH):
        x = images[rows]
        q = likelihood(base.encode(x))
        # A `banded_gmrf.GMRF` is one of images without their channel.
        x = x.reshape(len(x), *q.event_shape)
        nats[rows] = -q.log_prob(x)
        whitened[rows] = (q.whiten(x) if isinstance(q, bg.GMRF) else (x - q.mean) / q.stddev).reshape(whitened[rows].shape)
    bound = importance_bound(config, base, likelihood, images) if isinstance(base, ConvVAE) else None
    return Scores(*(distributed.sum_over_processes(part) for part in (nats, whitened)), bound)


def importance_bound(config: Config, base: ConvVAE, likelihood: Likelihood, images: Tensor) -> Tensor:
    """The bound of -log p(x) from ``config.samples`` codes for each of the first ``config.bound_images`` images, in nats."""
    bound = torch.zeros(config.bound_images, dtype=torch.float64, device=images.device)
    for number, rows in distributed.own_batches(config.bound_images, _BATCH):
        x = images[rows]
        bound[rows] = -importance_log_likelihood(
            x,
            base.posterior(x),
            likelihood,
            config.samples,
            chunk_size=config.pairs_at_once,
            generator=torch.Generator(images.device).manual_seed(derived_seed(config.seed, f"importance {number}")),
        )
    return distributed.sum_over_processes(bound)
