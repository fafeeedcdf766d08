"""How well a GMRF fits data: is the whitened residual white, are its norms those that the model expects, how far are samples.

The residual map itself is `GMRF.whiten`: y = Lᵀ(x - loc) is standard normal, independent from site to site, if x follows the
model. `whitened_moments`, `autocorrelation` and `quantiles` say where and how y departs from that, `chi_squared_coverage` looks
at its norm, and the energy and the variogram score compare x with samples of the model (both proper, lower is better).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels.checks import check_tensor
from gmrf_kernels.stencils import overlap

from .gmrf import GMRF


class Moments(NamedTuple):
    """Mean and mean square at each site, (*grid) each: 0 and 1 for whitened residuals of the right model."""

    mean: Tensor
    mean_square: Tensor


class Quantiles(NamedTuple):
    """Equally likely quantiles of the standard normal distribution and of the data, both (num,)."""

    normal: Tensor
    data: Tensor


def whitened_moments(q: GMRF, x: Tensor) -> Moments:
    """Where a model errs: moments of the whitened residual over all fields.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.

    Raises:
        TypeError, ValueError: as for `GMRF.whiten`.
    """
    q._check_field("x", x)
    y = q.whiten(x).reshape(-1, *q.event_shape)
    return Moments(y.mean(0), y.square().mean(0))


def autocorrelation(fields: Tensor, max_lag: int, ndim: int = 2) -> Tensor:
    """Correlation of sites of a field as a function of the lag between them, pooled over all fields.

    Args:
        fields: (*batch, *grid), such as whitened residuals; their common mean is subtracted.
        max_lag: longest lag along each axis, in pixels, less than the grid's shortest axis.
        ndim: axes of the grid.

    Returns:
        ``ndim`` axes of 2 max_lag + 1 entries, lag 0 (where it is 1) in the middle; of white noise, 0 everywhere else up to
        about 1 / √(fields.numel()).

    Raises:
        TypeError: ``fields`` is not a floating-point tensor.
        ValueError: too few axes or too long a lag.
    """
    grid = _grid(fields, ndim)
    if not 0 <= max_lag < min(grid):
        raise ValueError(f"max_lag is {max_lag}, expected at least 0 and less than the shortest axis of {tuple(grid)}")
    centred = fields - fields.mean()
    products = centred.new_empty((2 * max_lag + 1,) * ndim)
    products[(max_lag,) * ndim] = centred.square().mean()
    for lag, here, there in _lags(max_lag, grid):
        product = (centred[..., *here] * centred[..., *there]).mean()
        products[tuple(max_lag + step for step in lag)] = product
        products[tuple(max_lag - step for step in lag)] = product
    return products / products[(max_lag,) * ndim]


def quantiles(values: Tensor, num: int = 99) -> Quantiles:
    """What a normal quantile-quantile plot shows: the quantiles at the probabilities (i + ½) / num.

    Args:
        values: of any shape, such as whitened residuals; all are pooled.
        num: number of quantiles, at most that of values.

    Returns:
        A named tuple of ``normal`` and ``data``, both (num,) in ascending order, in the dtype of ``values``.

    Raises:
        TypeError: ``values`` is not a floating-point tensor.
        ValueError: ``num`` out of range.
    """
    check_tensor("values", values)
    if not 1 <= num <= values.numel():
        raise ValueError(f"num is {num}, expected between 1 and the number of values, {values.numel()}")
    probabilities = (torch.arange(num, dtype=torch.float64, device=values.device) + 0.5) / num
    ranked = values.flatten().sort().values  # torch.quantile takes no more than 16 million values
    return Quantiles(torch.special.ndtri(probabilities).to(values.dtype), ranked[(probabilities * len(ranked)).long()])


def chi_squared_coverage(fields: Tensor, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99), ndim: int = 2) -> Tensor:
    """The fraction of fields inside the ellipsoids to which the model gives each probability.

    If x follows the model, ‖Lᵀ(x - loc)‖² follows a χ² distribution with n degrees of freedom, and the fractions are the
    levels; they are lower for a model that is too sure of itself, and higher for one that is too careful.

    Args:
        fields: whitened residuals (*batch, *grid), as `GMRF.whiten` gives them.
        levels: probabilities.
        ndim: axes of the grid.

    Returns:
        (len(levels),) in float64.

    Raises:
        TypeError: ``fields`` is not a floating-point tensor.
        ValueError: too few axes, NaN or infinity, or a level outside [0, 1].
    """
    grid = _grid(fields, ndim)
    if not fields.isfinite().all():
        raise ValueError("fields has NaN or infinite entries, expected finite ones")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels is {tuple(levels)}, expected probabilities")
    distance = fields.double().square().flatten(-ndim).sum(-1).flatten()
    half_n = torch.tensor(0.5 * grid.numel(), dtype=torch.float64, device=distance.device)
    inside = torch.special.gammainc(half_n, 0.5 * distance)  # the cumulative distribution of χ²
    return torch.stack([(inside <= level).double().mean() for level in levels])


def energy_score(q: GMRF, x: Tensor, num_samples: int = 64) -> Tensor:
    """E‖X - x‖ - ½ E‖X - X'‖ for independent X, X' of the model: a generalisation of the CRPS to fields.

    Source: Gneiting & Raftery, Strictly proper scoring rules, prediction, and estimation, JASA 2007, section 4.3.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        num_samples: drawn from the model for each of its batch, at least 2; the estimate is unbiased.

    Returns:
        (*sample, *batch), in the units of x; differentiable.

    Raises:
        TypeError, ValueError: ``x`` as for `GMRF.whiten`; fewer than two samples.
    """
    q._check_field("x", x)
    draws = _draw(q, num_samples)
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
        (*sample, *batch), differentiable where no two sites are equal.

    Raises:
        TypeError, ValueError: ``x`` as for `GMRF.whiten`; fewer than two samples, too long a lag, or an order that is not
            positive.
    """
    q._check_field("x", x)
    if not 1 <= max_lag < min(q.event_shape):
        raise ValueError(f"max_lag is {max_lag}, expected at least 1 and less than the shortest axis of {tuple(q.event_shape)}")
    if not order > 0:
        raise ValueError(f"order is {order}, expected a positive number")
    draws = _draw(q, num_samples)
    score = torch.zeros((), dtype=x.dtype, device=x.device)
    for lag, here, there in _lags(max_lag, q.event_shape):
        seen, drawn = ((fields[..., *there] - fields[..., *here]).abs().pow(order) for fields in (x, draws))
        error = (seen - drawn.mean(0)).square().flatten(-len(lag)).sum(-1)
        score = score + error / math.hypot(*lag)
    return score


def _grid(fields: Tensor, ndim: int) -> torch.Size:
    check_tensor("fields", fields)
    if not 1 <= ndim <= fields.ndim:
        raise ValueError(f"fields has shape {tuple(fields.shape)}, expected a grid of {ndim} axes")
    return fields.shape[fields.ndim - ndim :]


def _lags(max_lag: int, grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """One lag of each pair ±lag up to ``max_lag`` along each axis, with the slices of the sites and of those that far on."""
    for lag in itertools.product(range(-max_lag, max_lag + 1), repeat=len(grid)):
        if lag > (0,) * len(grid):
            yield lag, *overlap(lag, grid)


def _draw(q: GMRF, num_samples: int) -> Tensor:
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, expected at least 2")
    return q.rsample((num_samples,))
