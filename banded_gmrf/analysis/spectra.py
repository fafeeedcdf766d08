"""The spectrum of a GMRF's covariance, without its matrix: leading eigenpairs, counts of eigenvalues, spectral projections.

Eigenpairs come from solves with L. How many eigenvalues of Λ lie below a threshold is the number of negative pivots of Λ minus
the threshold (Sylvester's law of inertia), by elimination of one block of rows after the other. Where many eigenvectors serve
only to project on them, a polynomial of Λ does that without any of them.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from ..cholesky import StencilCholesky
from ..recursions.covariances import check_exact_is_affordable
from ..recursions.strips import block_coefficients, block_rows, scan, strip
from ..stencil import Stencil, as_integer
from ..transformations import inspect, once_differentiable
from .roots import bracketed_secant

_TOLERANCE = 1e-6
_MAX_COUNTS = 100
_TRANSITION = 12  # over the degree: half the width of the step's smooth edge, as an angle


class Eigenpairs(NamedTuple):
    """The k largest eigenvalues λ of Σ (*batch, k), in descending order, unit eigenvectors v (*batch, k, *grid), and the
    relative residuals ‖Σv - λv‖ / λ (*batch, k)."""

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor


@torch.compiler.disable
def leading_eigenpairs(factor: StencilCholesky, k: int) -> Eigenpairs:
    """See `GMRF.leading_eigenpairs`; computed and returned in float64, (*batch) is the factor's."""
    ndim = len(factor.grid)
    _check_k(factor, k)
    batch = factor.batch_shape
    log_diag, off_diag = (once_differentiable(t.double(), "leading_eigenpairs") for t in (factor.log_diag, factor.off_diag))
    double = StencilCholesky(log_diag, off_diag, factor.stencil)
    vectors = _Eigenvectors.apply(log_diag, off_diag, factor.stencil, k).movedim(len(batch), 0)
    # ‖L⁻¹v‖² with a fixed v is the eigenvalue, and its derivative is the eigenvalue's.
    half = double.solve(vectors)
    values = once_differentiable(half.square().flatten(-ndim).sum(-1), "leading_eigenpairs")
    with torch.no_grad():
        error = double.solve(half, transpose=True) - values.reshape(*values.shape, *[1] * ndim) * vectors
        residuals = error.flatten(-ndim).norm(dim=-1) / values
        inspect(_warn_of_residuals, residuals)
    return Eigenpairs(values.movedim(0, -1), vectors.movedim(0, len(batch)), residuals.movedim(0, -1))


def _warn_of_residuals(residuals: Tensor) -> None:
    if not (residuals <= _TOLERANCE).all():
        warnings.warn(
            f"an eigenpair has a relative residual of {residuals.max():.1e}, above {_TOLERANCE}", RuntimeWarning, stacklevel=6
        )


class _Eigenvectors(torch.autograd.Function):
    """Of each factor of a batch, (*batch, k, *grid); constants of every derivative."""

    @staticmethod
    def forward(log_diag: Tensor, off_diag: Tensor, stencil: Stencil, k: int) -> Tensor:
        factor = StencilCholesky(log_diag, off_diag, stencil)
        vectors = log_diag.new_empty(*factor.batch_shape, k, *factor.grid)
        for index in np.ndindex(*factor.batch_shape):
            vectors[index] = _leading_eigenvectors(factor[index], k)
        return vectors

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return None, None, None, None

    @staticmethod
    def jvp(ctx, *_):
        return None

    @staticmethod
    def vmap(info, in_dims, log_diag, off_diag, stencil, k):
        mapped = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((log_diag, off_diag), in_dims[:2], strict=True)
        ]
        return _Eigenvectors.apply(*mapped, stencil, k), 0


@torch.no_grad()
def _leading_eigenvectors(factor: StencilCholesky, k: int) -> Tensor:
    """(k, *grid) of one factor, by the implicitly restarted Lanczos method (ARPACK).

    `torch.lobpcg` takes matrices only; ARPACK takes Σ as two solves, which run on the factor's device.
    """
    n = factor.grid.numel()

    def covariance(x: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(x.reshape(factor.grid)).to(factor.device)
        return factor.solve(factor.solve(x), transpose=True).flatten().cpu().numpy()

    start = np.random.default_rng(0).standard_normal(n)  # fixed: the same signs at every call
    values, vectors = eigsh(LinearOperator((n, n), matvec=covariance, dtype=np.float64), k, which="LA", v0=start)
    descending = np.argsort(-values)
    return torch.from_numpy(vectors[:, descending].T.copy()).reshape(k, *factor.grid)


@torch.compiler.disable
def project_on_leading(factor: StencilCholesky, x: Tensor, k: int, degree: int) -> Tensor:
    """See `GMRF.project_on_leading`; x is (*sample, *batch, *grid), (*batch) the factor's, both of one dtype."""
    _check_k(factor, k)
    if as_integer("degree", degree) < 1:
        raise ValueError(f"degree is {degree}, expected at least 1")
    check_exact_is_affordable("project_on_leading", factor, factor.stencil.row_reach)
    with torch.no_grad():
        factor = StencilCholesky(factor.log_diag, factor.off_diag, factor.stencil)
        bound, cut = _largest_eigenvalue_bound(factor), _cut_after(factor, k)
        angle = (2 * cut / bound - 1).clamp(-1, 1).arccos()
        if angle.numel() and (lowest := (math.pi - angle.max().item()) * degree) < _TRANSITION:
            warnings.warn(
                f"a degree of {degree} is too low to give even the leading eigenvector its weight: expected at least "
                f"{math.ceil(degree * _TRANSITION / lowest) if lowest else 'infinity'} for k = {k}",
                RuntimeWarning,
                stacklevel=3,
            )
        scale, angle = ((t.reshape(*t.shape, *[1] * len(factor.grid))) for t in (2 / bound, angle))

    def shifted(v: Tensor) -> Tensor:
        """Λ, its spectrum moved into [-1, 1]."""
        return scale.to(v.dtype) * factor.matvec(factor.matvec(v, transpose=True)) - v

    # Chebyshev's series, in θ = arccos λ, of a step at the cut convolved with a Gaussian: it falls to 10⁻³ at the last term.
    width = math.sqrt(math.log(1e3)) / degree
    previous, current = x, shifted(x)
    total = (1 - angle / math.pi).to(x.dtype) * x
    for j in range(1, degree + 1):
        weight = -2 / (math.pi * j) * math.exp(-((width * j) ** 2)) * (j * angle).sin()
        total = total + weight.to(x.dtype) * current
        previous, current = current, 2 * shifted(current) - previous
    return total


@torch.no_grad()
def count_eigenvalues_below(factor: StencilCholesky, threshold: Tensor) -> Tensor:
    """How many eigenvalues of Λ are below ``threshold``, (*batch) like the result, of int64.

    Counted in float64: eigenvalues that differ from the threshold by no more than rounding of the largest one may be counted
    wrongly.
    """
    rows = factor.grid[0]
    shift = threshold.to(torch.float64).unsqueeze(-1)
    smallest = torch.finfo(shift.dtype).eps * shift  # in place of a pivot of 0, where the threshold is an eigenvalue

    def step(window: Tensor, block: tuple[int, int], coefficients: Tensor) -> tuple[Tensor, Tensor]:
        columns = strip(coefficients, factor.stencil, rows - block[0])
        height, width = columns.shape[-2:]
        total = columns @ columns.mT + torch.nn.functional.pad(window, (0, height - window.shape[-1]) * 2)
        total[..., :width, :width].diagonal(dim1=-2, dim2=-1).sub_(shift)
        ld, pivots, _ = torch.linalg.ldl_factor_ex(total[..., :width, :width])
        # A pivot of two sites has one negative eigenvalue, and is marked by negative numbers at both (Bunch & Kaufman 1977).
        paired = pivots < 0
        pivot = ld.diagonal(dim1=-2, dim2=-1)
        pivot.copy_(pivot.where(paired | (pivot != 0), smallest))
        negative = ((pivot < 0) & ~paired).sum(-1) + paired.sum(-1) // 2
        remaining = total[..., width:, width:]
        if height > width:
            coupling = total[..., :width, width:]
            remaining = remaining - coupling.mT @ torch.linalg.ldl_solve(ld, pivots, coupling)
        return remaining, negative

    blocks = list(zip(block_rows(factor.grid), block_coefficients(factor), strict=True))
    return sum(scan(step, shift.new_zeros(*factor.batch_shape, 0, 0), blocks))


def _largest_eigenvalue_bound(factor: StencilCholesky) -> Tensor:
    """At least the largest eigenvalue of Λ, (*batch) in float64: the largest row sum of |L| |L|ᵀ."""
    exists = factor.stencil.mask(factor.grid, device=factor.device)
    magnitudes = StencilCholesky(factor.log_diag, factor.off_diag.where(exists, 0).abs(), factor.stencil)
    sums = magnitudes.matvec(magnitudes.matvec(torch.ones_like(magnitudes.diag), transpose=True))
    return sums.flatten(-len(factor.grid)).amax(-1).double()


def _cut_after(factor: StencilCholesky, k: int) -> Tensor:
    """A value that exactly k eigenvalues of Λ are below, (*batch) in float64; where the k-th and the next are one, that one.

    Sought on the scale of log λ, for the logit of the share of eigenvalues below λ, which is nearly a line for smooth fields;
    from about the eigenvalues' geometric mean, which log |L| tells.
    """
    n, batch = factor.grid.numel(), factor.batch_shape

    def logit(count: Tensor) -> Tensor:
        share = (count.double() + 0.5) / (n + 1)
        return (share / (1 - share)).log()

    log_diag = factor.log_diag.reshape(-1, *factor.grid)
    off_diag = factor.off_diag.reshape(len(log_diag), len(factor.stencil), *factor.grid)
    flat = StencilCholesky(log_diag, off_diag, factor.stencil)
    counts = torch.zeros(len(log_diag), dtype=torch.int64, device=factor.device)

    def excess(elements: Tensor, log_threshold: Tensor) -> Tensor:
        counts[elements] = count_eigenvalues_below(flat[elements], log_threshold.exp())
        return logit(counts[elements]) - logit(torch.tensor(k))

    start = 2 * log_diag.double().flatten(1).mean(1)
    point, missed = bracketed_secant(excess, start, torch.finfo(torch.float64).eps, _MAX_COUNTS)
    if len(missed):
        warnings.warn(
            f"no value was found that {k} eigenvalues of the precision are below; the nearest has {counts[missed].max()}",
            RuntimeWarning,
            stacklevel=4,
        )
    return point.exp().reshape(batch)


def _check_k(factor: StencilCholesky, k: int) -> None:
    n = factor.grid.numel()
    if not 1 <= as_integer("k", k) < n:
        raise ValueError(f"k is {k}, expected at least 1 and less than the grid's {n} sites")
