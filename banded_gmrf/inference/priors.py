"""What a posterior asks of its prior N(loc, Λ⁻¹), in float64: products with Λ, densities, and how Λ + W is factorised.

`FactorPrior` knows the factor of Λ, and eliminates block after block of rows. `SparsePrior` knows Λ alone, and factorises by
nested dissection.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import gmrf_kernels

from ..cholesky import StencilCholesky, fused_nats, squares_matvec
from ..precision_matrix import StencilPrecision
from ..recursions.covariances import check_exact_is_affordable
from ..recursions.dissection import DissectedCholesky, dissection_size
from ..recursions.elimination import add_padded
from ..recursions.strips import block_coefficients, block_rows, strip
from ..stencil import Stencil
from .noise import ObservationModel

_MAX_NUMBERS = 2**30
_MAX_OPERATIONS = 2**42
# What "auto" factorises: a few seconds and half a gigabyte on two cores. Beyond, the iteration finds a mean sooner.
_AUTO_OPERATIONS = 2**35
_AUTO_NUMBERS = 2**26
# Of a sparse precision alone, the iteration has no good preconditioner.
_AUTO_SPARSE_OPERATIONS = 2**40
_AUTO_SPARSE_NUMBERS = 2**29


# The arguments of `block_cholesky`.
SumOfBlocks = tuple[Callable[..., tuple[Tensor, Tensor]], list[tuple], list[int], torch.device]


class Factor(Protocol):
    """The factor C of a precision C Cᵀ, of vectors (*sample, *batch, n) in raster order."""

    def logdet(self) -> Tensor: ...

    def solve(self, b: Tensor) -> Tensor: ...

    def solve_root(self, b: Tensor) -> Tensor: ...

    def inverse_diagonal(self) -> Tensor: ...


class Prior(Protocol):
    """The field before observations; all vectors are (*sample, *batch, *grid) in float64.

    Attributes:
        grid, batch_shape, device: as of a `StencilCholesky`.
    """

    grid: torch.Size
    batch_shape: torch.Size
    device: torch.device

    def product(self, x: Tensor) -> Tensor:
        """Λ x."""

    def root(self, u: Tensor) -> Tensor:
        """R u with R Rᵀ = Λ."""

    def diagonal(self) -> Tensor:
        """That of Λ, (*batch, *grid)."""

    def column_spectrum(self, units: Tensor, torus: list[int]) -> Tensor:
        """The spectrum of Λ on a torus as if it were stationary, from its columns at unit vectors (m, *batch, *grid)."""

    def log_density(self, x: Tensor) -> Tensor:
        """log N(x; 0, Λ⁻¹) in nats, (*sample, *batch)."""

    def dense(self, free: Tensor) -> Tensor:
        """Λ_ff, 0 where a site (*batch, n) is not free: (*batch, n, n)."""

    def auto_is_direct(self, batch: int, reach: int) -> bool:
        """Whether a factor of Λ + W, W coupling rows up to ``reach`` apart, takes a few seconds at most."""

    def check_factorisable(self, name: str, reach: int) -> None:
        """Raise ValueError for what ``name`` does with a factor of Λ + W where that would be too large."""

    def tensors(self) -> list[Tensor]:
        """What Λ is made of, as it is stored."""

    def sum_of_blocks(self, known: Tensor, model: ObservationModel) -> SumOfBlocks | None:
        """Λ_ff + W on the free sites, the identity on the others, block by block; None where it is not eliminated so."""

    def factorise(self, known: Tensor, model: ObservationModel) -> Factor:
        """The factor of the same matrix, where `sum_of_blocks` gives none."""

    def preconditioner(self, known: Tensor, model: ObservationModel) -> Callable[[Tensor], Tensor]:
        """An approximation of (Λ_ff + W)⁻¹."""


class FactorPrior:
    """The prior of a `GMRF`, Λ = L Lᵀ.

    Args:
        factor: L, in float64.
    """

    def __init__(self, factor: StencilCholesky):
        self._factor = factor
        self.grid, self.batch_shape, self.device = factor.grid, factor.batch_shape, factor.device

    def product(self, x: Tensor) -> Tensor:
        """Λ x."""
        return self._factor.matvec(self._factor.matvec(x, transpose=True))

    def root(self, u: Tensor) -> Tensor:
        """L u."""
        return self._factor.matvec(u)

    def diagonal(self) -> Tensor:
        """That of Λ."""
        return squares_matvec(self._factor, torch.ones_like(self._factor.diag))

    def column_spectrum(self, units: Tensor, torus: list[int]) -> Tensor:
        """That of the autocorrelation of a column of L, wherever its site is."""
        axes = tuple(range(-len(torus), 0))
        return torch.fft.rfftn(self._factor.matvec(units), s=torus, dim=axes).abs().square().mean(0)

    def log_density(self, x: Tensor) -> Tensor:
        """log N(x; 0, Λ⁻¹) in nats."""
        return -fused_nats(x, *self._factor.coefficients)

    def dense(self, free: Tensor) -> Tensor:
        """Λ_ff."""
        root = self._factor.to_dense() * free[..., None]
        return root @ root.mT

    def auto_is_direct(self, batch: int, reach: int) -> bool:
        """At most 2³⁵ operations and 2²⁶ numbers."""
        operations, numbers = (batch * size for size in self._size(reach))
        return operations <= _AUTO_OPERATIONS and numbers <= _AUTO_NUMBERS

    def check_factorisable(self, name: str, reach: int) -> None:
        """At most n (r + 1)² W² ≤ 2⁴⁰ operations and n (r + 1) W ≤ 2³⁰ numbers."""
        check_exact_is_affordable(name, self._factor, self._reach(reach))
        if self._size(reach)[1] > _MAX_NUMBERS:
            raise ValueError(f"{name} needs n (r + 1) W ≤ 2³⁰, which the grid {tuple(self.grid)} exceeds")

    def tensors(self) -> list[Tensor]:
        """Those of L."""
        return list(self._factor.coefficients[:2])

    def sum_of_blocks(self, known: Tensor, model: ObservationModel) -> SumOfBlocks:
        """By blocks of rows: Λ_ff is the sum of L_f L_fᵀ over its columns."""
        factor, rows, row = self._factor, self.grid[0], math.prod(self.grid[1:])
        known = known.flatten(-len(self.grid)).to(torch.float64)
        blocks = block_rows(self.grid)

        def contribution(block: tuple[int, int], coefficients: Tensor, observations: Tensor) -> tuple[Tensor, Tensor]:
            own = slice(block[0] * row, block[1] * row)
            columns = strip(coefficients, factor.stencil, rows - block[0])
            columns = columns * (1 - known[..., own.start : own.start + columns.shape[-2], None])
            observed, diagonal = model.gram(observations, rows - block[0])
            gram = columns @ columns.mT
            return gram if observed is None else add_padded(gram, observed), known[..., own] + diagonal

        parts = list(zip(blocks, block_coefficients(factor), model.blocks(), strict=True))
        return contribution, parts, [(stop - start) * row for start, stop in blocks], self.device

    def preconditioner(self, known: Tensor, model: ObservationModel) -> Callable[[Tensor], Tensor]:
        """The prior's factor on the free sites, its diagonal enlarged so that that of Λ_ff + W is met exactly.

        What a free site owes to the columns of known ones counts like the noise: it is missing from the product with Lᵀ.
        """
        factor = self._factor
        owed = squares_matvec(factor, known.double())
        diag = (factor.diag.square() + model.diagonal.clamp(min=0) + owed).sqrt()
        off_diag = _between_free(known, factor.coefficients.off_diag, factor.stencil)
        enlarged = StencilCholesky(diag.log().masked_fill(known, 0), off_diag, factor.stencil)
        return lambda r: enlarged.solve(enlarged.solve(r), transpose=True)

    def _reach(self, reach: int) -> int:
        return max(self._factor.stencil.row_reach, reach)

    def _size(self, reach: int) -> tuple[int, int]:
        """Operations and numbers of a factorisation, of one of the batch."""
        window = (self._reach(reach) + 1) * math.prod(self.grid[1:])
        return self.grid.numel() * window**2, self.grid.numel() * window


class SparsePrior:
    """The prior of a `SparseGMRF`.

    Args:
        precision: Λ, in float64.
        factor: gives its factor; asked for where a density or a sample is.
    """

    def __init__(self, precision: StencilPrecision, factor: Callable[[], DissectedCholesky]):
        self._precision, self._factor = precision, factor
        self.grid, self.batch_shape, self.device = precision.grid, precision.batch_shape, precision.diag.device

    def product(self, x: Tensor) -> Tensor:
        """Λ x."""
        return self._precision.matvec(x)

    def root(self, u: Tensor) -> Tensor:
        """Λ C⁻ᵀu = C u."""
        sample = self._factor().solve_root(u.flatten(-len(self.grid)))
        return self.product(sample.unflatten(-1, self.grid))

    def diagonal(self) -> Tensor:
        """That of Λ."""
        return self._precision.diag

    def column_spectrum(self, units: Tensor, torus: list[int]) -> Tensor:
        """That of a column, as it is at the origin."""
        axes = tuple(range(-len(torus), 0))
        columns = torch.fft.rfftn(self.product(units), s=torus, dim=axes)
        return (columns * torch.fft.rfftn(units, s=torus, dim=axes).conj()).real.mean(0)

    def log_density(self, x: Tensor) -> Tensor:
        """log N(x; 0, Λ⁻¹) in nats."""
        squares = (x * self.product(x)).flatten(-len(self.grid)).sum(-1)
        return 0.5 * (self._factor().logdet() - squares - self.grid.numel() * math.log(2 * math.pi))

    def dense(self, free: Tensor) -> Tensor:
        """Λ_ff."""
        return self._precision.to_dense() * free[..., None] * free[..., None, :]

    def auto_is_direct(self, batch: int, reach: int) -> bool:
        """At most 2⁴⁰ operations and 2²⁹ numbers: of 1024 x 1024 sites where Λ reaches two."""
        operations, numbers = (batch * size for size in dissection_size(self.grid, self._precision.stencil))
        return operations <= _AUTO_SPARSE_OPERATIONS and numbers <= _AUTO_SPARSE_NUMBERS

    def check_factorisable(self, name: str, reach: int) -> None:
        """At most 2⁴² operations and 2³⁰ numbers."""
        operations, numbers = dissection_size(self.grid, self._precision.stencil)
        if operations > _MAX_OPERATIONS or numbers > _MAX_NUMBERS:
            raise ValueError(
                f"{name} needs about {operations:.1e} operations and {numbers:.1e} numbers for the grid {tuple(self.grid)}, "
                "expected at most 2⁴² and 2³⁰"
            )

    def tensors(self) -> list[Tensor]:
        """Those of Λ."""
        return [self._precision.diag, self._precision.off_diag]

    def sum_of_blocks(self, known: Tensor, model: ObservationModel) -> None:
        """None: see `factorise`."""

    def factorise(self, known: Tensor, model: ObservationModel) -> DissectedCholesky:
        """By nested dissection."""
        stencil = self._precision.stencil
        diag = (self._precision.diag + model.diagonal).masked_fill(known, 1)
        return DissectedCholesky(StencilPrecision(diag, _between_free(known, self._precision.off_diag, stencil), stencil))

    def preconditioner(self, known: Tensor, model: ObservationModel) -> Callable[[Tensor], Tensor]:
        """The diagonal of Λ + W."""
        diagonal = (self._precision.diag + model.diagonal.clamp(min=0)).masked_fill(known, 1)
        return lambda r: r / diagonal


def _between_free(known: Tensor, off_diag: Tensor, stencil: Stencil) -> Tensor:
    """The off-diagonals between sites neither of which is known, 0 elsewhere."""
    _, both_free = gmrf_kernels.outer(1 - known.double(), 1 - known.double(), stencil.offsets, stencil.ndim)
    return off_diag.where(both_free > 0, 0)


def tensor_versions(*tensors: Tensor) -> list[int] | None:
    """How often each tensor was changed in place; None in a compiled function."""
    if torch.compiler.is_compiling():
        return None
    return [0 if t.is_inference() else t._version for t in tensors]
