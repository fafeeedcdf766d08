"""The leading eigenpairs of a GMRF's covariance, from solves with L alone."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .cholesky import StencilCholesky

_TOLERANCE = 1e-6


class Eigenpairs(NamedTuple):
    """The k largest eigenvalues λ of Σ (*batch, k), in descending order, unit eigenvectors v (*batch, k, *grid), and the
    relative residuals ‖Σv - λv‖ / λ (*batch, k)."""

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor


def leading_eigenpairs(factor: StencilCholesky, k: int) -> Eigenpairs:
    """See `GMRF.leading_eigenpairs`; computed and returned in float64, (*batch) is the factor's."""
    n, ndim = factor.grid.numel(), len(factor.grid)
    if not 1 <= k < n:
        raise ValueError(f"k is {k}, expected at least 1 and less than the grid's {n} sites")
    batch = factor.batch_shape
    double = StencilCholesky(factor._log_diag.double(), factor._off_diag.double(), factor.stencil).expand(batch)
    log_diag = double.log_diag.detach().reshape(-1, *factor.grid)
    off_diag = double.off_diag.detach().reshape(batch.numel(), len(factor.stencil), *factor.grid)
    vectors = log_diag.new_empty(batch.numel(), k, *factor.grid)
    for out, *one in zip(vectors, log_diag, off_diag, strict=True):
        out.copy_(_leading_eigenvectors(StencilCholesky(*one, factor.stencil), k))
    vectors = vectors.reshape(*batch, k, *factor.grid).movedim(len(batch), 0)
    # ‖L⁻¹v‖² with a fixed v is the eigenvalue, and its derivative is the eigenvalue's.
    half = double.solve(vectors)
    values = half.square().flatten(-ndim).sum(-1)
    with torch.no_grad():
        error = double.solve(half, transpose=True) - values.reshape(*values.shape, *[1] * ndim) * vectors
        residuals = error.flatten(-ndim).norm(dim=-1) / values
        if not (residuals <= _TOLERANCE).all():
            warnings.warn(
                f"an eigenpair has a relative residual of {residuals.max():.1e}, above {_TOLERANCE}",
                RuntimeWarning,
                stacklevel=3,
            )
    return Eigenpairs(values.movedim(0, -1), vectors.movedim(0, len(batch)), residuals.movedim(0, -1))


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
