"""Matérn fields, as solutions of a stochastic partial differential equation."""

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil, as_grid
from ..transformations import is_transformed, require
from ..validation import warn_of_short_range
from .parameters import check, positive
from .stencil_matrix import StencilMatrix, shifted

Parameter = float | Tensor

_MAX_CACHED = 2**20  # numbers of each grid, 8 MB
_MAX_ASYMMETRY = 1e-5  # of an anisotropy, relative to its largest entry: well above rounding in float32


def matern_precision(
    grid: Sequence[int],
    correlation_range: Parameter | Sequence[Parameter],
    smoothness: float,
    variance: Parameter = 1.0,
    *,
    anisotropy: tuple[Parameter, Parameter] | Tensor | None = None,
    mask: Tensor | None = None,
    stationary: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The Matérn field of a given range and smoothness, as the solution of a stochastic partial differential equation.

    (κ² - Δ)^(α/2) (τ x) = white noise on a grid of unit spacing, α = smoothness + d/2: Λ = τ² (κ² I + G)^α with G the graph
    Laplacian of the grid (zero flux at its edges). Lindgren, Rue and Lindström, An explicit link between Gaussian fields and
    Gaussian Markov random fields: the stochastic partial differential equation approach, JRSS B 2011.

    In general Λ = T (I + G)^α T: G discretises -∇·M∇ by finite differences that exist, with M = R / (8 smoothness). The length
    of a vector h is measured by √(hᵀR⁻¹h), R = correlation_range² · anisotropy, and T, diagonal, makes the variance what was
    asked for. Where R or the variance differ from site to site, M is averaged over the two sites of a difference, and the
    variance is approached where they vary slowly compared with the range.

    At lags of few pixels the lattice is rougher than the continuous field. With smoothness 1 on two axes, its semivariogram
    at lags 1, 2 and 5 along an axis is 1.19, 1.09 and 1.03 times the continuum's for a range of 39 pixels, and 1.29, 1.16 and
    1.07 times for a range of 10; with smoothness 2 it is 1.02 times at lag 1 for 39, and 1.19 for 10. A finer grid is nearer.

    Args:
        grid: numbers of sites along each of the d axes.
        correlation_range: the distance in pixels at which the correlation has fallen to about 0.13: √(8 smoothness) / κ. A
            number or a tensor (*batch); or a tuple or a list of d of them, the range along each axis. A UserWarning below 1.
        smoothness: the Matérn ν > 0, such that α is a whole number: 1, 2, ... on two axes, ½, 3/2, ... on one or three.
        variance: the marginal variance σ² of the continuous field on an unbounded domain, a number or a tensor (*batch). On the
            grid it is approached for ranges of several pixels, and more than a range away from the edges; at an edge it is
            about twice as large, at a corner four times.
        anisotropy: on two axes a tuple (angle, ratio), as geostatistics has it: ``correlation_range`` holds along the direction
            (cos angle, sin angle), in radians from the first axis towards the second, and ratio · correlation_range across. Of
            a map with north at the top that is an azimuth of -angle. On any number of axes a matrix (*batch, d, d), symmetric
            and positive definite, the H of -∇·H∇ (Fuglstad, Lindgren, Simpson and Rue, Statistica Sinica 2015): along an
            eigenvector the range is ``correlation_range`` times the root of its eigenvalue.
        mask: bool (*grid) or (*batch, *grid), true where the field is, say at sea. Across other sites nothing is correlated:
            their edges carry no flux, as those of the grid (the limit of the barriers of Bakka, Vanhatalo, Illian,
            Simpson and Rue, Non-stationary Gaussian models with physical barriers, Spatial Statistics 2019). A coast has the
            larger variance of an edge. The other sites are independent of all, with variance ``variance``.
        stationary: if false, ``correlation_range`` (or each of its entries), ``variance`` and angle and ratio have a value for
            each site: they broadcast to (*batch, *grid), and a matrix of anisotropy to (*batch, *grid, d, d).
        dtype: of the result. In float32 the factorisation refuses ranges far beyond a few pixels, for which rounding of Λ
            changes the field; keep float64 and round the factor.
        device: of the result; None is that of the first tensor among the parameters.

    Returns:
        Λ with the offsets up to α steps along the axes, with ``anisotropy`` also diagonal steps. Differentiable in all
        parameters.

    Raises:
        TypeError: ``grid`` is not made of integers, or ``mask`` not of bools.
        ValueError: another number of axes than 1 to 3, an axis without sites, a parameter that is not positive, α that is not
            a whole number, numbers of ranges or shapes that do not fit, a range for each axis together with ``anisotropy``, an
            ``anisotropy`` that is not symmetric and positive definite, a ``mask`` without any site.
    """
    grid = as_grid(grid)
    ndim = len(grid)
    alpha = round(smoothness + ndim / 2)
    if not (smoothness > 0 and alpha == smoothness + ndim / 2):
        raise ValueError(
            f"smoothness is {smoothness}, expected a positive number that is whole with {ndim}/2 added, for {ndim} axes"
        )
    per_axis = isinstance(correlation_range, list | tuple)
    if device is None:
        given = (*(correlation_range if per_axis else (correlation_range,)), variance, mask)
        device = next((value.device for value in given if isinstance(value, Tensor)), None)

    def placed(name: str, value: Tensor) -> Tensor:
        return value[(..., *[None] * ndim)] if stationary else _on_grid(name, value, grid)

    def parameter(name: str, value: Parameter) -> Tensor:
        return placed(name, positive(name, value, 0, dtype, device))

    variance = parameter("variance", variance)
    if per_axis:
        if len(correlation_range) != ndim:
            raise ValueError(f"correlation_range has {len(correlation_range)} entries, expected one for each of {ndim} axes")
        if anisotropy is not None:
            raise ValueError("correlation_range has an entry for each axis and anisotropy is given, expected one of the two")
        ranges = [parameter(f"correlation_range[{axis}]", value) for axis, value in enumerate(correlation_range)]
        R, volume = {(axis, axis): r.square() for axis, r in enumerate(ranges)}, functools.reduce(operator.mul, ranges)
    else:
        everywhere = parameter("correlation_range", correlation_range)
        R, volume = {(axis, axis): everywhere.square() for axis in range(ndim)}, everywhere**ndim
        if anisotropy is not None:
            if isinstance(anisotropy, tuple):
                H, root_det = _ellipse(anisotropy, ndim, dtype, device)
            else:
                H, root_det = _matrix(anisotropy, ndim, dtype, device)
            H, root_det = {axes: placed("anisotropy", entry) for axes, entry in H.items()}, placed("anisotropy", root_det)
            R, volume = {axes: everywhere.square() * entry for axes, entry in H.items()}, volume * root_det
    if mask is not None:
        mask = _checked_mask(mask, grid, variance.device)
    warn_of_short_range("correlation_range", [R[axis, axis] for axis in range(ndim)], mask)
    M = {axes: entry / (8 * smoothness) for axes, entry in R.items()}
    scale = math.gamma(smoothness) / math.gamma(alpha) * (2 * smoothness / math.pi) ** (ndim / 2) / (volume * variance)
    if stationary and not per_axis and anisotropy is None and _is_small(grid, alpha, mask):
        precision = _polynomial(grid, alpha, mask, M[0, 0], scale)
    else:
        root = _elliptic(grid, M, torch.ones(grid, dtype=dtype, device=scale.device) if mask is None else mask.to(dtype))
        power = functools.reduce(StencilMatrix.matmul, [root] * alpha)
        if stationary:
            precision = power.scale_rows(scale).to_precision()
        else:
            precision = power.scale_rows(scale.sqrt()).scale_columns(scale.sqrt()).to_precision()
    if mask is None:
        return precision
    return StencilPrecision(torch.where(mask, precision.diag, 1 / variance), precision.off_diag, precision.stencil)


def _on_grid(name: str, value: Tensor, grid: torch.Size) -> Tensor:
    """A parameter with a value for each site: (*batch, *grid)."""
    try:
        shape = torch.broadcast_shapes(value.shape, grid)
        fits = shape[len(shape) - len(grid) :] == grid
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one that broadcasts to (*batch, *{tuple(grid)})")
    return value.expand(shape)


def _ellipse(anisotropy: tuple, ndim: int, dtype: torch.dtype, device) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Entries of H from the angle and the ratio of an ellipse, and the root of its determinant."""
    if ndim != 2 or len(anisotropy) != 2:
        raise ValueError(
            f"anisotropy has {len(anisotropy)} entries for {ndim} axes, expected (angle, ratio) for 2, or a matrix"
        )
    angle = torch.as_tensor(anisotropy[0], dtype=dtype, device=device)
    check("anisotropy[0]", angle, angle.isfinite(), "a finite angle")
    ratio = positive("anisotropy[1]", anisotropy[1], 0, dtype, device)
    cos, sin, squared = angle.cos(), angle.sin(), ratio.square()
    H = {(0, 0): cos**2 + squared * sin**2, (1, 1): sin**2 + squared * cos**2, (0, 1): (1 - squared) * cos * sin}
    return H, ratio.expand(H[0, 0].shape)


def _matrix(anisotropy: Tensor, ndim: int, dtype: torch.dtype, device) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Entries of H and the root of its determinant."""
    H = torch.as_tensor(anisotropy, dtype=dtype, device=device)
    if H.shape[-2:] != (ndim, ndim):
        raise ValueError(f"anisotropy has shape {tuple(H.shape)}, expected (*batch, {ndim}, {ndim}), or a tuple (angle, ratio)")
    finite = H.isfinite().all()
    factor, failed = torch.linalg.cholesky_ex(torch.where(H.isfinite(), H, 0))
    symmetric = (H - H.mT).abs().amax((-2, -1)) <= _MAX_ASYMMETRY * H.abs().amax((-2, -1))
    check("anisotropy", H, finite & symmetric & (failed == 0), "symmetric and positive definite")
    entries = {(a, b): (H[..., a, b] + H[..., b, a]) / 2 for a in range(ndim) for b in range(a, ndim)}
    return entries, factor.diagonal(dim1=-2, dim2=-1).prod(-1)


def _checked_mask(mask: Tensor, grid: torch.Size, device: torch.device) -> Tensor:
    mask = torch.as_tensor(mask, device=device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}, expected torch.bool")
    if mask.shape[-len(grid) :] != grid:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (*batch, {', '.join(map(str, grid))})")
    require(mask.flatten(-len(grid)).any(-1), "mask has no true site, expected at least one where the field is")
    return mask


def _is_small(grid: torch.Size, alpha: int, mask: Tensor | None) -> bool:
    """Whether powers of the Laplacian are cached: where they take at most 8 MB, and one mask is known."""
    if torch.compiler.is_compiling() or (mask is not None and (mask.ndim > len(grid) or is_transformed(mask))):
        return False
    offsets = (2 * alpha + 1) ** len(grid) // 2 + 1
    return (alpha + 1) * offsets * grid.numel() <= _MAX_CACHED


def _polynomial(grid: torch.Size, alpha: int, mask: Tensor | None, M: Tensor, scale: Tensor) -> StencilPrecision:
    """scale (I + M G)^alpha for numbers M, by powers of G that are cached: a fit asks for them in each evaluation."""
    with torch._C._DisableFuncTorch():  # under torch.func even tensors made here would have no numbers that NumPy can read
        stencil, powers = _laplacian_powers(tuple(grid), alpha, None if mask is None else mask.cpu().numpy().tobytes())
    powers = torch.from_numpy(powers).to(scale)
    weights = [math.comb(alpha, m) * scale * M**m for m in range(alpha + 1)]
    diag = sum(weight * power[0] for weight, power in zip(weights, powers, strict=True))
    off_diag = sum(weight.unsqueeze(-len(grid) - 1) * power[1:] for weight, power in zip(weights, powers, strict=True))
    return StencilPrecision(diag, off_diag, stencil)


@functools.lru_cache(maxsize=8)
def _laplacian_powers(grid: tuple[int, ...], alpha: int, mask: bytes | None) -> tuple[Stencil, np.ndarray]:
    """The stencil of G^alpha, and diagonal and off-diagonals of G⁰ to G^alpha on it: (alpha + 1, K, *grid).

    As NumPy's array, which no mode of torch changes: tensors made under `torch.inference_mode` could not be used outside.
    """
    shape, ndim = torch.Size(grid), len(grid)
    options = {"dtype": torch.float64, "device": "cpu"}
    present = torch.ones(shape, **options)
    if mask is not None:
        present = torch.frombuffer(bytearray(mask), dtype=torch.bool).reshape(shape).to(torch.float64)
    ones = torch.ones((1,) * ndim, **options)
    laplacian = _elliptic(shape, {(axis, axis): ones for axis in range(ndim)}, present, mass=0)
    identity = StencilMatrix.from_entries({(0,) * ndim: torch.ones(shape, **options)}, shape)
    powers = [
        power.to_precision() for power in itertools.accumulate([laplacian] * alpha, StencilMatrix.matmul, initial=identity)
    ]
    stencil = powers[-1].stencil  # each power has the offsets of the one before
    planes = np.zeros((alpha + 1, 1 + len(stencil), *shape))
    for plane, power in zip(planes, powers, strict=True):
        plane[0] = power.diag.numpy()
        plane[[1 + stencil.offsets.index(offset) for offset in power.stencil.offsets]] = power.off_diag.numpy()
    return stencil, planes


def _elliptic(grid: torch.Size, M: Mapping[tuple[int, int], Tensor], present: Tensor, mass: float = 1.0) -> StencilMatrix:
    """mass I - ∇·M∇ with zero flux out of the sites that are present, a symmetric matrix.

    xᵀAx = mass Σ x² + Σ ∇xᵀ M ∇x, the last a mean over the 2ᵈ gradients that a site has, from a difference forward or backward
    along each axis, 0 where that difference does not exist. Products of differences along one axis add up to one conductance
    for each pair of neighbours, those along two axes to central differences.

    Args:
        grid: numbers of sites along each axis.
        M: its entries (a, b), a ≤ b, that are not 0: (*batch, *grid), or 1 along all axes of the grid.
        present: (*grid) or (*batch, *grid), 1 where there is a site and 0 elsewhere.
    """
    ndim = len(grid)
    steps = [tuple(int(a == axis) for a in range(ndim)) for axis in range(ndim)]
    backs = [tuple(-s for s in step) for step in steps]
    pairs = [present * shifted(present, step) for step in steps]  # 1 where a site and the next one are present
    diag, entries = mass, {}
    for axis, (step, back) in enumerate(zip(steps, backs, strict=True)):
        conductance = M[axis, axis] * pairs[axis]
        if M[axis, axis].shape[-ndim:] == grid:
            conductance = (M[axis, axis] + shifted(M[axis, axis], step)) / 2 * pairs[axis]
        entries[step], entries[back] = -conductance, -shifted(conductance, back)
        diag = diag - entries[step] - entries[back]
    matrix = StencilMatrix.from_entries({(0,) * ndim: diag, **entries}, grid)
    central = [
        StencilMatrix.from_entries({step: pair / 2, back: -before / 2, (0,) * ndim: (before - pair) / 2}, grid)
        for step, back, pair in zip(steps, backs, pairs, strict=True)
        for before in [shifted(pair, back)]
    ]
    for a, b in (axes for axes in M if axes[0] != axes[1]):
        half = central[a].transpose().matmul(central[b].scale_rows(M[a, b]))
        matrix = matrix.add(half, half.transpose())
    return matrix
