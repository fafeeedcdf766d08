"""`StencilPrecision`, a sparse precision matrix on a grid, as an object."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import gmrf_kernels
from gmrf_kernels.checks import broadcast_batch, check_factor, check_tensor

from .batched import Batched, register_pytree
from .stencil import Stencil, as_grid, check_stencil


@register_pytree("banded_gmrf.StencilPrecision", Stencil.to_json, Stencil.from_json)
@dataclass(frozen=True, eq=False)
class StencilPrecision(Batched):
    """A symmetric matrix Λ whose lower triangle is stored as that of a `StencilCholesky`, by column.

    Column j holds ``diag[j]`` on the diagonal and ``off_diag[k, j]`` at row ``j + offsets[k]`` (and again, mirrored, above the
    diagonal). Entries whose row lies outside the grid do not exist: what is stored there is ignored.

    `to`, `detach` and indexing work as for a tensor that has the batch axes alone. A precision is a pytree node of two tensors.

    Args:
        diag: (*batch, *grid).
        off_diag: (*batch, K-1, *grid), offsets in the stencil's order; the batches of the two tensors are broadcast.
        stencil: the forward half of the neighbours that Λ couples.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: numbers of offsets, grids, batches or devices that do not fit, or an empty grid.
    """

    diag: Tensor
    off_diag: Tensor
    stencil: Stencil

    def __post_init__(self):
        check_stencil(self.stencil)
        check_factor(self.diag, self.off_diag, len(self.stencil), self.stencil.ndim, "diag")

    @classmethod
    def from_matrix(
        cls, matrix: "Tensor | scipy.sparse.sparray | scipy.sparse.spmatrix", grid: Sequence[int]
    ) -> "StencilPrecision":
        """Λ from a matrix, its stencil being all offsets at which it has an entry that is not 0.

        Args:
            matrix: a dense tensor (*batch, n, n), a sparse one of any layout (n, n), both differentiable, or a SciPy sparse
                matrix (n, n), taken in float64; sites in raster order. Only the lower triangle is read.
            grid: numbers of sites along each axis, their product n.

        Raises:
            TypeError: neither a floating-point tensor nor a SciPy sparse matrix.
            ValueError: another shape.
        """
        grid = as_grid(grid)
        n = grid.numel()
        if not scipy.sparse.issparse(matrix):
            check_tensor("matrix", matrix)
        if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (n, n):
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (*batch, {n}, {n}) for grid {tuple(grid)}")
        if isinstance(matrix, Tensor) and matrix.layout != torch.strided:
            if matrix.ndim > 2:
                raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (n, n) for a sparse tensor")
            matrix = matrix.to_sparse_coo().coalesce()
            (rows, columns), entries = matrix.indices(), matrix.values()
            own, lower = rows == columns, (rows > columns) & (entries.detach() != 0)
            diag = entries.new_zeros(n).index_add(0, rows[own], entries[own])
            rows, columns, entries = rows[lower], columns[lower], entries[lower]
        elif isinstance(matrix, Tensor):
            diag = matrix.diagonal(dim1=-2, dim2=-1)
            rows, columns = matrix.detach().ne(0).reshape(-1, n, n).any(0).tril(-1).nonzero().unbind(1)
            entries = matrix[..., rows, columns]
        else:
            matrix = matrix.tocsr().astype(np.float64)
            diag = torch.from_numpy(matrix.diagonal())
            lower = scipy.sparse.tril(matrix, -1, format="coo")
            rows, columns = (torch.from_numpy(index.astype(np.int64)) for index in (lower.row, lower.col))
            entries = torch.from_numpy(lower.data)
        apart = torch.stack([i - j for i, j in zip(*(torch.unravel_index(t, grid) for t in (rows, columns)), strict=True)], 1)
        offsets, which = apart.unique(dim=0, return_inverse=True)  # sorted, as a stencil's
        off_diag = entries.new_zeros(*entries.shape[:-1], len(offsets) * n).index_copy(-1, which * n + columns, entries)
        stencil = Stencil(offsets.tolist(), len(grid))
        return cls(diag.unflatten(-1, grid), off_diag.unflatten(-1, (len(offsets), *grid)), stencil)

    @property
    def grid(self) -> torch.Size:
        """Numbers of sites along each axis."""
        return self.diag.shape[self.diag.ndim - self.stencil.ndim :]

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast of the two tensors' batch axes."""
        own, below = self.diag.shape[: self.diag.ndim - self.stencil.ndim], self.off_diag.shape[: -self.stencil.ndim - 1]
        return broadcast_batch("off_diag", below, "diag", own)

    def expand(self, batch_shape: Sequence[int]) -> "StencilPrecision":
        """The same matrix for a larger batch, without a copy."""
        ndim = self.stencil.ndim
        parts = (
            t.expand(*batch_shape, *t.shape[t.ndim - axes :]) for t, axes in ((self.diag, ndim), (self.off_diag, ndim + 1))
        )
        return self._from_parts(self.stencil, list(parts))

    def matvec(self, x: Tensor) -> Tensor:
        """Λ x: (*sample, *batch, *grid), ``x`` broadcast against the batch as torch does.

        Raises:
            TypeError: another dtype than Λ's.
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        lower, upper = (
            gmrf_kernels.matvec(self.diag, self.off_diag, x, self.stencil.offsets, self.stencil.ndim, transpose)
            for transpose in (False, True)
        )
        return lower + upper - self.diag * x

    def to_dense(self) -> Tensor:
        """Λ as a dense matrix: (*batch, n, n), sites in raster order. Meant for small grids: n² entries."""
        n, ndim = self.grid.numel(), self.stencil.ndim
        eye = torch.eye(n, dtype=self.diag.dtype, device=self.diag.device)
        columns = eye.reshape(n, *[1] * len(self.batch_shape), *self.grid)
        return self.matvec(columns).flatten(-ndim).movedim(0, -1)

    def _parts(self) -> dict[str, tuple[Tensor, int]]:
        return {"diag": (self.diag, self.stencil.ndim), "off_diag": (self.off_diag, self.stencil.ndim + 1)}

    def _static(self) -> Stencil:
        return self.stencil

    @classmethod
    def _from_parts(cls, static, parts, batch_shape=None) -> "StencilPrecision":
        new = cls.__new__(cls)
        for name, value in zip(("diag", "off_diag", "stencil"), (*parts, static), strict=True):
            object.__setattr__(new, name, value)  # the class is frozen
        return new
