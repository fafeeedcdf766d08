"""From a prior and a description of what was observed to a posterior: checks of the arguments of `GMRF`'s methods."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmrf_kernels.checks import broadcast_batch, check_device

from .noise import CorrelatedNoise, IndependentNoise
from .posterior import ConditionalGMRF


def condition(prior, mask: Tensor, values: Tensor, **solver) -> ConditionalGMRF:
    """See `GMRF.condition`."""
    prior.check_field("values", values)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}, expected a bool tensor")
    grid = prior.event_shape
    if mask.ndim < len(grid) or mask.shape[mask.ndim - len(grid) :] != grid:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (..., {', '.join(map(str, grid))})")
    check_device("mask", mask, "values", values)
    _broadcast_batches(prior, values=values.shape, mask=mask.shape)
    return ConditionalGMRF(prior, mask, values, IndependentNoise(values.new_zeros((), dtype=torch.float64), grid), **solver)


def posterior(prior, observation: Tensor, noise_variance: Tensor | float | None, noise, **solver) -> ConditionalGMRF:
    """See `GMRF.posterior`."""
    prior.check_field("observation", observation)
    if (noise_variance is None) == (noise is None):
        raise TypeError(f"posterior takes either noise_variance or noise, got {'neither' if noise is None else 'both'}")
    grid = prior.event_shape
    if noise is not None:
        if noise.event_shape != grid:
            raise ValueError(f"noise is on the grid {tuple(noise.event_shape)}, the distribution on {tuple(grid)}")
        check_device("noise", noise.loc, "observation", observation)
        _broadcast_batches(prior, observation=observation.shape, noise=(*noise.batch_shape, *grid))
        known = torch.zeros(grid, dtype=torch.bool, device=observation.device)
        return ConditionalGMRF(prior, known, observation, CorrelatedNoise(noise), **solver)
    variance = torch.as_tensor(noise_variance, dtype=torch.float64, device=observation.device)
    shape = (*prior.batch_shape, *grid)
    try:
        torch.broadcast_shapes(variance.shape, shape)
    except RuntimeError:
        raise ValueError(f"noise_variance has shape {tuple(variance.shape)}, which does not broadcast with {shape}") from None
    if not (variance >= 0).all():
        raise ValueError("noise_variance has negative or NaN entries, expected at least 0")
    variance = variance.expand(torch.broadcast_shapes(variance.shape, grid))
    _broadcast_batches(prior, observation=observation.shape, noise_variance=variance.shape)
    known = variance == 0
    weight = (1 / variance.masked_fill(known, 1)).masked_fill(known, 0)
    return ConditionalGMRF(prior, known, observation, IndependentNoise(weight, grid), **solver)


def _broadcast_batches(prior, **shapes: Sequence[int]) -> None:
    """Check that the batches of all shapes (*batch, *grid) broadcast with the distribution's and with each other."""
    batch, others = prior.batch_shape, "the distribution"
    for name, shape in shapes.items():
        batch = broadcast_batch(name, shape[: len(shape) - len(prior.event_shape)], others, batch)
        others += f" and {name}"
