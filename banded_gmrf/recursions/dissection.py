"""Cholesky factors and selected inverses of sparse precisions on grids, by nested dissection.

A slab as thick as the stencil reaches separates a box of sites into two that Λ does not couple. Both are eliminated first, each
in the same way, then the slab (George, Nested dissection of a regular finite element mesh, SIAM J. Numer. Anal. 1973). On a
grid these slabs are known beforehand. What a box leaves to the slabs around it is a dense matrix, its *front*, and goes up the
tree of boxes (Duff & Reid, The multifrontal solution of indefinite sparse symmetric linear equations, ACM TOMS 1983). The
covariances of a front follow from those of the one above, down the tree (Takahashi, Fagan & Chen, PICA 1973).

On H x W sites, H ≤ W, and a stencil that reaches r, a factor takes about 10 (r H)² W r operations and 8 r² H W log₂ H numbers,
where a factor in raster order takes (r H)² H W operations and r H² W numbers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import NotPositiveDefiniteError, of_batch
from ..precision_matrix import StencilPrecision
from ..stencil import Stencil
from ..transformations import inspect, is_transformed, is_transforming
from .elimination import on_columns

# A box of so many sites is not divided. Smaller ones cost more in calls than in arithmetic.
_LEAF_SITES = 64
# What is left of a pivot, relative to what it was, is mere rounding below this many units for each site. That of a singular Λ
# came out at a quarter of a unit (the graph Laplacian of 200 x 300 sites).
_LEAST_PIVOT = 4 * torch.finfo(torch.float64).eps


class Front(NamedTuple):
    """What elimination does with one box: a leaf, or the slab between two smaller ones.

    Attributes:
        width: how many sites it eliminates, the first ones of the front.
        size: the number of sites of the front; the others lie in slabs that are eliminated later.
        children: the numbers of the smaller boxes' fronts.
        places: for each of these, where the later sites of its front are in this one.
        source, target: where its entries of Λ are among the coefficients (K, n), flattened, and in the front, flattened.
    """

    width: int
    size: int
    children: tuple[int, ...]
    places: tuple[Tensor, ...]
    source: Tensor
    target: Tensor


class Dissection(NamedTuple):
    """Fronts in the order of elimination; ``sites`` are the raster numbers (n,) in that order, ``rank`` is its inverse."""

    fronts: list[Front]
    sites: Tensor
    rank: Tensor


class DissectedCholesky:
    """The factor C of a sparse precision Λ = C Cᵀ, its rows and columns in an order of its own.

    Differentiable in Λ. Of `logdet` and `solve` the gradient comes from the selected inverse and from one more solve, and can
    not be differentiated again. What else is asked for under autograd, and all under torch's transformations, is
    differentiated step by step, which keeps a few times the memory of the factor.

    Args:
        precision: Λ, in float64.

    Raises:
        torch.linalg.LinAlgError: Λ is not positive definite, or singular up to rounding.
    """

    def __init__(self, precision: StencilPrecision):
        self.precision = precision
        self._dissection = dissect(precision.grid, precision.stencil, precision.diag.device)
        self._coefficients = _flat_coefficients(precision)
        self._batch = self._coefficients.shape[:-1]
        self.transformed = is_transforming() and is_transformed(self._coefficients)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.transformed):
            self._columns = self._factorise()
            inspect(self._check, self._pivots(), self._coefficients.index_select(-1, self._dissection.sites))

    def attached_to(self, precision: StencilPrecision) -> "DissectedCholesky":
        """The same numbers as the factor of the same Λ, differentiable in it."""
        new = object.__new__(DissectedCholesky)
        new.__dict__.update(self.__dict__, precision=precision, _coefficients=_flat_coefficients(precision))
        return new

    def logdet(self) -> Tensor:
        """log |Λ|, (*batch)."""
        if self._is_differentiated():
            return _LogDet.apply(self._coefficients, self)
        return self._pivots().log().sum(-1)

    def solve(self, b: Tensor) -> Tensor:
        """Λ⁻¹b for vectors (*sample, *batch, n), which broadcast against the batch."""
        if self._is_differentiated():
            return _Solve.apply(self._coefficients, b, self)
        return on_columns(lambda columns: self._backward(self._forward(columns)), b, self._batch)

    def solve_root(self, b: Tensor) -> Tensor:
        """C⁻ᵀb, a sample of N(0, Λ⁻¹) for b of N(0, I); shapes as for `solve`, b in the order of elimination."""
        factor = self._step_by_step()
        widths = [front.width for front in self._dissection.fronts]
        return on_columns(lambda columns: factor._backward(columns.split(widths, -2)), b, self._batch)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of Λ⁻¹, (*batch, n)."""
        variances = self._step_by_step()._covariances(
            lambda front, S: S.diagonal(dim1=-2, dim2=-1)[..., : front.width].clone()  # a view would keep the front
        )
        return (
            torch.cat(variances, -1).index_select(-1, self._dissection.rank).reshape(*self._batch, len(self._dissection.sites))
        )

    def selected_inverse(self) -> Tensor:
        """The entries of Λ⁻¹ where Λ has its own, each as often as Λ has it: the derivative of log |Λ|, (*batch, K n)."""
        fronts = self._dissection.fronts
        entries = self._covariances(lambda front, S: S.flatten(-2).index_select(-1, front.target))
        entries = torch.cat(entries, -1)
        source = torch.cat([front.source for front in fronts])
        flat = entries.new_zeros(*entries.shape[:-1], self._coefficients.shape[-1]).index_add(-1, source, entries)
        return flat.reshape(self._coefficients.shape)

    def _is_differentiated(self) -> bool:
        return torch.is_grad_enabled() and self._coefficients.requires_grad and not self.transformed

    def _step_by_step(self) -> "DissectedCholesky":
        """The factor with a graph, if autograd asks for one."""
        if not self._is_differentiated():
            return self
        new = object.__new__(DissectedCholesky)
        new.__dict__.update(self.__dict__)
        new._columns = self._factorise()
        return new

    def _pivots(self) -> Tensor:
        """The squares of the diagonal of C, (*batch, n) in the order of elimination."""
        return (
            torch.cat([P.diagonal(dim1=-2, dim2=-1) for P, _ in self._columns], -1)
            .square()
            .reshape(*self._batch, len(self._dissection.sites))
        )

    def _factorise(self) -> list[tuple[Tensor, Tensor]]:
        """Of each front P and Q: C has P, lower triangular, in the rows of the sites it eliminates, Qᵀ in those of the others.

        Axes of size 1 of the batch are left out, see `on_columns`.
        """
        own = [size for size in self._batch if size != 1]
        coefficients = self._coefficients.reshape(*own, self._coefficients.shape[-1])
        columns, updates = [], {}
        for number, front in enumerate(self._dissection.fronts):
            entries = coefficients.index_select(-1, front.source)
            total = entries.new_zeros(*own, front.size**2).index_add(-1, front.target, entries)
            for child, place in zip(front.children, front.places, strict=True):
                at = (place[:, None] * front.size + place).flatten()
                total = total.index_add(-1, at, updates.pop(child).flatten(-2))
            total = total.unflatten(-1, (front.size, front.size))
            P, failed = torch.linalg.cholesky_ex(total[..., : front.width, : front.width])
            P = P.masked_fill((failed > 0)[..., None, None], math.nan)  # which `_check` finds, once for all fronts
            Q = torch.linalg.solve_triangular(P, total[..., : front.width, front.width :], upper=False)
            updates[number] = total[..., front.width :, front.width :] - Q.mT @ Q
            columns.append((P, Q))
        return columns

    def _forward(self, b: Tensor) -> list[Tensor]:
        """C⁻¹b of columns (*batch, n, m), by fronts."""
        fronts = self._dissection.fronts
        solution, updates = [], {}
        own = b.index_select(-2, self._dissection.sites).split([front.width for front in fronts], -2)
        for number, (front, (P, Q), rhs) in enumerate(zip(fronts, self._columns, own, strict=True)):
            total = pad(rhs, (0, 0, 0, front.size - front.width))
            for child, place in zip(front.children, front.places, strict=True):
                total = total.index_add(-2, place, updates.pop(child))
            solution.append(torch.linalg.solve_triangular(P, total[..., : front.width, :], upper=False))
            updates[number] = total[..., front.width :, :] - Q.mT @ solution[-1]
        return solution

    def _backward(self, own: Sequence[Tensor]) -> Tensor:
        """C⁻ᵀb of b by fronts, in raster order."""
        fronts = self._dissection.fronts
        solution, above = [], {}
        for number in reversed(range(len(fronts))):
            front, (P, Q) = fronts[number], self._columns[number]
            later = above.pop(number, None)
            rhs = own[number] if later is None else own[number] - Q @ later
            solution.append(torch.linalg.solve_triangular(P.mT, rhs, upper=True))
            whole = solution[-1] if later is None else torch.cat([solution[-1], later], -2)
            above |= {child: whole.index_select(-2, at) for child, at in zip(front.children, front.places, strict=True)}
        return torch.cat(solution[::-1], -2).index_select(-2, self._dissection.rank)

    def _covariances(self, read: Callable[[Front, Tensor], Tensor]) -> list[Tensor]:
        """``read(front, Σ)`` of each front, Σ (*batch, size, size) the covariance of its sites."""
        fronts = self._dissection.fronts
        results, above = [], {}
        for number in reversed(range(len(fronts))):
            front, (P, Q) = fronts[number], self._columns[number]
            # Not torch.cholesky_inverse, whose forward derivative is wrong in torch 2.13.
            inverse = torch.linalg.solve_triangular(P, torch.eye(front.width, dtype=P.dtype, device=P.device), upper=False)
            S = inverse.mT @ inverse
            if number in above:
                later = above.pop(number)
                G = torch.linalg.solve_triangular(P.mT, Q, upper=True)
                cross = G @ later
                S = S + cross @ G.mT
                S = torch.cat([torch.cat([S, -cross], -1), torch.cat([-cross.mT, later], -1)], -2)
            S = 0.5 * (S + S.mT)
            above |= {
                child: S.index_select(-2, at).index_select(-1, at)
                for child, at in zip(front.children, front.places, strict=True)
            }
            results.append(read(front, S))
        return results[::-1]

    def _check(self, pivots: Tensor, diag: Tensor) -> None:
        """Raise where a pivot is negative, or nothing but rounding; all by site in the order of elimination, (*batch, n)."""
        bad = (~(pivots > _LEAST_PIVOT * diag.shape[-1] * diag)).nonzero()
        if len(bad):
            site = torch.unravel_index(self._dissection.sites[bad[0, -1]], self.precision.grid)
            raise NotPositiveDefiniteError(
                f"precision{of_batch(bad[0, :-1])} is singular, or has a negative direction, at site "
                f"{tuple(int(i) for i in site)}: the input is not positive-definite. An intrinsic field becomes proper under "
                "constraints, see constrain, or where it is observed, see posterior"
            )


class _LogDet(torch.autograd.Function):
    """log |Λ| of coefficients (*batch, K n); its derivative is the selected inverse."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, factor: DissectedCholesky) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(coefficients)
        return factor.logdet()

    @staticmethod
    def backward(ctx, g: Tensor):
        with torch.no_grad():
            bar = g.unsqueeze(-1) * ctx.factor.selected_inverse()
        return _Once.apply(bar, *ctx.saved_tensors, g), None


class _Solve(torch.autograd.Function):
    """x = Λ⁻¹b: b̄ = Λ⁻¹x̄, Λ̄ = -b̄ xᵀ where Λ has entries."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, b: Tensor, factor: DissectedCholesky) -> Tensor:
        x = factor.solve(b)
        ctx.factor = factor
        ctx.save_for_backward(coefficients, b, x)
        return x

    @staticmethod
    def backward(ctx, g: Tensor):
        coefficients, b, x = ctx.saved_tensors
        bar = None
        with torch.no_grad():
            v = ctx.factor.solve(g)
            if ctx.needs_input_grad[0]:
                grid, stencil = ctx.factor.precision.grid, ctx.factor.precision.stencil
                with torch.enable_grad():
                    at = coefficients.detach().requires_grad_()
                    entries = at.unflatten(-1, (1 + len(stencil), *grid)).movedim(-len(grid) - 1, 0)
                    off_diag = entries[1:].movedim(0, -len(grid) - 1)
                    product = StencilPrecision(entries[0], off_diag, stencil).matvec(x.unflatten(-1, grid))
                (bar,) = torch.autograd.grad(product, at, -v.unflatten(-1, grid))
            v = v.sum_to_size(b.shape)
        depends_on = coefficients, b, g
        return None if bar is None else _Once.apply(bar, *depends_on), _Once.apply(v, *depends_on), None


class _Once(torch.autograd.Function):
    """The first argument, a derivative of which no other is known: whatever it depends on would be forgotten without a word."""

    @staticmethod
    def forward(ctx, value: Tensor, *depends_on: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "factors by nested dissection are differentiable once by autograd: for second derivatives use the transformations "
            "of torch.func"
        )


def dissection_size(grid: torch.Size, stencil: Stencil) -> tuple[int, int]:
    """How many operations a factor takes at most, and how many numbers it has."""
    reach = _reach(stencil)

    @functools.cache
    def of_box(sizes: tuple[int, ...]) -> tuple[int, int]:
        around = math.prod(min(size + 2 * r, n) for size, r, n in zip(sizes, reach, grid, strict=True)) - math.prod(sizes)
        axis = _axis_to_divide(sizes, reach)
        if axis is None:
            width, parts = math.prod(sizes), []
        else:
            width = reach[axis] * math.prod(sizes) // sizes[axis]
            low = (sizes[axis] - reach[axis]) // 2
            parts = [(*sizes[:axis], part, *sizes[axis + 1 :]) for part in (low, sizes[axis] - reach[axis] - low)]
        operations, numbers = width**3 // 3 + width**2 * around + width * around**2, width * (width + around)
        below = [of_box(part) for part in parts]
        return operations + sum(size[0] for size in below), numbers + sum(size[1] for size in below)

    return of_box(tuple(grid))


@functools.lru_cache(maxsize=8)
def dissect(grid: torch.Size, stencil: Stencil, device: torch.device) -> Dissection:
    """The tree of boxes of a grid, for precisions with this stencil."""
    reach = _reach(stencil)
    numbers = np.arange(grid.numel()).reshape(grid)
    parts: list[tuple[np.ndarray, list[int]]] = []  # of each front, the sites it eliminates, and its children

    def divide(box: tuple[slice, ...]) -> int:
        sizes = [part.stop - part.start for part in box]
        axis = _axis_to_divide(sizes, reach)
        if axis is None:
            parts.append((numbers[box].ravel(), []))
        else:
            start = box[axis].start + (sizes[axis] - reach[axis]) // 2
            cuts = [box[axis].start, start, start + reach[axis], box[axis].stop]
            low, between, high = ((*box[:axis], slice(*cut), *box[axis + 1 :]) for cut in itertools.pairwise(cuts))
            children = [divide(low), divide(high)]
            parts.append((numbers[between].ravel(), children))
        return len(parts) - 1

    divide(tuple(slice(0, size) for size in grid))
    sites = np.concatenate([own for own, _ in parts])
    rank = np.empty_like(sites)
    rank[sites] = np.arange(len(sites))
    # Each entry of Λ belongs to the front that eliminates the first of its two sites.
    k, row, column = (index.numpy() for index in stencil.entries(grid))
    source, pair = (k + 1) * len(sites) + column, np.sort(rank[np.stack([row, column])], 0)
    order = np.argsort(pair[0], kind="stable")
    source, (first, last) = source[order], pair[:, order]
    stops = np.cumsum([len(own) for own, _ in parts])
    bounds = [0, *np.searchsorted(first, stops)]
    later: list[np.ndarray] = []  # of each front, the sites that are eliminated after it, by rank
    fronts = []

    def on_device(index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(device)

    for number, (own, children) in enumerate(parts):
        stop = int(stops[number])
        start = stop - len(own)
        entries = slice(bounds[number], bounds[number + 1])
        reached = np.unique(np.concatenate([last[entries], *(later[child] for child in children)]))
        reached = reached[reached >= stop]

        def place(of: np.ndarray, start=start, stop=stop, reached=reached) -> np.ndarray:
            return np.where(of < stop, of - start, stop - start + np.searchsorted(reached, of))

        later.append(reached)
        size = len(own) + len(reached)
        i, j, diagonal = place(first[entries]), place(last[entries]), np.arange(len(own))
        fronts.append(
            Front(
                len(own),
                size,
                tuple(children),
                tuple(on_device(place(later[child])) for child in children),
                on_device(np.concatenate([own, source[entries], source[entries]])),
                on_device(np.concatenate([diagonal * (size + 1), i * size + j, j * size + i])),
            )
        )
    return Dissection(fronts, on_device(sites), on_device(rank))


def _reach(stencil: Stencil) -> list[int]:
    """How far the stencil reaches along each axis."""
    return [max((abs(offset[axis]) for offset in stencil.offsets), default=0) for axis in range(stencil.ndim)]


def _axis_to_divide(sizes: Sequence[int], reach: Sequence[int]) -> int | None:
    """The axis that the smallest slab of a box cuts; None where the box stays whole."""
    if math.prod(sizes) <= _LEAF_SITES:
        return None
    slabs = {
        axis: r * math.prod(sizes) // size for axis, (r, size) in enumerate(zip(reach, sizes, strict=True)) if size > r + 1
    }
    return min(slabs, key=lambda axis: (slabs[axis], -sizes[axis]), default=None)


def _flat_coefficients(precision: StencilPrecision) -> Tensor:
    """The diagonal and the off-diagonals in one tensor (*batch, K n)."""
    ndim, batch = len(precision.grid), precision.batch_shape
    parts = [precision.diag.flatten(-ndim), precision.off_diag.flatten(-ndim - 1)]
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
