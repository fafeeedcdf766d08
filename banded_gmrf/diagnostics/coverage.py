"""What a model says site by site, or of a region: coverage of its intervals, and sites or regions given all others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels.checks import check_device

from ..cholesky import squares_matvec
from ..gmrf import GMRF
from ..inference.noise import IndependentNoise
from ..inference.posterior import ConditionalGMRF
from ..inference.systems import PosteriorSystem


class ChiSquared(NamedTuple):
    """A ``statistic`` (*sample, *batch) that follows a χ² distribution with ``degrees_of_freedom`` (*batch) under the model."""

    statistic: Tensor
    degrees_of_freedom: Tensor


def marginal_coverage(q: "GMRF | ConditionalGMRF", x: Tensor, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99)) -> Tensor:
    """The fraction of sites whose value lies in the central interval to which the model gives each probability.

    Values that follow the model have the levels as their expected fractions; sites are correlated, so that the fractions of few
    fields may depart far from them. Sites of variance 0, known exactly, are left out.

    Args:
        q: the model; any distribution on the grid with ``mean`` and ``stddev``.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        levels: probabilities.

    Returns:
        (len(levels),) in float64, over all sites, samples and batches.

    Raises:
        ValueError: another grid, NaN or infinity, a level outside [0, 1], or a model without a site of positive variance.
    """
    grid = q.event_shape
    if x.ndim < len(grid) or x.shape[x.ndim - len(grid) :] != grid:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, grid))})")
    if not x.isfinite().all():
        raise ValueError("x has NaN or infinite entries, expected finite ones")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels is {tuple(levels)}, expected probabilities")
    stddev = q.stddev.double()
    z = (x.double() - q.mean.double()).abs() / stddev
    z = z[(stddev > 0).expand(z.shape)]
    if z.numel() == 0:
        raise ValueError("q has no site of positive variance, or x no sample: expected at least one")
    inside = torch.special.erf(z / 2**0.5)  # the probability of a narrower interval
    return torch.stack([(inside <= level).double().mean() for level in levels])


def leave_one_out(q: GMRF, x: Tensor) -> Tensor:
    """Each site's deviation from its mean given all others, in its conditional standard deviations: exact, by one product.

    z_j = (Λ(x - loc))_j / √Λ_jj, standard normal at each site if x follows the model. Rue & Held, Gaussian Markov Random
    Fields, 2005, theorem 2.3.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.

    Returns:
        (*sample, *batch, *grid), in float32 for float16 and bfloat16; differentiable.

    Raises:
        TypeError, ValueError: as for `GMRF.whiten`.
    """
    factor = q.precision_cholesky
    product = factor.matvec(q.whiten(x))
    return product / squares_matvec(factor, torch.ones_like(factor.diag)).sqrt()


def conditional_score(q: GMRF, x: Tensor, region: Tensor) -> ChiSquared:
    """How far a region is from what the model expects of it given the rest of the field.

    (x_R - m)ᵀ Λ_RR (x_R - m), m the region's mean given all other sites: χ² distributed, with as many degrees of freedom as the
    region has sites, if x follows the model.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        region: bool (*batch, *grid), true for the sites of the region.

    Returns:
        A named tuple of ``statistic`` (*sample, *batch) in float64, and ``degrees_of_freedom`` (*batch).

    Raises:
        TypeError: ``region`` is not of bools, or ``x`` as for `GMRF.whiten`.
        ValueError: grids, batches or devices that do not fit.
    """
    q.check_field("x", x)
    grid = q.event_shape
    if not isinstance(region, Tensor) or region.dtype != torch.bool:
        came = region.dtype if isinstance(region, Tensor) else type(region).__name__
        raise TypeError(f"region is {came}, expected a bool tensor")
    if region.ndim < len(grid) or region.shape[region.ndim - len(grid) :] != grid:
        raise ValueError(f"region has shape {tuple(region.shape)}, expected (..., {', '.join(map(str, grid))})")
    check_device("region", region, "x", x)
    nothing = IndependentNoise(torch.zeros((), dtype=torch.float64, device=x.device), grid)
    system = PosteriorSystem(q.precision_cholesky.unexpanded().to(torch.float64), ~region, nothing, tolerance=1e-10)
    pull = system.prior_product(x.double() - q.loc.double()).masked_fill(~region, 0)  # Λ_RR (x_R - m)
    statistic = (pull * system.solve(pull)).flatten(-len(grid)).sum(-1)
    return ChiSquared(statistic, region.flatten(-len(grid)).sum(-1))
