"""The small systems of a field with a low-rank part, I + VᵀV in float64, of its whitened factors V."""

import math

import torch
from torch import Tensor


def capacitance_root(gram: Tensor) -> Tensor:
    """The Cholesky factor C of I + a Gram matrix (*batch, R, R); NaN where that is not finite or not positive definite."""
    root, failed = torch.linalg.cholesky_ex(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    # LAPACK takes an infinite pivot for a positive one.
    failed = (failed != 0) | ~root.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return root.masked_fill(failed[..., None, None], math.nan)


def capacitance_logdet(root: Tensor) -> Tensor:
    """log |C|, half of log |C Cᵀ|: (*batch)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def solve_capacitance(root: Tensor, b: Tensor) -> Tensor:
    """(C Cᵀ)⁻¹b of vectors (*sample, *batch, R)."""
    half = torch.linalg.solve_triangular(root, b.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True).squeeze(-1)


def cotangent_weights(value_bar: Tensor, system: Tensor) -> Tensor:
    """The weights (B, R, R + S) with which V and the rests combine to V̄ of `reference.low_rank_gradients`.

    Args:
        value_bar: of the log densities, (S, B).
        system: of `reference.low_rank_log_density`, (B, R, R + S).
    """
    rank, scale = system.shape[1], value_bar.double()
    of_factors = torch.cholesky_inverse(system[..., :rank], upper=True) * -scale.sum(0)[:, None, None]
    return torch.cat([of_factors, system[..., rank:] * scale.T[:, None]], -1)
