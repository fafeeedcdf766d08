"""Checks of what a distribution is given: constraints in the sense of `torch.distributions`, and sites."""

import torch
from torch import Tensor
from torch.distributions import constraints

from .stencil import Stencil


class Finite(constraints.Constraint):
    """Tensors (*batch, *grid) without NaN or infinity."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return value.isfinite().flatten(-self.event_dim).all(-1)


class FiniteWhereItExists(constraints.Constraint):
    """Off-diagonals (*batch, K-1, *grid) whose existing entries are finite; the others are ignored."""

    def __init__(self, stencil: Stencil):
        self._stencil = stencil
        self.event_dim = stencil.ndim + 1
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        batch = value.shape[: -self.event_dim]
        for axis, stride in enumerate(value.stride()[: len(batch)]):
            if stride == 0 and batch[axis] > 1:  # one factor shared along a batch axis is checked once
                value = value.narrow(axis, 0, 1)
        exists = self._stencil.mask(value.shape[-self._stencil.ndim :], device=value.device)
        return (value.isfinite() | ~exists).flatten(-self.event_dim).all(-1).expand(batch)


def as_sites(sites, grid: torch.Size, device: torch.device) -> Tensor:
    """Sites as integers (ndim,) or (m, ndim), or an error that says what is wrong with them."""
    sites = torch.as_tensor(sites, device=device)
    if sites.is_floating_point() or sites.is_complex() or sites.dtype == torch.bool:
        raise TypeError(f"sites is {sites.dtype}, expected integers")
    if sites.ndim == 0 and len(grid) == 1:
        sites = sites.reshape(1)
    if sites.ndim not in (1, 2) or sites.shape[-1] != len(grid):
        raise ValueError(f"sites has shape {tuple(sites.shape)}, expected ({len(grid)},) or (m, {len(grid)})")
    outside = ((sites < 0) | (sites >= torch.tensor(grid, device=sites.device))).any(-1)
    if outside.any():
        raise ValueError(f"sites has {sites[outside].reshape(-1, len(grid))[0].tolist()}, which is not on {tuple(grid)}")
    return sites
