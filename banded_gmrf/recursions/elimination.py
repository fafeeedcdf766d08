"""Cholesky factors of block-banded matrices, by elimination of one dense block of rows after the other.

Let A be symmetric positive definite over the sites of a grid, and couple rows no further than r apart. With blocks of rows as
in `strips`, its factor C, A = C Cᵀ, has under each diagonal block P what couples the block to the next r rows, Qᵀ. Kept as
these pairs it takes n (r + 1) W numbers, n sites in rows of W, and n (r + 1)² W² operations.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .covariances import prepend_block
from .strips import scan


class BlockCholesky:
    """The factor C of a block-banded matrix A = C Cᵀ, in raster order.

    Args:
        columns: of each block, P (*batch, w, w) lower triangular, and Q (*batch, w, h), for the w sites of the block and the h
            sites after it that it is coupled to.
    """

    def __init__(self, columns: Sequence[tuple[Tensor, Tensor]]):
        self._batch = torch.broadcast_shapes(*(P.shape[:-2] for P, _ in columns))
        # Without the axes along which all share one factor: their vectors become columns of one right-hand side.
        own = [size for size in self._batch if size != 1]
        self._columns = [[t.expand(*self._batch, *t.shape[-2:]).reshape(*own, *t.shape[-2:]) for t in pair] for pair in columns]
        self._widths = [P.shape[-1] for P, _ in columns]
        self._reach = max(Q.shape[-1] for _, Q in columns)

    def detach(self) -> "BlockCholesky":
        """The same factor, without a gradient."""
        new = copy.copy(self)
        new._columns = [[t.detach() for t in pair] for pair in self._columns]
        return new

    def logdet(self) -> Tensor:
        """log |A|, (*batch)."""
        logdet = 2 * sum(P.diagonal(dim1=-2, dim2=-1).log().sum(-1) for P, _ in self._columns)
        return logdet.reshape(self._batch)

    def solve(self, b: Tensor) -> Tensor:
        """A⁻¹b for vectors (*sample, *batch, n), which broadcast against the factor's batch."""
        return on_columns(lambda columns: self._backward(self._forward(columns)), b, self._batch)

    def solve_root(self, b: Tensor) -> Tensor:
        """C⁻ᵀb, a sample of N(0, A⁻¹) for b of N(0, I); shapes as for `solve`."""
        return on_columns(lambda columns: self._backward(columns.split(self._widths, -2)), b, self._batch)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of A⁻¹, (*batch, n), by the recursion of `covariances` from the last block upwards."""

        def step(window: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
            covariance = _prepend(P, Q, window)
            # A view would keep the block.
            return covariance, covariance.diagonal(dim1=-2, dim2=-1)[..., : P.shape[-1]].clone()

        variances = scan(step, self._no_window(), self._columns[::-1])[::-1]
        return torch.cat(variances, -1).reshape(*self._batch, sum(self._widths))

    def inverse_blocks(self) -> Iterator[Tensor]:
        """A⁻¹ among the sites of a block and those after it that it is coupled to, from the last block to the first.

        Yields:
            (*batch, w + h, w + h).
        """
        window = self._no_window()
        for P, Q in self._columns[::-1]:
            window = _prepend(P, Q, window)
            yield window.reshape(*self._batch, *window.shape[-2:])

    def _no_window(self) -> Tensor:
        first = self._columns[0][0]
        return first.new_zeros(*first.shape[:-2], 0, 0)

    def _forward(self, b: Tensor) -> list[Tensor]:
        """C⁻¹b, by blocks."""
        solution, later = [], b.new_zeros(*b.shape[:-2], 0, b.shape[-1])  # what the blocks so far take from the next rows
        for (P, Q), own in zip(self._columns, b.split(self._widths, -2), strict=True):
            width = own.shape[-2]
            later = pad(later, (0, 0, 0, max(0, width + Q.shape[-1] - later.shape[-2])))
            solution.append(torch.linalg.solve_triangular(P, own - later[..., :width, :], upper=False))
            taken = Q.mT @ solution[-1]
            rest = later[..., width:, :]
            later = rest + pad(taken, (0, 0, 0, rest.shape[-2] - taken.shape[-2]))
        return solution

    def _backward(self, b: Sequence[Tensor]) -> Tensor:
        """C⁻ᵀb."""
        solution, after = [], b[0].new_zeros(*b[0].shape[:-2], 0, b[0].shape[-1])
        for (P, Q), own in zip(reversed(self._columns), reversed(b), strict=True):
            rhs = own - Q @ after[..., : Q.shape[-1], :]
            solution.append(torch.linalg.solve_triangular(P.mT, rhs, upper=True))
            after = torch.cat([solution[-1], after], -2)[..., : max(Q.shape[-1], self._reach), :]
        return torch.cat(solution[::-1], -2)


def _prepend(P: Tensor, Q: Tensor, window: Tensor) -> Tensor:
    """A⁻¹ among the sites of a block and those that it is coupled to, from that of the sites after it."""
    coupled = Q.shape[-1]
    return prepend_block(torch.cat([P, Q.mT], -2), window[..., :coupled, :coupled])


def block_cholesky(
    contribution: Callable[..., tuple[Tensor, Tensor]], blocks: Sequence[tuple], widths: Sequence[int], device: torch.device
) -> BlockCholesky:
    """The factor of a matrix that is given as a sum over blocks of rows.

    Args:
        contribution: called with what ``blocks`` has for one block; returns what that adds to A: (*batch, m, m) for the sites
            of the block and m - w ones after it, and (*batch, w) for the diagonal of its own sites.
        blocks: the arguments of ``contribution``.
        widths: the blocks' numbers of sites, w.
        device: that of A.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite.
    """

    def step(window: Tensor, width: int, *block) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gram, diagonal = contribution(*block)
        total = add_padded(window, gram)
        P = torch.linalg.cholesky(total[..., :width, :width] + torch.diag_embed(diagonal))
        Q = torch.linalg.solve_triangular(P, total[..., :width, width:], upper=False)
        return total[..., width:, width:] - Q.mT @ Q, (P, Q)

    parts = [(width, *block) for width, block in zip(widths, blocks, strict=True)]
    return BlockCholesky(scan(step, torch.zeros(0, 0, dtype=torch.float64, device=device), parts))


def on_columns(solve: Callable[[Tensor], Tensor], b: Tensor, batch: Sequence[int]) -> Tensor:
    """``solve`` of vectors (*sample, *batch, n), all that share a factor as columns: products of matrices, not of vectors.

    Args:
        solve: takes and gives (*own, n, m), with the axes of ``batch`` that are not of size 1.
        b: the vectors, which broadcast against ``batch``.
        batch: that of the factor.
    """
    whole = torch.broadcast_shapes(b.shape[:-1], batch)
    b = b.expand(*whole, b.shape[-1])
    own = [1] * (len(whole) - len(batch)) + list(batch)
    shared = [axis for axis, size in enumerate(own) if size == 1]
    order = [*(axis for axis in range(len(whole)) if axis not in shared), len(whole), *shared]
    columns = b.permute(order)
    sizes = columns.shape[len(whole) - len(shared) + 1 :]
    columns = columns.reshape(*columns.shape[: len(whole) - len(shared) + 1], math.prod(sizes))
    solution = solve(columns).unflatten(-1, sizes) if sizes else solve(columns).squeeze(-1)
    return solution.permute([order.index(axis) for axis in range(len(order))])


def add_padded(*matrices: Tensor) -> Tensor:
    """The sum of square matrices (*batch, m, m) of several sizes, which begin at the same site."""
    size = max(matrix.shape[-1] for matrix in matrices)
    padded = [pad(matrix, (0, size - matrix.shape[-1]) * 2) if matrix.shape[-1] < size else matrix for matrix in matrices]
    return functools.reduce(operator.add, padded)
