"""Batch axes of vectors and factors, sorted into those that own a factor and those that share one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import broadcast_batch, remembered


class Layout:
    """How the batch axes of vectors and factors map to the canonical (S, B, *grid) and (B, ...), and back.

    What has the canonical shape already is passed on as it is: an operation of torch that does nothing takes a microsecond.

    Args:
        name: what an error calls the vector.
        vector_batch: the vector's batch axes.
        factor_batch: the batch axes that the factor is stored with.
        repeated_batch: the factor's batch axes with all repetitions, of which each is to have a vector.
        grid: the grid.

    Raises:
        ValueError: batches that do not broadcast.
    """

    def __init__(
        self, name: str, vector_batch: torch.Size, factor_batch: torch.Size, repeated_batch: torch.Size, grid: torch.Size
    ):
        samples = len(vector_batch) - len(repeated_batch)
        if samples >= 0 and vector_batch[samples:] == repeated_batch:
            batch = vector_batch
        else:
            batch = broadcast_batch(name, vector_batch, "the factor", repeated_batch)
        samples = len(batch) - len(factor_batch)
        self.batch, self.grid, self.factor_batch = batch, grid, factor_batch
        shared = [*range(samples), *(samples + axis for axis, size in enumerate(factor_batch) if size == 1)]
        own = [samples + axis for axis, size in enumerate(factor_batch) if size != 1]
        self.order = (*shared, *own)
        self.sorted = self.order == tuple(range(len(batch)))
        self.canonical = (math.prod([batch[axis] for axis in shared]), math.prod([batch[axis] for axis in own]))
        self.canonical_vector = (*self.canonical, *grid)

    def is_canonical(self, vector: torch.Size, diag: torch.Size, off_diag: torch.Size) -> bool:
        """Tensors of these shapes need no change, nor does a result."""
        if not self.sorted or self.batch != self.canonical or vector != self.canonical_vector:
            return False
        return len(diag) == len(vector) - 1 == len(off_diag) - 1 and diag[0] == off_diag[0] == self.canonical[1]

    def vector(self, x: Tensor) -> Tensor:
        """(*sample, *batch, *grid) to (S, B, *grid)."""
        if self.sorted and x.shape == self.canonical_vector:
            return x
        if x.shape[: x.ndim - len(self.grid)] != self.batch:
            x = x.expand(*self.batch, *self.grid)
        if not self.sorted:
            x = x.permute(*self.order, *range(len(self.batch), x.ndim))
        return _reshaped(x, self.canonical_vector)

    def factor(self, t: Tensor, ndim: int) -> Tensor:
        """(*batch, ...), with ``ndim`` axes after a batch that may lack repetitions, to (B, ...)."""
        if t.ndim == ndim + 1 and t.shape[0] == self.canonical[1]:
            return t
        rest = t.shape[t.ndim - ndim :]
        if t.shape[: t.ndim - ndim] != self.factor_batch:
            t = t.expand(*self.factor_batch, *rest)
        return _reshaped(t, (self.canonical[1], *rest))

    def batched(self, t: Tensor) -> Tensor:
        """(S, B, ...) back to the broadcast batch axes."""
        if self.sorted and self.batch == self.canonical:
            return t
        rest = t.shape[2:]
        if self.sorted:
            return _reshaped(t, (*self.batch, *rest))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        unflat = t.reshape((*(self.batch[axis] for axis in self.order), *rest))
        return unflat.permute((*back, *range(len(back), unflat.ndim)))


def _reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    if t.shape == shape:
        return t
    if t.shape == shape[1:] and shape[0] == 1:  # one vector for each factor, to canonical
        return t.unsqueeze(0)
    if t.shape[1:] == shape and t.shape[0] == 1:  # and back
        return t.squeeze(0)
    return t.reshape(shape)


layout_of = remembered(Layout)
