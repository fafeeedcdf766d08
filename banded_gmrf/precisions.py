"""Sparse precision matrices on grids, and the classical random fields that are defined by one.

Each builder gives a `StencilPrecision`, and ``StencilCholesky.from_precision`` its factor. Parameters are numbers or tensors
(*batch), broadcast with each other, and gradients flow back to them.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import gmrf_kernels
from gmrf_kernels.checks import check_factor, check_tensor
from gmrf_kernels.stencils import overlap

from .stencil import Stencil, check_stencil


@dataclass(frozen=True, eq=False)
class StencilPrecision:
    """A symmetric matrix Λ whose lower triangle is stored as that of a `StencilCholesky`, by column.

    Column j holds ``diag[j]`` on the diagonal and ``off_diag[k, j]`` at row ``j + offsets[k]`` (and again, mirrored, above the
    diagonal). Entries whose row lies outside the grid do not exist: what is stored there is ignored.

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
            matrix: a dense tensor (*batch, n, n), differentiable, or a SciPy sparse matrix (n, n), taken in float64; sites in
                raster order. Only the lower triangle is read.
            grid: numbers of sites along each axis, their product n.

        Raises:
            TypeError: neither a floating-point tensor nor a SciPy sparse matrix.
            ValueError: another shape.
        """
        grid = torch.Size(grid)
        n = grid.numel()
        if not scipy.sparse.issparse(matrix):
            check_tensor("matrix", matrix)
        if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (n, n):
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (*batch, {n}, {n}) for grid {tuple(grid)}")
        if isinstance(matrix, Tensor):
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
        batch_axes = max(self.diag.ndim, self.off_diag.ndim - 1) - ndim
        columns = torch.eye(n, dtype=self.diag.dtype, device=self.diag.device).reshape(n, *[1] * batch_axes, *self.grid)
        return self.matvec(columns).flatten(-ndim).movedim(0, -1)


def matern_precision(
    grid: Sequence[int],
    correlation_range: float | Tensor,
    smoothness: float,
    variance: float | Tensor = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The Matérn field of a given range and smoothness, as the solution of a stochastic partial differential equation.

    (κ² - Δ)^(α/2) x = white noise on a grid of unit spacing, α = smoothness + d/2: Λ = τ² (κ² I + G)^α with G the graph
    Laplacian of the grid (zero flux at its edges). Lindgren, Rue and Lindström, An explicit link between Gaussian fields and
    Gaussian Markov random fields: the stochastic partial differential equation approach, JRSS B 2011.

    Args:
        grid: numbers of sites along each of the d axes.
        correlation_range: the distance in pixels at which the correlation has fallen to about 0.13: √(8 smoothness) / κ.
        smoothness: the Matérn ν > 0, such that α is a whole number: 1, 2, ... on two axes, ½, 3/2, ... on one or three.
        variance: the marginal variance σ² of the continuous field on an unbounded domain. On the grid it is approached for
            ranges of several pixels, and more than a range away from the edges; at an edge it is about twice as large.
        dtype: of the result. In float32 the factorisation fails for ranges far beyond a few pixels.
        device: of the result.

    Returns:
        Λ with the offsets up to α steps along the axes.

    Raises:
        ValueError: a parameter that is not positive, or α that is not a whole number.
    """
    ndim = len(grid)
    alpha = round(smoothness + ndim / 2)
    if not (smoothness > 0 and alpha == smoothness + ndim / 2):
        raise ValueError(
            f"smoothness is {smoothness}, expected a positive number that is whole with {ndim}/2 added, for {ndim} axes"
        )
    correlation_range = _positive("correlation_range", correlation_range, ndim, dtype, device)
    variance = _positive("variance", variance, ndim, dtype, device)
    kappa2 = 8 * smoothness / correlation_range.square()
    tau2 = math.gamma(smoothness) / (math.gamma(alpha) * (4 * math.pi) ** (ndim / 2) * kappa2**smoothness * variance)
    laplacian = sum(D.T @ D for D in (_differences(grid, (axis,)) for axis in range(ndim)))
    powers = itertools.accumulate([laplacian] * alpha, operator.matmul, initial=scipy.sparse.eye_array(math.prod(grid)))
    terms = [StencilPrecision.from_matrix(power, grid) for power in powers]
    # It has every offset of the lower powers: whatever m, the entries of Gᵐ at odd distances are ≤ 0, the others ≥ 0, so that
    # nothing cancels from one power to the next.
    stencil = terms[-1].stencil
    diag = off_diag = 0
    for m, term in enumerate(terms):
        weight = math.comb(alpha, m) * tau2 * kappa2 ** (alpha - m)
        where = torch.tensor([stencil.offsets.index(offset) for offset in term.stencil.offsets], dtype=torch.int64)
        entries = torch.zeros(len(stencil), *grid, dtype=torch.float64).index_copy(0, where, term.off_diag)
        diag = diag + weight * term.diag.to(weight)
        off_diag = off_diag + weight.unsqueeze(-ndim - 1) * entries.to(weight)
    return StencilPrecision(diag, off_diag, stencil)


def car_precision(
    grid: Sequence[int],
    dependence: float | Tensor,
    variance: float | Tensor = 1.0,
    neighbours: Stencil | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The conditional autoregression: each site, given all others, varies about a fraction of its neighbours' mean.

    x_j | others ~ N(dependence · mean of its d_j neighbours, variance / d_j), hence Λ = (D - dependence · W) / variance, W the
    adjacency and D the numbers of neighbours. Besag, Spatial interaction and the statistical analysis of lattice systems,
    JRSS B 1974.

    Args:
        grid: numbers of sites along each axis.
        dependence: less than 1 in magnitude; at 1 the field would have no proper mean.
        variance: the conditional variance of a site times its number of neighbours.
        neighbours: the forward half of the neighbourhood; None is the nearest neighbours along the axes.
        dtype, device: of the result.

    Raises:
        TypeError: ``neighbours`` is not a `Stencil`.
        ValueError: a parameter out of its range, neighbours on another number of axes, or a site without any.
    """
    ndim = len(grid)
    neighbours = Stencil.cross(1, ndim) if neighbours is None else neighbours
    check_stencil(neighbours, "neighbours", ndim)
    variance = _positive("variance", variance, ndim, dtype, device)
    dependence = torch.as_tensor(dependence, dtype=dtype, device=device)
    if not (dependence.detach().abs() < 1).all():
        raise ValueError(f"dependence is {dependence.tolist()}, expected less than 1 in magnitude")
    exists = neighbours.mask(grid, device).to(dtype)
    degree = exists.sum(0)
    for k, offset in enumerate(neighbours.offsets):
        here, there = overlap(offset, grid)
        degree[there] += exists[k][here]
    if not degree.all():
        site = tuple((degree == 0).nonzero()[0].tolist())
        raise ValueError(f"site {site} of grid {tuple(grid)} has no neighbours, expected at least one for every site")
    weight = dependence.reshape(*dependence.shape, *[1] * ndim) / variance
    return StencilPrecision(degree / variance, -weight.unsqueeze(-ndim - 1) * exists, neighbours)


def thin_plate_precision(
    grid: Sequence[int],
    bending: float | Tensor,
    ridge: float | Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> StencilPrecision:
    """The prior behind thin plate splines: the energy of a bent plate, made proper by a ridge.

    xᵀΛx = bending · Σ (x_aa² + 2 x_ab² + ...) + ridge · Σ x², the second differences x_ab, of each pair of axes, taken wherever
    they exist. Without the ridge Λ is intrinsic: constants and planes have no energy. Rue and Held, Gaussian Markov random
    fields, 2005.

    Args:
        grid: numbers of sites along each axis.
        bending: the weight of the squared second differences.
        ridge: the weight of the squared values.
        dtype: of the result. In float32 the factorisation fails for ridges far below ``bending``.
        device: of the result.

    Raises:
        ValueError: a weight that is not positive.
    """
    ndim = len(grid)
    bending = _positive("bending", bending, ndim, dtype, device)
    ridge = _positive("ridge", ridge, ndim, dtype, device)
    energy = sum(D.T @ D for D in (_differences(grid, pair) for pair in itertools.product(range(ndim), repeat=2)))
    plate = StencilPrecision.from_matrix(energy, grid)
    diag, off_diag = plate.diag.to(bending), plate.off_diag.to(bending)
    return StencilPrecision(bending * diag + ridge, bending.unsqueeze(-ndim - 1) * off_diag, plate.stencil)


def _differences(grid: Sequence[int], axes: Sequence[int]) -> scipy.sparse.csr_array:
    """The first differences along each of these axes in turn, wherever they exist: (places, n)."""
    sizes = list(grid)
    matrix = scipy.sparse.eye_array(math.prod(grid), format="csr")
    for axis in axes:
        parts = sizes[:axis], sizes[axis : axis + 1], sizes[axis + 1 :]
        before, along, after = (scipy.sparse.eye_array(math.prod(part), format="csr") for part in parts)
        matrix = scipy.sparse.kron(scipy.sparse.kron(before, along[1:] - along[:-1]), after, format="csr") @ matrix
        sizes[axis] = max(sizes[axis] - 1, 0)
    return matrix


def _positive(name: str, value: float | Tensor, ndim: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A parameter as a tensor (*batch, 1, ..., 1) with as many axes of size 1 as the grid has."""
    value = torch.as_tensor(value, dtype=dtype, device=device)
    if not ((value.detach() > 0) & value.detach().isfinite()).all():
        raise ValueError(f"{name} is {value.tolist()}, expected finite and positive")
    return value.reshape(*value.shape, *[1] * ndim)
