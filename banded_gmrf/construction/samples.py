"""The maximum-likelihood factor of samples.

The mean negative log likelihood of samples depends on the factor as KL(N(0, Σ) ‖ N(0, (L Lᵀ)⁻¹)) does, Σ their covariance, so
that the maximum-likelihood factor is the one nearest to Σ: column j is the least-squares regression of x_j on its forward
neighbours. It needs Σ only at the *lags* between entries of one column, and these are sums of x[i] x[i + lag] over the
samples, which `gmrf_kernels.outer` gives for many samples at once.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import gmrf_kernels
from gmrf_kernels.checks import broadcast_batch, check_device, check_dtype, check_tensor, check_vector

from ..stencil import Stencil, check_stencil, flat_index
from ..transformations import inspect
from ..validation import check_finite, warn_of_channels
from .covariance import CovarianceFunction, as_factor, nearest_columns, neighbourhoods, optimal_columns
from .stability import MAX_GROWTH, growth_of_factor, stable_columns

_CHUNK_ELEMENTS = 2**24


def factor_of_samples(
    samples: Tensor | Iterable[Tensor],
    stencil: Stencil,
    loc: Tensor | None,
    ridge: float,
    stationary: bool,
    stable: str | None,
) -> tuple[Tensor, Tensor]:
    """``log_diag`` and ``off_diag`` of `StencilCholesky.from_samples`."""
    check_stencil(stencil)
    if stable not in (None, "project"):
        raise ValueError(f"stable is {stable!r}, expected None or 'project'")
    if stable is not None and not stationary:
        raise ValueError(f"stable is {stable!r}, expected None for a factor that is not stationary")
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}, expected a finite number that is not negative")
    lags = _lags(stencil)
    moments, count, dtype = _lag_covariances(samples, lags, loc, stationary)
    moments = torch.cat([moments[:1] + ridge, moments[1:]])
    batch, grid, device = moments.shape[1 : -stencil.ndim], moments.shape[-stencil.ndim :], moments.device
    covariance = _function_of_sites(moments, lags)
    name = f"the covariance of samples, with ridge {ridge},"
    unknowns = 1 + (loc is None)  # of a regression, beside the coefficients: the variance and the mean
    if not stationary:
        if ridge == 0:
            neighbours = stencil.mask(grid).sum(0).max().reshape(1)
            _check_observations(torch.tensor([count]), neighbours, unknowns)
        columns = nearest_columns(name, covariance, stencil, grid, batch, device)
    else:
        exists = torch.cat([exists for _, exists in neighbourhoods(stencil, grid, 1, device)])
        patterns, pattern_of_site = exists.unique(dim=0, return_inverse=True)
        blocks, windows = _pooled_blocks(covariance, patterns, stencil, grid, batch, device)
        if ridge == 0:
            _check_observations(count * windows, patterns.sum(-1) - 1, unknowns)
        first = [int((pattern_of_site == number).nonzero()[0]) for number in range(len(patterns))]
        sites = torch.stack(torch.unravel_index(torch.tensor(first), grid), -1)
        columns = optimal_columns(name, blocks, patterns, sites)

        def growth(columns: Tensor) -> Tensor:
            return growth_of_factor(*as_factor(columns[..., pattern_of_site, :], grid), stencil)

        if stable is None:
            _warn_of_growth(growth, columns)
        else:
            columns = stable_columns(columns, blocks, stencil, growth)
        columns = columns[..., pattern_of_site, :]
    return as_factor(columns.to(dtype), grid)


def _warn_of_growth(growth: Callable[[Tensor], Tensor], columns: Tensor) -> None:
    """Warn where samples of a factor with these columns grow by more than `MAX_GROWTH`."""
    if torch.compiler.is_compiling():
        return
    found = []
    inspect(lambda columns: found.append(growth(columns)), columns)
    if found[0].numel() and not (largest := float(found[0].max())) <= MAX_GROWTH:
        warnings.warn(
            f"samples of the stationary factor grow {largest:.3g}-fold across the grid, although it is the most likely one: "
            "stable='project' mends that, and another stencil may",
            RuntimeWarning,
            stacklevel=4,
        )


def _lags(stencil: Stencil) -> Stencil:
    """All forward differences between two entries of a column."""
    reached = [(0,) * stencil.ndim, *stencil.offsets]
    differences = {tuple(i - j for i, j in zip(a, b, strict=True)) for a, b in itertools.product(reached, reached)}
    return Stencil([lag for lag in differences if lag > reached[0]], stencil.ndim)


def _lag_covariances(
    samples: Tensor | Iterable[Tensor], lags: Stencil, loc: Tensor | None, stationary: bool
) -> tuple[Tensor, int, torch.dtype]:
    """Variances and covariances at each lag, (1 + lags, *batch, *grid) in float64; number and dtype of the samples."""
    ndim = lags.ndim
    first = None
    for chunk in _chunks(samples, ndim):
        if first is None:
            first, origin = chunk, _origin(chunk, ndim, loc, stationary)
            products, sums, count = 0, 0, 0
        if chunk.shape[1:] != first.shape[1:]:
            raise ValueError(f"samples has shape {tuple(chunk.shape)} after {tuple(first.shape)}, expected one batch and grid")
        check_dtype("samples", chunk, "its first chunk", first)
        check_finite("samples", chunk)
        check_device("samples", chunk, "its first chunk", first)
        centred = chunk.to(torch.float64) - origin
        products = products + _lag_products(centred, lags)
        sums = sums + centred.sum(0)
        count += len(chunk)
    if first is None:
        raise ValueError("samples has no chunks, expected at least one")
    moments = products / count
    if loc is None:
        # E (x - c)(x - c)ᵀ = E x xᵀ - m mᵀ + (m - c)(m - c)ᵀ, m the mean of each site and c the one to be used.
        mean = sums[None] / count
        rest = mean - mean.mean(tuple(range(-ndim, 0)), keepdim=True) if stationary else torch.zeros_like(mean)
        moments = moments - _lag_products(mean, lags) + _lag_products(rest, lags)
    return moments, count, first.dtype


def _chunks(samples: Tensor | Iterable[Tensor], ndim: int) -> Iterator[Tensor]:
    """The samples in chunks (S, *batch, *grid), S ≥ 1; chunks of a tensor are of bounded size."""
    if not isinstance(samples, Iterable):
        raise TypeError(f"samples is a {type(samples).__name__}, expected a torch.Tensor or an iterable of them")
    for chunk in [samples] if isinstance(samples, Tensor) else samples:
        check_tensor("samples", chunk)
        if chunk.ndim <= ndim or len(chunk) == 0 or 0 in chunk.shape[-ndim:]:
            raise ValueError(
                f"samples has shape {tuple(chunk.shape)}, expected (S, *batch, *grid) with at least one sample and a grid of "
                f"{ndim} axes of at least one site"
            )
        warn_of_channels("samples", chunk.shape, ndim)
        yield from chunk.split(max(1, _CHUNK_ELEMENTS // max(1, chunk[0].numel())))


def _origin(chunk: Tensor, ndim: int, loc: Tensor | None, stationary: bool) -> Tensor:
    """What is subtracted from every sample: ``loc``, or a point near the mean, so that the sums lose no digits to it."""
    if loc is None:
        return chunk.to(torch.float64).mean((0, *range(-ndim, 0)) if stationary else 0, keepdim=True)[0]
    grid = chunk.shape[-ndim:]
    check_vector("loc", loc, "samples", chunk, grid)
    batch = chunk.shape[1:-ndim]
    if broadcast_batch("loc", loc.shape[:-ndim], "samples", batch) != batch:
        raise ValueError(f"loc has batch shape {tuple(loc.shape[:-ndim])}, samples has batch shape {tuple(batch)}")
    return loc.to(torch.float64)


def _lag_products(x: Tensor, lags: Stencil) -> Tensor:
    """Sums over the samples (S, *batch, *grid) of x[i]² and of x[i] x[i + lag]: (1 + lags, *batch, *grid)."""
    squares, products = gmrf_kernels.outer(x, x, lags.offsets, lags.ndim, sample_ndim=1)
    return torch.cat([squares[None], products.movedim(-lags.ndim - 1, 0)])


def _function_of_sites(moments: Tensor, lags: Stencil) -> CovarianceFunction:
    """The covariances (1 + lags, *batch, *grid) as a function of two sites, for `nearest_columns`."""
    grid = moments.shape[-lags.ndim :]
    moments = moments.flatten(-lags.ndim).movedim(0, -2)
    # In a box around the origin that holds them all, lags have ascending numbers, backward ones the negatives of forward ones.
    box = [2 * max((abs(lag[axis]) for lag in lags.offsets), default=0) + 1 for axis in range(lags.ndim)]
    numbers = flat_index(torch.tensor([(0,) * lags.ndim, *lags.offsets], device=moments.device), box)

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        number = flat_index(b - a, box)
        earlier = torch.where(number < 0, flat_index(b, grid), flat_index(a, grid))
        return moments[..., torch.searchsorted(numbers, number.abs()), earlier]

    return covariance


def _pooled_blocks(
    covariance: CovarianceFunction,
    patterns: Tensor,
    stencil: Stencil,
    grid: torch.Size,
    batch: torch.Size,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """For each pattern of existing neighbours its mean covariance block over the sites that have at least these neighbours.

    Returns:
        (*batch, patterns, K, K), and the number of these sites (patterns,).
    """
    sums, windows = 0, 0
    for sites, exists in neighbourhoods(stencil, grid, batch.numel(), device):
        covers = (exists[:, None] | ~patterns).all(-1).to(torch.float64)
        sums = sums + torch.einsum("mp,...mkl->...pkl", covers, covariance(sites[:, :, None], sites[:, None, :]))
        windows = windows + covers.sum(0)
    return sums / windows[:, None, None], windows


def _check_observations(observations: Tensor, neighbours: Tensor, unknowns: int) -> None:
    """Raise ValueError where a regression on some neighbours has fewer observations than unknowns, which are that many more."""
    needed = neighbours + unknowns
    worst = (needed - observations).argmax()
    if observations[worst] < needed[worst]:
        raise ValueError(
            f"samples has {int(observations[worst])} observations of a site with {int(neighbours[worst])} neighbours, expected "
            f"at least {int(needed[worst])}: more samples, a smaller stencil or a ridge"
        )
