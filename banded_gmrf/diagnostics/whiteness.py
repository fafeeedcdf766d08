"""Is a whitened residual white noise: its moments, correlations, quantiles and norms."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, check_tensor

from ..gmrf import GMRF
from ..low_rank import LowRankGMRF
from ..transformations import require
from ..validation import check_finite, check_levels, check_model, warn_of_channels
from .lags import lags


class Moments(NamedTuple):
    """Mean and mean square at each site, (*grid) each: 0 and 1 for whitened residuals of the right model."""

    mean: Tensor
    mean_square: Tensor


class Quantiles(NamedTuple):
    """Equally likely quantiles of the standard normal distribution and of the data, both (num,)."""

    normal: Tensor
    data: Tensor


def whitened_moments(q: GMRF | LowRankGMRF, x: Tensor) -> Moments:
    """Where a model errs: moments of the whitened residual over all fields.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.

    Raises:
        TypeError: ``q`` is another distribution, or ``x`` as for `GMRF.whiten`.
        ValueError: as for `GMRF.whiten`; NaN or infinity, or no field.
    """
    check_model("q", q, GMRF, LowRankGMRF)
    q.check_field("x", x)
    check_finite("x", x)
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one field")
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
        about 1 / √(fields.numel()); in float32 for float16 and bfloat16.

    Raises:
        TypeError: ``fields`` is not a floating-point tensor.
        ValueError: too few axes, too long a lag, NaN or infinity, or fields whose values are all the same.
    """
    grid = _grid(fields, ndim)
    if not 0 <= max_lag < min(grid):
        raise ValueError(f"max_lag is {max_lag}, expected at least 0 and less than the shortest axis of {tuple(grid)}")
    fields = fields.to(accumulate_dtype(fields.dtype))
    centred = fields - fields.mean()
    products = centred.new_empty((2 * max_lag + 1,) * ndim)
    products[(max_lag,) * ndim] = variance = centred.square().mean()
    require(variance > 0, "fields has no two values that differ, expected fields that vary")
    for lag, here, there in lags(max_lag, grid):
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
        A named tuple of ``normal`` and ``data``, both (num,) in ascending order, in the dtype of ``values``, or float32 for
        float16 and bfloat16.

    Raises:
        TypeError: ``values`` is not a floating-point tensor.
        ValueError: ``num`` out of range, NaN or infinity.
    """
    check_tensor("values", values)
    check_finite("values", values)
    if not 1 <= num <= values.numel():
        raise ValueError(f"num is {num}, expected between 1 and the number of values, {values.numel()}")
    probabilities = (torch.arange(num, dtype=torch.float64, device=values.device) + 0.5) / num
    values = values.to(accumulate_dtype(values.dtype))
    ranked = values.flatten().sort().values  # torch.quantile takes no more than 16 million values
    return Quantiles(torch.special.ndtri(probabilities).to(values.dtype), ranked[(probabilities * len(ranked)).long()])


def chi_squared_coverage(fields: Tensor, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99), ndim: int = 2) -> Tensor:
    """The fraction of fields inside the ellipsoids to which the model gives each probability.

    If x follows the model, ‖Lᵀ(x - loc)‖² follows a χ² distribution with n degrees of freedom, and the fractions are the
    levels; they are lower for a model that is too sure of itself, and higher for one that is too careful.

    It is informative for many fields of few sites. F fields resolve steps of 1/F: of one field each fraction is 0 or 1. And χ²
    of many sites is narrow: of 16,384 sites, the ellipsoids of 50 % and 99 % differ by 1.3 % in radius, so that for a model
    whose scale is wrong by more, all levels have nearly the same fraction. Then `marginal_coverage` and `block_coverage` say
    more.

    Args:
        fields: whitened residuals (*batch, *grid), as `GMRF.whiten` gives them.
        levels: probabilities.
        ndim: axes of the grid.

    Returns:
        (len(levels),) in float64.

    Raises:
        TypeError: ``fields`` is not a floating-point tensor, or ``levels`` no sequence of numbers.
        ValueError: too few axes, NaN or infinity, or a level outside [0, 1].
    """
    grid, levels = _grid(fields, ndim), check_levels(levels)
    distance = fields.double().square().flatten(-ndim).sum(-1).flatten()
    half_n = torch.tensor(0.5 * grid.numel(), dtype=torch.float64, device=distance.device)
    inside = torch.special.gammainc(half_n, 0.5 * distance)  # the cumulative distribution of χ²
    return torch.stack([(inside <= level).double().mean() for level in levels])


def _grid(fields: Tensor, ndim: int) -> torch.Size:
    check_tensor("fields", fields)
    if not 1 <= ndim <= fields.ndim:
        raise ValueError(f"fields has shape {tuple(fields.shape)}, expected a grid of {ndim} axes")
    check_finite("fields", fields)
    warn_of_channels("fields", fields.shape, ndim)
    return fields.shape[fields.ndim - ndim :]
