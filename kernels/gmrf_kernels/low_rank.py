"""The small systems of a field with a low-rank part, I + VᵀV in float64, of its whitened factors V."""

import math

import torch
from torch import Tensor


def capacitance_root(gram: Tensor) -> Tensor:
    """The Cholesky factor C of I + a Gram matrix (*batch, R, R); NaN where that is not finite or not positive definite."""
    root, failed = torch.linalg.cholesky_ex(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return root.masked_fill((failed != 0)[..., None, None], math.nan)


def cotangent_weights(value_bar: Tensor, system: Tensor) -> Tensor:
    """The weights (B, R, R + S) with which V and the rests y - V a combine to the gradient of V, (y - V a) aᵀ - V (C Cᵀ)⁻¹.

    Args:
        value_bar: of the log densities, (S, B).
        system: Cᵀ and beside it the weights a, (B, R, R + S) in float64.
    """
    rank, scale = system.shape[1], value_bar.double()
    of_factors = torch.cholesky_inverse(system[..., :rank], upper=True) * -scale.sum(0)[:, None, None]
    return torch.cat([of_factors, system[..., rank:] * scale.T[:, None]], -1)
