"""What a model says by site, by block, or of a region: coverage of its intervals, and sites or regions given all others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, check_device, check_tensor

from ..cholesky import squares_matvec
from ..factors import added_variance, mixture, products
from ..gmrf import GMRF
from ..inference.noise import IndependentNoise
from ..inference.posterior import ConditionalGMRF
from ..inference.systems import PosteriorSystem
from ..low_rank import LowRankGMRF
from ..sparse import SparseGMRF
from ..stencil import as_integer
from ..validation import broadcast_fields, check_finite, check_levels, check_model

_MAX_EXACT_BLOCKS = 1024
_CHUNK_ELEMENTS = 2**22


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
        TypeError: ``x`` is not a floating-point tensor, or ``levels`` no sequence of numbers.
        ValueError: another grid, NaN or infinity, a level outside [0, 1], or a model without a site of positive variance.
    """
    levels = check_levels(levels)
    z, exists = deviations(q, x)
    return _fractions(z[exists], levels)


def block_coverage(
    q: "GMRF | ConditionalGMRF",
    x: Tensor,
    block: int | Sequence[int],
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    method: str = "auto",
    num_samples: int = 256,
) -> Tensor:
    """The fraction of blocks whose mean lies in the central interval to which the model gives each probability.

    Intervals of single sites say nothing about correlations. Means over blocks do: a model whose correlations are too short is
    too sure of them.

    Args:
        q: the model; any distribution on the grid that this library gives.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.
        block: sites along each axis, one number or one for each axis. The grid is cut into such blocks from its first site on;
            the last ones may be smaller.
        levels: probabilities.
        method: the variance of each block's mean is "exact", by one solve for each block; or from samples, "monte_carlo", with
            a relative standard error of √(2 / num_samples). "auto" is exact up to 1024 blocks.
        num_samples: of Monte Carlo.

    Returns:
        (len(levels),) in float64, over all blocks, samples and batches. Blocks of variance 0 are left out.

    Raises:
        TypeError: ``block`` holds something that is not an integer.
        ValueError: a block of less than one site, or with another number of axes; another method, fewer than two samples; what
            `marginal_coverage` raises.
    """
    grid, ndim = q.event_shape, len(q.event_shape)
    sizes = [block] * ndim if isinstance(block, int) else list(block)
    sizes = [as_integer("block", size) for size in sizes]
    if len(sizes) != ndim or min(sizes) < 1:
        raise ValueError(f"block is {block}, expected at least one site along each of {ndim} axes")
    if method not in ("auto", "exact", "monte_carlo"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, expected at least 2")
    levels = check_levels(levels)
    _check_data(q, x)
    number = _block_numbers(grid, sizes, x.device)
    deviation = _block_means(x.double() - q.mean.double(), number)
    if method == "exact" or (method == "auto" and deviation.shape[-1] <= _MAX_EXACT_BLOCKS):
        variance = _block_variances(q, number)
    else:
        chunk = max(1, _CHUNK_ELEMENTS // max(1, q.batch_shape.numel() * grid.numel()))
        counts = [min(chunk, num_samples - start) for start in range(0, num_samples, chunk)]
        draws = (q.sample((count,)).double() - q.mean.double() for count in counts)
        variance = sum(_block_means(some, number).square().sum(0) for some in draws) / num_samples
    exists = (variance > 0).expand(deviation.shape)
    return _fractions((deviation.abs() / variance.where(variance > 0, 1).sqrt())[exists], levels)


def deviations(q: "GMRF | ConditionalGMRF", x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes of each site's deviation in marginal standard deviations, and where these are not 0.

    Args:
        q: a distribution with ``mean`` and ``stddev``.
        x: data (*sample, *batch, *grid).

    Returns:
        Two tensors (*sample, *batch, *grid): in float64, 0 where the standard deviation is, and bool.

    Raises:
        ValueError: as for `marginal_coverage`.
    """
    _check_data(q, x)
    stddev = q.stddev.double()
    deviation = (x.double() - q.mean.double()).abs()
    exists = (stddev > 0).expand(deviation.shape)
    if not exists.any():
        raise ValueError("q has no site of positive variance, or x no sample: expected at least one")
    return (deviation / stddev.where(stddev > 0, 1)).where(exists, 0), exists


def _check_data(q: "GMRF | ConditionalGMRF", x: Tensor) -> None:
    grid = q.event_shape
    check_tensor("x", x)
    if x.ndim < len(grid) or x.shape[x.ndim - len(grid) :] != grid:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, grid))})")
    broadcast_fields("x", x.shape[: x.ndim - len(grid)], "the distribution", q.batch_shape)
    check_finite("x", x)


def _fractions(z: Tensor, levels: Sequence[float]) -> Tensor:
    """The fraction of magnitudes inside the central interval of each probability of N(0, 1)."""
    if z.numel() == 0:
        raise ValueError("q has no block of positive variance, or x no sample: expected at least one")
    inside = torch.special.erf(z / 2**0.5)  # the probability of a narrower interval
    return torch.stack([(inside <= level).double().mean() for level in levels])


def _block_numbers(grid: torch.Size, sizes: Sequence[int], device: torch.device) -> Tensor:
    """(*grid) int64: which block a site is in."""
    number = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (n, size) in enumerate(zip(grid, sizes, strict=True)):
        along = torch.arange(n, device=device) // size
        number = number * (-(-n // size)) + along.reshape(-1, *[1] * (len(grid) - axis - 1))
    return number


def _block_means(fields: Tensor, number: Tensor) -> Tensor:
    """(..., blocks) of fields (..., *grid)."""
    size = number.flatten().bincount()
    sums = fields.new_zeros(*fields.shape[: fields.ndim - number.ndim], len(size))
    return sums.index_add(-1, number.flatten(), fields.flatten(-number.ndim)) / size


def _block_variances(q: "GMRF | ConditionalGMRF", number: Tensor) -> Tensor:
    """wᵀΣw for the weights w of each block's mean, (*batch, blocks)."""
    size, ones, variances = number.flatten().bincount(), [1] * len(q.batch_shape), []
    chunk = max(1, _CHUNK_ELEMENTS // max(1, q.batch_shape.numel() * number.numel()))
    for blocks in torch.arange(len(size), device=number.device).split(chunk):
        weights = (number == blocks.reshape(-1, *[1] * number.ndim)).double() / size[blocks].reshape(-1, *[1] * number.ndim)
        weights = weights.reshape(len(blocks), *ones, *number.shape)
        variances.append((q.covariance_times(weights) * weights).flatten(-number.ndim).sum(-1))
    return torch.cat(variances).movedim(0, -1)


def leave_one_out(q: GMRF | SparseGMRF | LowRankGMRF, x: Tensor) -> Tensor:
    """Each site's deviation from its mean given all others, in its conditional standard deviations: exact, by one product.

    z_j = (Λ(x - loc))_j / √Λ_jj, standard normal at each site if x follows the model. Rue & Held, Gaussian Markov Random
    Fields, 2005, theorem 2.3.

    Args:
        q: the model.
        x: data (*sample, *batch, *grid), broadcast against the model's batch.

    Returns:
        (*sample, *batch, *grid), in float32 for float16 and bfloat16; differentiable.

    Raises:
        TypeError: ``q`` is another distribution, or ``x`` as for `GMRF.whiten`.
        ValueError: as for `GMRF.whiten`; NaN or infinity.
    """
    check_model("q", q, GMRF, SparseGMRF, LowRankGMRF)
    q.check_field("x", x)
    check_finite("x", x)
    if isinstance(q, SparseGMRF):
        product = q.precision.matvec(x.double() - q.loc.double())
        return (product / q.precision.diag.double().sqrt()).to(accumulate_dtype(x.dtype))
    if isinstance(q, LowRankGMRF):  # in float64: what the factors explain is taken away
        exact, value = q.to(torch.float64), x.double()
        local, away, ndim = exact.local, exact.precision_factors, len(q.event_shape)
        explained = mixture(products(away, value - exact.loc, ndim), away, ndim), added_variance(away, ndim)
    else:
        explained, local, value = (0, 0), q, x
    factor = local.precision_cholesky
    product = factor.matvec(local.whiten(value)) - explained[0]
    diagonal = squares_matvec(factor, torch.ones_like(factor.diag)) - explained[1]
    return (product / diagonal.sqrt()).to(accumulate_dtype(x.dtype))


def conditional_score(q: GMRF | SparseGMRF, x: Tensor, region: Tensor) -> ChiSquared:
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
        TypeError: ``q`` is another distribution, ``region`` is not of bools, or ``x`` as for `GMRF.whiten`.
        ValueError: grids, batches or devices that do not fit; NaN or infinity.
    """
    check_model("q", q, GMRF, SparseGMRF)
    q.check_field("x", x)
    check_finite("x", x)
    grid = q.event_shape
    if not isinstance(region, Tensor) or region.dtype != torch.bool:
        came = region.dtype if isinstance(region, Tensor) else type(region).__name__
        raise TypeError(f"region is {came}, expected a bool tensor")
    if region.ndim < len(grid) or region.shape[region.ndim - len(grid) :] != grid:
        raise ValueError(f"region has shape {tuple(region.shape)}, expected (..., {', '.join(map(str, grid))})")
    check_device("region", region, "x", x)
    nothing = IndependentNoise(torch.zeros((), dtype=torch.float64, device=x.device), grid)
    system = PosteriorSystem(q.prior_in_double(), ~region, nothing, tolerance=1e-10)
    pull = system.prior_product(x.double() - q.loc.double()).masked_fill(~region, 0)  # Λ_RR (x_R - m)
    statistic = (pull * system.solve(pull)).flatten(-len(grid)).sum(-1)
    return ChiSquared(statistic, region.flatten(-len(grid)).sum(-1))
