"""Proper scoring rules: how far data are from samples of a model, lower is better."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype

from ..gmrf import GMRF
from ..validation import check_finite
from .lags import lags


def energy_score(q: GMRF, x: Tensor, num_samples: int = 64) -> Tensor:
    """E‖X - x‖ - ½ E‖X - X'‖ for independent X, X' of the model: a generalisation of the CRPS to fields.

    Source: Gneiting & Raftery, Strictly proper scoring rules, prediction, and estimation, JASA 2007, section 4.3.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        num_samples: drawn from the model for each of its batch, at least 2; the estimate is unbiased.

    Returns:
        (*sample, *batch), in the units of x, in float32 for float16 and bfloat16; differentiable.

    Raises:
        TypeError, ValueError: ``x`` as for `GMRF.whiten`; NaN or infinity; fewer than two samples.
    """
    q.check_field("x", x)
    check_finite("x", x)
    x, draws = _accumulated(x, _draw(q, num_samples))
    axes = tuple(range(-len(q.event_shape), 0))
    to_data = torch.stack([torch.linalg.vector_norm(draw - x, dim=axes) for draw in draws]).mean(0)
    pairs = [torch.linalg.vector_norm(draws[i + 1 :] - draw, dim=axes).sum(0) for i, draw in enumerate(draws[:-1])]
    return to_data - torch.stack(pairs).sum(0) / (num_samples * (num_samples - 1))


def variogram_score(q: GMRF, x: Tensor, max_lag: int = 3, order: float = 0.5, num_samples: int = 64) -> Tensor:
    """The sum over pairs of sites of w (|x_i - x_j|^order - E|X_i - X_j|^order)², which sees wrong correlations.

    Pairs are all those up to ``max_lag`` apart along each axis, and w is 1 / their distance in pixels.

    Source: Scheuerer & Hamill, Variogram-based proper scoring rules for probabilistic forecasts, Monthly Weather Review 2015.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        max_lag: in pixels, less than the grid's shortest axis.
        order: of the variogram.
        num_samples: drawn from the model, at least 2, to estimate the expectation. Its error adds its variance to the score.

    Returns:
        (*sample, *batch), in float32 for float16 and bfloat16; differentiable where no two sites are equal.

    Raises:
        TypeError, ValueError: ``x`` as for `GMRF.whiten`; NaN or infinity; fewer than two samples, too long a lag, or an
            order that is not positive.
    """
    q.check_field("x", x)
    check_finite("x", x)
    if not 1 <= max_lag < min(q.event_shape):
        raise ValueError(f"max_lag is {max_lag}, expected at least 1 and less than the shortest axis of {tuple(q.event_shape)}")
    if not order > 0:
        raise ValueError(f"order is {order}, expected a positive number")
    x, draws = _accumulated(x, _draw(q, num_samples))
    score = torch.zeros((), dtype=x.dtype, device=x.device)
    for lag, here, there in lags(max_lag, q.event_shape):
        seen, drawn = ((fields[..., *there] - fields[..., *here]).abs().pow(order) for fields in (x, draws))
        error = (seen - drawn.mean(0)).square().flatten(-len(lag)).sum(-1)
        score = score + error / math.hypot(*lag)
    return score


def _accumulated(*tensors: Tensor) -> Iterator[Tensor]:
    """Sums over sites overflow float16, and lose what they add in bfloat16."""
    return (t.to(accumulate_dtype(t.dtype)) for t in tensors)


def _draw(q: GMRF, num_samples: int) -> Tensor:
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, expected at least 2")
    return q.rsample((num_samples,))
