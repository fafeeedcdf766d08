"""Is a factor stable from one edge of the grid to the other, and if it was fitted to samples and is not, what mends it.

A sample x = L⁻ᵀu is made site by site, from the last one, by a recursion. The regressions that make a stationary factor most
likely are stable on one axis (Levinson); on several they need not be (Genin & Kamp, Two-dimensional stability and orthogonal
polynomials on the hypercircle, Proc. IEEE 1977), and where they are not, samples grow from line to line.

With t(j) = Σ s[axis] · j[axis], s the stencil's slopes, and D = diag(e^(-rate · t)), the factor D L D⁻¹ has the same diagonal,
and off-diagonals that are e^(-rate · t(offset)) times as large: t grows along every offset. What a site passes on to the others
is damped by that much. On one axis this moves the poles of an autoregression towards 0.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import gmrf_kernels

from ..stencil import Stencil
from ..transformations import is_transforming

MAX_GROWTH = 4.0  # of samples. The magnitudes of a stable field's lines differ by less in `_NUM_SAMPLES` samples.
_MENDED_GROWTH = 2.0
_NUM_SAMPLES = 64
_CHUNK_ELEMENTS = 2**24
_RATES = (1e-5, 8.0)
_BISECTIONS = 10  # of the rate's logarithm: to 1.4 %


def growth_of_samples(log_diag: Tensor, off_diag: Tensor, stencil: Stencil, white: Tensor) -> Tensor:
    """Of the lines along each axis, the largest over the smallest root mean square of samples L⁻ᵀu.

    Args:
        log_diag, off_diag, stencil: the factor, in float64.
        white: u (S, *batch, *grid), which broadcasts against the factor's batch.

    Returns:
        (*batch), at least 1; infinite where samples overflow.
    """
    ndim = stencil.ndim
    samples = gmrf_kernels.solve(log_diag, off_diag, white, stencil.offsets, ndim, transpose=True, log=True)
    magnitudes = samples.abs()
    largest = magnitudes.amax(tuple(range(-ndim, 0)), keepdim=True)
    scaled = (magnitudes / largest).square().mean(0)  # squares of large numbers overflow
    growth = torch.ones(scaled.shape[:-ndim], dtype=torch.float64, device=scaled.device)
    for axis in range(-ndim, 0):
        others = [other for other in range(-ndim, 0) if other != axis]
        lines = scaled.mean(others).sqrt() if others else scaled.sqrt()
        growth = torch.maximum(growth, lines.amax(-1) / lines.amin(-1))
    return growth.where(magnitudes.isfinite().flatten(-ndim).all(-1).all(0), torch.inf)


def growth_of_factor(log_diag: Tensor, off_diag: Tensor, stencil: Stencil) -> Tensor:
    """`growth_of_samples` for always the same samples: (*batch)."""
    white = torch.from_numpy(_white(log_diag.shape[-stencil.ndim :])).to(log_diag.device)
    white = white.reshape(len(white), *[1] * (log_diag.ndim - stencil.ndim), *log_diag.shape[-stencil.ndim :])
    return growth_of_samples(log_diag, off_diag, stencil, white)


def stable_columns(columns: Tensor, covariances: Tensor, stencil: Stencil, growth: Callable[[Tensor], Tensor]) -> Tensor:
    """Columns of a stationary factor, damped where its samples grow by more than `MAX_GROWTH`, by as little as mends it.

    Its diagonal is then the most likely one for the damped regressions. The rate is a constant for derivatives.

    Args:
        columns: (*batch, m, K) in float64, as `optimal_columns` gives them.
        covariances: (*batch, m, K, K), of the sites of each column; of any value where an entry does not exist.
        stencil: of the columns.
        growth: that of samples (*batch) for such columns.
    """
    time = torch.tensor([sum(s * o for s, o in zip(stencil.slopes, offset, strict=True)) for offset in stencil.offsets] + [0])
    time = time.to(columns)
    entries = torch.cat([columns[..., :-1], columns[..., -1:].exp()], -1)

    def damped(rate: Tensor) -> Tensor:
        new = entries * (-rate[..., None, None] * time).exp()
        norm = torch.einsum("...k,...kl,...l->...", new, covariances, new).sqrt()[..., None]
        return torch.cat([new[..., :-1] / norm, (new[..., -1:] / norm).log()], -1)

    with torch.no_grad():
        unstable = growth(columns) > MAX_GROWTH
        low, high = (torch.full_like(columns[..., 0, 0], math.log(rate)) for rate in _RATES)
        for _ in range(_BISECTIONS if is_transforming() or unstable.any() else 0):
            middle = 0.5 * (low + high)
            mended = growth(damped(middle.exp())) <= _MENDED_GROWTH
            low, high = low.where(mended, middle), middle.where(mended, high)
    return damped(high.exp()).where(unstable[..., None, None], columns)


@functools.lru_cache(maxsize=1)
def _white(grid: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that leave torch's generators alone, (S, *grid)."""
    count = max(4, min(_NUM_SAMPLES, _CHUNK_ELEMENTS // math.prod(grid)))
    return np.random.default_rng(0).standard_normal((count, *grid))
