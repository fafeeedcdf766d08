"""Checks of what a distribution is given: constraints in the sense of `torch.distributions`, kinds of models, and sites."""

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from gmrf_kernels.registration import nothing_intervenes

from .stencil import Stencil


class Finite(constraints.Constraint):
    """Tensors (*batch, *grid) without NaN or infinity."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim
        super().__init__()

    def __repr__(self) -> str:
        return "finite numbers"  # in errors of torch, which takes the first letter off the name of a class

    def check(self, value: Tensor) -> Tensor:
        once = _without_repetitions(value, self.event_dim)
        if _sum_is_finite(once):
            return torch.ones((), dtype=torch.bool, device=value.device).expand(value.shape[: -self.event_dim])
        return self._looked_into(once).expand(value.shape[: -self.event_dim])

    def _looked_into(self, value: Tensor) -> Tensor:
        return value.isfinite().flatten(-self.event_dim).all(-1)


class FiniteWhereItExists(Finite):
    """Off-diagonals (*batch, K-1, *grid) whose existing entries are finite; the others are ignored."""

    def __init__(self, stencil: Stencil):
        self._stencil = stencil
        super().__init__(stencil.ndim + 1)

    def _looked_into(self, value: Tensor) -> Tensor:
        exists = self._stencil.mask(value.shape[-self._stencil.ndim :], device=value.device)
        return (value.isfinite() | ~exists).flatten(-self.event_dim).all(-1)


def _without_repetitions(value: Tensor, event_dim: int) -> Tensor:
    """One of the tensors that are shared along a batch axis."""
    for axis, stride in enumerate(value.stride()[: value.ndim - event_dim]):
        if stride == 0 and value.shape[axis] > 1:
            value = value.narrow(axis, 0, 1)
    return value


def all_finite(*tensors: Tensor) -> bool:
    """True only where all numbers are finite, by the sums of plain tensors that repeat nothing; sums may also overflow."""
    if not nothing_intervenes(tensors) or any(0 in t.stride() for t in tensors):
        return False
    with torch.no_grad():
        return all(math.isfinite(t.sum().item()) for t in tensors)


def _sum_is_finite(value: Tensor) -> bool:
    """True only where all numbers are finite, in one pass that writes nothing; sums of such numbers may still overflow."""
    return bool(torch._is_all_true(value.detach().sum().isfinite()))  # of all that vmap maps over, as torch's own checks


def check_model(name: str, model: object, *kinds: type) -> None:
    """Raise TypeError unless a model is a distribution of one of these kinds."""
    if not isinstance(model, kinds):
        raise TypeError(f"{name} is a {type(model).__name__}, expected a {' or a '.join(kind.__name__ for kind in kinds)}")


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


def unit_vectors(sites: Tensor, grid: torch.Size, batch_ndim: int, dtype: torch.dtype) -> Tensor:
    """1 at each of the sites (m, ndim), on their device: (m, *1, *grid), with ``batch_ndim`` axes of size 1."""
    m = len(sites)
    units = torch.zeros((m, *grid), dtype=dtype, device=sites.device)
    units[(torch.arange(m, device=sites.device), *sites.unbind(-1))] = 1
    return units.reshape(m, *[1] * batch_ndim, *grid)
