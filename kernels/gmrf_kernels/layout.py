"""Batch axes of vectors and factors, sorted into those that own a factor and those that share one."""

import math

import torch
from torch import Tensor

from .checks import broadcast_batch


class Layout:
    """How the batch axes of vectors and factors map to the canonical (S, B, *grid) and (B, ...), and back."""

    def __init__(self, name: str, vector: Tensor, factor_batch: torch.Size, grid: torch.Size):
        batch = broadcast_batch(name, vector.shape[: vector.ndim - len(grid)], "the factor", factor_batch)
        padded = (1,) * (len(batch) - len(factor_batch)) + tuple(factor_batch)
        shared = [axis for axis, size in enumerate(padded) if size == 1]
        own = [axis for axis, size in enumerate(padded) if size != 1]
        self.batch, self.grid = batch, grid
        self.order = (*shared, *own)
        self.canonical = (math.prod([batch[axis] for axis in shared]), math.prod([batch[axis] for axis in own]))

    def vector(self, x: Tensor) -> Tensor:
        """(*sample, *batch, *grid) to (S, B, *grid)."""
        expanded = x.expand(*self.batch, *self.grid)
        grid_axes = range(len(self.batch), expanded.ndim)
        return expanded.permute(*self.order, *grid_axes).reshape(*self.canonical, *self.grid)

    def factor(self, t: Tensor, ndim: int) -> Tensor:
        """(*batch, ...), with ``ndim`` axes after the batch, to (B, ...)."""
        return t.reshape(self.canonical[1], *t.shape[t.ndim - ndim :])

    def batched(self, t: Tensor) -> Tensor:
        """(S, B, ...) back to the broadcast batch axes."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        unflat = t.reshape((*(self.batch[axis] for axis in self.order), *t.shape[2:]))
        return unflat.permute((*back, *range(len(back), unflat.ndim)))
