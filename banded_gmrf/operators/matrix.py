"""Matrices as operators, dense or sparse."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from gmrf_kernels.checks import check_tensor

from ..stencil import as_grid
from .base import GridOperator


class Matrix(GridOperator):
    """A matrix times the sites in raster order: (*batch, *grid) to (*batch, m).

    Without a grid it takes the fewest last axes of a field that have n sites together.

    Args:
        matrix: (*batch, m, n) dense; or sparse (m, n), a torch tensor of any sparse layout or a SciPy matrix or array.
            Gradients flow back to the entries of a torch tensor.
        grid: the grid, of n sites, if it is to be fixed at once.

    Raises:
        TypeError: another type, or not floating-point numbers.
        ValueError: another shape, or a grid of another number of sites.
    """

    def __init__(self, matrix: "Tensor | scipy.sparse.sparray | scipy.sparse.spmatrix", grid: Sequence[int] | None = None):
        self._dense = None
        if scipy.sparse.issparse(matrix):
            if matrix.dtype.kind not in "fiub":
                raise TypeError(f"matrix is {matrix.dtype}, expected real numbers")
            entries = matrix.tocsr().tocoo()  # summed where entries repeat, and in the order of rows
            where = np.stack([entries.row, entries.col]).astype(np.int64)
            self._where, self._entries = torch.from_numpy(where), torch.from_numpy(entries.data.astype(np.float64))
        else:
            check_tensor("matrix", matrix)
            if matrix.layout == torch.strided:
                self._dense = matrix
            else:
                if matrix.ndim != 2:
                    raise ValueError(f"matrix is sparse and has shape {tuple(matrix.shape)}, expected (m, n)")
                coordinates = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()).coalesce()
                self._where, self._entries = coordinates.indices(), coordinates.values()
        if matrix.ndim < 2 or 0 in matrix.shape[-1:]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (*batch, m, n) with at least one column")
        self._shape = torch.Size(matrix.shape[-2:])
        self.batch_shape = torch.Size(matrix.shape[:-2])
        if grid is not None:
            self.grid = as_grid(grid)
            self.output_shape = self._output_shape(self.grid)

    def _output_shape(self, grid: torch.Size) -> torch.Size:
        if not 1 <= len(grid) <= 3 or grid.numel() != self._shape[1]:
            raise ValueError(f"Matrix has {self._shape[1]} columns, which does not fit the grid {tuple(grid)}")
        return self._shape[:1]

    def _grid_of(self, x: Tensor) -> torch.Size:
        for ndim in range(1, min(3, x.ndim) + 1):
            if x.shape[x.ndim - ndim :].numel() == self._shape[1]:
                return x.shape[x.ndim - ndim :]
        raise ValueError(f"x has shape {tuple(x.shape)}, Matrix needs a grid of {self._shape[1]} sites")

    def _device(self) -> torch.device:
        return (self._entries if self._dense is None else self._dense).device

    def _forward(self, x: Tensor) -> Tensor:
        x = x.flatten(-len(self.grid))
        if self._dense is not None:
            return (self._dense.to(x.dtype) @ x.unsqueeze(-1)).squeeze(-1)
        return self._sparse(x, *self._where.unbind(0)[::-1], self._shape[0])

    def _adjoint(self, y: Tensor) -> Tensor:
        if self._dense is not None:
            x = (self._dense.to(y.dtype).mT @ y.unsqueeze(-1)).squeeze(-1)
        else:
            x = self._sparse(y, *self._where.unbind(0), self._shape[1])
        return x.unflatten(-1, self.grid)

    def _sparse(self, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        terms = self._entries.to(x.dtype) * x.index_select(-1, source)
        return x.new_zeros(*x.shape[:-1], size).index_add(-1, target, terms)
