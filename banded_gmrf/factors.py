"""What fields with a low-rank part share: sums of factors F, (*batch, R, *grid), with weights, and systems of I + VᵀV.

With V = LᵀF, the factors as the local field whitens them, the covariance Λ⁻¹ + F Fᵀ has (Woodbury, and the determinant lemma)

    rᵀ(Λ⁻¹ + F Fᵀ)⁻¹r = (r - F a)ᵀΛ(r - F a) + aᵀa,   a = (I + VᵀV)⁻¹ Vᵀ Lᵀr
    log |Λ⁻¹ + F Fᵀ|  = log |I + VᵀV| - log |Λ|

The first is a sum of squares, the least over all a: an error of a counts only squared, and nothing cancels however large the
factors are. Systems of I + VᵀV are small, and in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmrf_kernels import standard_normal
from gmrf_kernels.checks import accumulate_dtype

from .transformations import without_autocast
from .validation import as_sites


def rank_first(factors: Tensor, ndim: int, batch_ndim: int) -> Tensor:
    """(*batch, R, *grid) as R fields (R, *batch, *grid), a view with ``batch_ndim`` batch axes."""
    missing = batch_ndim + 1 + ndim - factors.ndim
    return factors.reshape(*[1] * missing, *factors.shape).movedim(-ndim - 1, 0)


def rank_last(fields: Tensor, ndim: int) -> Tensor:
    """R fields (R, *batch, *grid) as factors (*batch, R, *grid), a view."""
    return fields.movedim(0, -ndim - 1)


def mixture(weights: Tensor, factors: Tensor, ndim: int) -> Tensor:
    """Σ_r weights[r] factors[r]: (*sample, *batch, R) and (*batch, R, *grid) to (*sample, *batch, *grid)."""
    with without_autocast(factors):
        fields = torch.einsum("...r,...rn->...n", weights, factors.flatten(-ndim))
    return fields.unflatten(-1, factors.shape[factors.ndim - ndim :])


def random_mixture(factors: Tensor, x: Tensor, ndim: int) -> Tensor:
    """A mixture with standard normal weights for each of the fields x, (*sample, *batch, *grid)."""
    dtype = accumulate_dtype(factors.dtype)
    weights = standard_normal((*x.shape[: x.ndim - ndim], factors.shape[-ndim - 1]), dtype, x.device)
    return mixture(weights, factors.to(dtype), ndim)


def products(factors: Tensor, fields: Tensor, ndim: int) -> Tensor:
    """Of every factor with fields (*sample, *batch, *grid): (*sample, *batch, R) in float64."""
    # Fields first: the matrix products that einsum makes of it are ten times as fast on a CPU as with factors first.
    return torch.einsum("...n,...rn->...r", fields.double().flatten(-ndim), factors.double().flatten(-ndim))


def added_variance(factors: Tensor, ndim: int) -> Tensor:
    """The variances of the low-rank part, (*batch, *grid)."""
    return factors.square().sum(-ndim - 1)


def added_covariance(factors: Tensor, sites: Sequence[Sequence[int]] | Sequence[int] | int, grid: torch.Size) -> Tensor:
    """Covariances of some sites with all in the low-rank part: (*batch, *grid) for one site, (m, *batch, *grid) for m."""
    indices = as_sites(sites, grid, factors.device)
    own = factors[(..., *indices.reshape(-1, len(grid)).unbind(-1))].movedim(-1, 0)
    columns = mixture(own, factors, len(grid))
    return columns if indices.ndim > 1 else columns[0]
