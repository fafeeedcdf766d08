"""Score the likelihoods of test images: -log p(x | z), the bound of -log p(x), and how white whitened residuals are."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import Distribution

import banded_gmrf as bg
from supn_models import ConvAutoencoder, ConvVAE, importance_log_likelihood

from .. import distributed
from ..progress import tracked
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
        cost: of "nats" and, if there is one, of "bound": the number of images, of samples for each, and seconds by the clock,
            in which all processes worked; the first scores of a run wait for the compilation of what they call.
    """

    nats: Tensor
    whitened: Tensor
    bound: Tensor | None
    cost: dict[str, dict[str, Any]]


@torch.no_grad()
def score(
    config: Config,
    base: ConvAutoencoder,
    likelihood: Likelihood,
    images: Tensor,
    title: str = "scores",
    console: Console | None = None,
) -> Scores:
    """Scores of ``images``; each process evaluates some batches and has the scores of all.

    Args:
        config: the run's.
        base: the model whose codes are taken.
        likelihood: of images given codes.
        images: (B, 1, H, W).
        title, console: what is shown as progress, and where; None for nowhere.
    """
    begin = _now(images)
    nats = images.new_zeros(len(images))
    whitened = torch.zeros_like(images[:, 0])
    for _, rows in _own_batches(len(images), title, console):
        x = images[rows]
        q = likelihood(base.encode(x))
        # A `banded_gmrf.GMRF`, with factors or without, is one of images without their channel.
        x = x.reshape(len(x), *q.event_shape)
        nats[rows] = -q.log_prob(x)
        whitened[rows] = (q.whiten(x) if isinstance(q, bg.GMRF | bg.LowRankGMRF) else (x - q.mean) / q.stddev).reshape(
            whitened[rows].shape
        )
    nats, whitened = (distributed.sum_over_processes(part) for part in (nats, whitened))
    scored = _now(images)
    cost = {"nats": {"images": len(images), "samples": 1, "seconds": round(scored - begin, 3)}}
    bound = None
    if isinstance(base, ConvVAE):
        bound = importance_bound(config, base, likelihood, images, f"{title}, bound", console)
        seconds = round(_now(images) - scored, 3)
        cost["bound"] = {"images": config.bound_images, "samples": config.samples, "seconds": seconds}
    return Scores(nats, whitened, bound, cost)


def importance_bound(
    config: Config, base: ConvVAE, likelihood: Likelihood, images: Tensor, title: str, console: Console | None
) -> Tensor:
    """The bound of -log p(x) from ``config.samples`` codes for each of the first ``config.bound_images`` images, in nats."""
    bound = torch.zeros(config.bound_images, dtype=torch.float64, device=images.device)
    for number, rows in _own_batches(config.bound_images, title, console):
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


def _own_batches(total: int, title: str, console: Console | None) -> Iterator[tuple[int, slice]]:
    """`distributed.own_batches` with their progress."""
    batches = list(distributed.own_batches(total, _BATCH))
    return tracked(batches, min(_BATCH * distributed.world_size(), total), title, console)


def _now(images: Tensor) -> float:
    """Seconds of a clock, once all that was begun on the device of ``images`` is done."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
