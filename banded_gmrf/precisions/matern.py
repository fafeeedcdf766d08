"""Matérn fields, as solutions of a stochastic partial differential equation."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence

import scipy.sparse
import torch
from torch import Tensor

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil
from .parameters import differences, positive


def matern_precision(
    grid: Sequence[int],
    correlation_range: float | Tensor,
    smoothness: float,
    variance: float | Tensor = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The Matérn field of a given range and smoothness, as the solution of a stochastic partial differential equation.

    (κ² - Δ)^(α/2) x = white noise on a grid of unit spacing, α = smoothness + d/2: Λ = τ² (κ² I + G)^α with G the graph
    Laplacian of the grid (zero flux at its edges). Lindgren, Rue and Lindström, An explicit link between Gaussian fields and
    Gaussian Markov random fields: the stochastic partial differential equation approach, JRSS B 2011.

    Args:
        grid: numbers of sites along each of the d axes.
        correlation_range: the distance in pixels at which the correlation has fallen to about 0.13: √(8 smoothness) / κ.
        smoothness: the Matérn ν > 0, such that α is a whole number: 1, 2, ... on two axes, ½, 3/2, ... on one or three.
        variance: the marginal variance σ² of the continuous field on an unbounded domain. On the grid it is approached for
            ranges of several pixels, and more than a range away from the edges; at an edge it is about twice as large.
        dtype: of the result. In float32 the factorisation refuses ranges far beyond a few pixels, for which rounding of Λ
            changes the field; keep float64 and round the factor.
        device: of the result.

    Returns:
        Λ with the offsets up to α steps along the axes.

    Raises:
        TypeError: ``correlation_range`` is a list or a tuple, which could mean a range for each axis or for each field.
        ValueError: a parameter that is not positive, or α that is not a whole number.
    """
    ndim = len(grid)
    alpha = round(smoothness + ndim / 2)
    if not (smoothness > 0 and alpha == smoothness + ndim / 2):
        raise ValueError(
            f"smoothness is {smoothness}, expected a positive number that is whole with {ndim}/2 added, for {ndim} axes"
        )
    if isinstance(correlation_range, list | tuple):
        raise TypeError(
            f"correlation_range is {correlation_range}, expected a number, or a tensor with one range for each field of a batch"
        )
    correlation_range = positive("correlation_range", correlation_range, ndim, dtype, device)
    variance = positive("variance", variance, ndim, dtype, device)
    kappa2 = 8 * smoothness / correlation_range.square()
    tau2 = math.gamma(smoothness) / (math.gamma(alpha) * (4 * math.pi) ** (ndim / 2) * kappa2**smoothness * variance)
    stencil, diags, off_diags = _laplacian_powers(tuple(grid), alpha)
    weights = [math.comb(alpha, m) * tau2 * kappa2 ** (alpha - m) for m in range(alpha + 1)]
    diag = sum(weight * power.to(weight) for weight, power in zip(weights, diags, strict=True))
    off_diag = sum(weight.unsqueeze(-ndim - 1) * power.to(weight) for weight, power in zip(weights, off_diags, strict=True))
    return StencilPrecision(diag, off_diag, stencil)


@functools.lru_cache(maxsize=8)
def _laplacian_powers(grid: tuple[int, ...], alpha: int) -> tuple[Stencil, list[Tensor], list[Tensor]]:
    """The stencil of G^alpha, and the diagonals and off-diagonals of G⁰ to G^alpha on it: a fit asks for them at every step."""
    laplacian = sum(D.T @ D for D in (differences(grid, (axis,)) for axis in range(len(grid))))
    powers = itertools.accumulate([laplacian] * alpha, operator.matmul, initial=scipy.sparse.eye_array(math.prod(grid)))
    terms = [StencilPrecision.from_matrix(power, grid) for power in powers]
    # It has every offset of the lower powers: whatever m, the entries of Gᵐ at odd distances are ≤ 0, the others ≥ 0, so that
    # nothing cancels from one power to the next.
    stencil = terms[-1].stencil
    off_diags = []
    for term in terms:
        where = torch.tensor([stencil.offsets.index(offset) for offset in term.stencil.offsets], dtype=torch.int64)
        off_diags.append(torch.zeros(len(stencil), *grid, dtype=torch.float64).index_copy(0, where, term.off_diag))
    return stencil, [term.diag for term in terms], off_diags
