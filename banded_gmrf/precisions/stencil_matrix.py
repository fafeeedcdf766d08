"""`StencilMatrix`: matrices that couple near sites only, and their sums, products and transposes, differentiable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision_matrix import StencilPrecision
from ..stencil import Stencil

Offset = tuple[int, ...]


def shifted(x: Tensor, offset: Offset) -> Tensor:
    """The values at i + offset, 0 where that is off the grid: (..., *grid). No offset is longer than the grid."""
    padding = [size for o in reversed(offset) for size in (-o, o)]
    return pad(x, padding) if any(offset) else x


@dataclass(frozen=True)
class StencilMatrix:
    """A matrix A over the sites of a grid, by row: A[i, i + offsets[k]] = entries[k, i], and 0 where that is off the grid.

    Offsets lead in all directions. Nothing is symmetric unless the entries are.

    Args:
        offsets: K different ones, each shorter than the grid along every axis.
        entries: (*batch, K, *grid).
    """

    offsets: tuple[Offset, ...]
    entries: Tensor

    @classmethod
    def from_entries(cls, entries: Mapping[Offset, Tensor], grid: Sequence[int]) -> "StencilMatrix":
        """From tensors (*batch, *grid) by offset, which are broadcast; offsets too long for the grid are left out."""
        fitting = {offset: entry for offset, entry in entries.items() if _fits(offset, grid)}
        return cls(tuple(fitting), torch.stack(torch.broadcast_tensors(*fitting.values()), -len(grid) - 1))

    @classmethod
    def from_precision(cls, precision: StencilPrecision) -> "StencilMatrix":
        """Both triangles of Λ."""
        ndim = precision.stencil.ndim
        below = torch.where(precision.stencil.mask(precision.grid, precision.off_diag.device), precision.off_diag, 0)
        entries = {(0,) * ndim: precision.diag}
        for offset, entry in zip(precision.stencil.offsets, below.unbind(-ndim - 1), strict=True):
            if _fits(offset, precision.grid):
                entries[offset] = entry
                entries[_reversed(offset)] = shifted(entry, _reversed(offset))
        return cls.from_entries(entries, precision.grid)

    def to_precision(self) -> StencilPrecision:
        """A symmetric matrix as a `StencilPrecision`: its diagonal, and its entries at forward offsets."""
        origin = (0,) * self.ndim
        forward = sorted(offset for offset in self.offsets if offset > origin)
        diag = self._at([origin]).squeeze(-self.ndim - 1)
        return StencilPrecision(diag, self._at(forward), Stencil(forward, self.ndim))

    @property
    def ndim(self) -> int:
        """Number of grid axes."""
        return len(self.offsets[0])

    def transpose(self) -> "StencilMatrix":
        """Aᵀ."""
        offsets = tuple(_reversed(offset) for offset in self.offsets)
        entries = [shifted(entry, offset) for offset, entry in zip(offsets, self._rows(), strict=True)]
        return StencilMatrix(offsets, torch.stack(entries, -self.ndim - 1))

    def add(self, *others: "StencilMatrix") -> "StencilMatrix":
        """The sum."""
        return _sum([self, *others])

    def matmul(self, other: "StencilMatrix") -> "StencilMatrix":
        """The product."""
        return _sum(
            [
                StencilMatrix(
                    tuple(_plus(step, offset) for offset in other.offsets),
                    entry.unsqueeze(-self.ndim - 1) * shifted(other.entries, step),
                )
                for step, entry in zip(self.offsets, self._rows(), strict=True)
            ]
        )

    def kron(self, other: "StencilMatrix") -> "StencilMatrix":
        """A ⊗ B, on the grid of A's axes and then B's."""
        a, b = self.ndim, other.ndim
        offsets = tuple(first + second for first in self.offsets for second in other.offsets)
        first = self.entries[(..., slice(None), None, *[slice(None)] * a, *[None] * b)]
        second = other.entries[(..., None, slice(None), *[None] * a, *[slice(None)] * b)]
        return StencilMatrix(offsets, (first * second).flatten(-a - b - 2, -a - b - 1))

    def scale_rows(self, scale: Tensor) -> "StencilMatrix":
        """D A with the diagonal matrix D of ``scale``, (*batch, *grid) or broadcast to it."""
        return StencilMatrix(self.offsets, scale.unsqueeze(-self.ndim - 1) * self.entries)

    def scale_columns(self, scale: Tensor) -> "StencilMatrix":
        """A D with the diagonal matrix D of ``scale``, (*batch, *grid)."""
        scales = torch.stack([shifted(scale, offset) for offset in self.offsets], -self.ndim - 1)
        return StencilMatrix(self.offsets, self.entries * scales)

    def _rows(self) -> tuple[Tensor, ...]:
        return self.entries.unbind(-self.ndim - 1)

    def _at(self, offsets: Sequence[Offset]) -> Tensor:
        """The entries at some of the offsets, (*batch, len(offsets), *grid)."""
        where = torch.tensor([self.offsets.index(offset) for offset in offsets], dtype=torch.int64, device=self.entries.device)
        return self.entries.index_select(-self.ndim - 1, where)


def _sum(terms: Sequence[StencilMatrix]) -> StencilMatrix:
    """The sum; its offsets are sorted, and those that do not fit the grid left out, as their entries are 0."""
    ndim = terms[0].ndim
    grid = terms[0].entries.shape[-ndim:]
    batch = torch.broadcast_shapes(*(term.entries.shape[: -ndim - 1] for term in terms))
    offsets = sorted({offset for term in terms for offset in term.offsets})
    place = {offset: k for k, offset in enumerate(offsets)}
    total = terms[0].entries.new_zeros(*batch, len(offsets), *grid)
    for term in terms:
        where = torch.tensor([place[offset] for offset in term.offsets], device=total.device)
        total = total.index_add(-ndim - 1, where, term.entries.expand(*batch, len(where), *grid))
    total = StencilMatrix(tuple(offsets), total)
    fitting = [offset for offset in offsets if _fits(offset, grid)]
    return total if fitting == offsets else StencilMatrix(tuple(fitting), total._at(fitting))


def _fits(offset: Offset, grid: Sequence[int]) -> bool:
    return all(abs(o) < n for o, n in zip(offset, grid, strict=True))


def _plus(a: Offset, b: Offset) -> Offset:
    return tuple(i + j for i, j in zip(a, b, strict=True))


def _reversed(offset: Offset) -> Offset:
    return tuple(-o for o in offset)
