"""Autoregressions of first order: the Markov chain whose correlation falls geometrically."""

import torch
from torch import Tensor

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil, as_integer
from .parameters import check, positive


def ar1_precision(
    length: int,
    correlation: float | Tensor,
    variance: float | Tensor = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The stationary autoregression of first order: the covariance of sites i and j is variance · correlation^|i - j|.

    Each site is ``correlation`` times the one before, and independent noise, so that Λ is tridiagonal. Rue and Held, Gaussian
    Markov random fields, 2005, chapter 1. With `separable_precision` it is the temporal half of a field in space and time.

    Args:
        length: the number of sites on the one axis.
        correlation: of a site and the next one, less than 1 in magnitude: a number or a tensor (*batch).
        variance: the marginal variance of each site, likewise.
        dtype: of the result.
        device: of the result; None is that of the first tensor among the parameters.

    Returns:
        Λ on the grid (length,), differentiable in both parameters.

    Raises:
        TypeError: ``length`` is not an integer.
        ValueError: a length below 1, or a parameter out of its range.
    """
    if as_integer("length", length) < 1:
        raise ValueError(f"length is {length}, expected at least 1")
    if device is None:
        device = next((value.device for value in (correlation, variance) if isinstance(value, Tensor)), None)
    correlation = torch.as_tensor(correlation, dtype=dtype, device=device).unsqueeze(-1)
    check("correlation", correlation.squeeze(-1), correlation.abs() < 1, "less than 1 in magnitude")
    variance = positive("variance", variance, 1, dtype, device)
    innovation = variance * (1 - correlation) * (1 + correlation)
    site = torch.arange(length, device=innovation.device)
    has_next = site < length - 1
    diag = torch.where(site == 0, 1 / variance, 1 / innovation) + torch.where(has_next, correlation.square() / innovation, 0)
    below = torch.where(has_next, -correlation / innovation, 0)
    return StencilPrecision(diag, below.unsqueeze(-2), Stencil.cross(1, 1))
