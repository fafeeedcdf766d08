"""The linear systems of a posterior, with A = Λ_ff + W on the free sites: directly, by one factorisation, or by iteration.

Direct: a Cholesky factor by elimination of blocks of rows, made once and kept. Samples, determinants and variances need it;
means merely can use it. Iterative: conjugate gradients, which form no matrix.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import gmrf_kernels

from ..cholesky import StencilCholesky, squares_matvec
from ..recursions.covariances import check_exact_is_affordable, exact_is_affordable
from ..recursions.elimination import BlockCholesky, add_padded, block_cholesky
from ..recursions.solve_and_logdet import solve_and_logdet
from ..recursions.strips import block_coefficients, block_rows, strip
from ..stencil import as_integer
from ..transformations import is_transformed, is_transforming
from .conjugate_gradients import Convergence, ImplicitGradient, conjugate_gradients, relative_residual
from .noise import ObservationModel

METHODS = ("auto", "direct", "iterative")
# What "auto" factorises: a few seconds and half a gigabyte on two cores. Beyond, the iteration finds a mean sooner.
_AUTO_OPERATIONS = 2**35
_AUTO_NUMBERS = 2**26
_MAX_NUMBERS = 2**30
_MAX_DENSE_SITES = 2**13


class PosteriorSystem:
    """Systems with A, which is Λ_ff + W on the free sites and the identity on the others; in float64.

    Args:
        factor: the prior's factor L, Λ = L Lᵀ, in float64.
        known: bool (*batch, *grid), the sites that are not free.
        model: the model of the observations, which says what W is.
        method: "direct", "iterative", or "auto", which is direct where that takes a few seconds at most.
        tolerance, max_iterations: of the iteration, see `conjugate_gradients`.

    Attributes:
        direct: the method that was chosen.
        convergence: that of the last solve; None before the first.

    Raises:
        TypeError: ``max_iterations`` is not an integer.
        ValueError: another method; ``tolerance`` is not between 0 and 1, ``max_iterations`` less than 1; a grid that is too
            large for the method "direct".
    """

    convergence: Convergence | None = None
    _kept: BlockCholesky | None = None
    _kept_versions: list[int] | None = None
    _kept_preconditioner: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        factor: StencilCholesky,
        known: Tensor,
        model: ObservationModel,
        method: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected 'auto', 'direct' or 'iterative'")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}, expected more than 0 and less than 1")
        if as_integer("max_iterations", max_iterations) < 1:
            raise ValueError(f"max_iterations is {max_iterations}, expected at least 1")
        self.known, self.prior_factor, self._model = known, factor, model
        self._tolerance, self._max_iterations = tolerance, max_iterations
        if method == "auto":
            batch = torch.broadcast_shapes(factor.batch_shape, known.shape[: -len(factor.grid)], model.batch_shape).numel()
            operations, numbers = (batch * size for size in self._size())
            self.direct = operations <= _AUTO_OPERATIONS and numbers <= _AUTO_NUMBERS
        else:
            self.direct = method == "direct"
            if self.direct:
                self.check_factorisable("method 'direct'")

    @property
    def factorisable(self) -> bool:
        """Whether a factor of A is small enough: n (r + 1)² W² ≤ 2⁴⁰ operations, 2³⁰ numbers, 8192 sites where A is dense."""
        if self._model.reach is None:
            return self.prior_factor.grid.numel() <= _MAX_DENSE_SITES
        return exact_is_affordable(self.prior_factor, self._reach) and self._size()[1] <= _MAX_NUMBERS

    def check_factorisable(self, name: str) -> None:
        """Raise ValueError for what ``name`` does with a factor of A, unless the system is `factorisable`."""
        grid = self.prior_factor.grid
        if self._model.reach is None and grid.numel() > _MAX_DENSE_SITES:
            raise ValueError(f"{name} with an operator needs at most {_MAX_DENSE_SITES} sites, the grid {tuple(grid)} has more")
        if self._model.reach is not None:
            check_exact_is_affordable(name, self.prior_factor, self._reach)
        if not self.factorisable:
            raise ValueError(f"{name} needs n (r + 1) W ≤ 2³⁰, which the grid {tuple(grid)} exceeds")

    def product(self, x: Tensor) -> Tensor:
        """A x, (*sample, *batch, *grid)."""
        free = x.masked_fill(self.known, 0)
        return (self.prior_product(free) + self._model.precision(free)).where(~self.known, x)

    def prior_product(self, x: Tensor) -> Tensor:
        """Λ x, (*sample, *batch, *grid)."""
        return self.prior_factor.matvec(self.prior_factor.matvec(x, transpose=True))

    def solve(self, b: Tensor) -> Tensor:
        """A⁻¹b, (*sample, *batch, *grid), by the method chosen.

        Differentiable once in A and as often as asked in b; directly, any number of times under torch's transformations.

        Raises:
            NotImplementedError: the iteration under a transformation, which it would differentiate step by step.
        """
        if not self.direct:
            if self._is_transformed() or is_transformed(b):
                raise NotImplementedError(
                    "the method 'iterative' takes no transformations of torch.func, no forward derivatives: expected 'direct'"
                )
            x = self._iterate(b)
            return x + ImplicitGradient.apply(b - self.product(x), self._iterate) if torch.is_grad_enabled() else x
        if self._is_transformed():
            return self.solve_with(self._factorise(), b)
        kept = self._factor_kept()
        if not self._is_differentiated():
            x = self.solve_with(kept, b)
        else:
            x = self.solve_with(kept, b.detach())
            x = x + ImplicitGradient.apply(b - self.product(x), lambda r: self.solve_with(kept, r))
        if not is_transformed(b):
            with torch.no_grad():
                self.convergence = Convergence(0, relative_residual(b - self.product(x), b, len(self.prior_factor.grid)))
        return x

    def solve_and_logdet(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A⁻¹b, directly whatever the method, and log |A|: (*sample, *batch, *grid) and (*batch).

        Differentiable any number of times, by autograd and under torch's transformations.
        """
        if torch.compiler.is_compiling() or self._is_transformed() or is_transformed(b) or not self._is_differentiated():
            factor = self.factor()
            return self.solve_with(factor, b), factor.logdet()
        grid = self.prior_factor.grid
        x, logdet = solve_and_logdet(*self._sum_of_blocks(), self._factor_kept(), b.flatten(-len(grid)))
        return x.unflatten(-1, grid), logdet

    def logdet(self) -> Tensor:
        """log |A|, (*batch)."""
        return self.solve_and_logdet(torch.zeros(self.prior_factor.grid, dtype=torch.float64, device=self.prior_factor.device))[
            1
        ]

    def factor(self) -> BlockCholesky:
        """The factor of A: the one that is kept, or one with a graph where a derivative by A is asked for."""
        return self._factorise() if self._is_differentiated() or self._is_transformed() else self._factor_kept()

    def solve_with(self, factor: BlockCholesky, b: Tensor, root: bool = False) -> Tensor:
        """A⁻¹b with a factor C of A, or C⁻ᵀb; vectors (*sample, *batch, *grid)."""
        grid = self.prior_factor.grid
        x = (factor.solve_root if root else factor.solve)(b.flatten(-len(grid)))
        return x.unflatten(-1, grid)

    def precision_diagonal(self) -> Tensor | None:
        """That of A on the free sites, (*batch, *grid); None where it is not known."""
        if self._model.diagonal is None:
            return None
        return squares_matvec(self.prior_factor, torch.ones_like(self.prior_factor.diag)) + self._model.diagonal

    @property
    def _reach(self) -> int:
        return max(self.prior_factor.stencil.row_reach, self._model.reach)

    def _size(self) -> tuple[int, int]:
        """Operations and numbers of a factorisation, of one of the batch."""
        grid = self.prior_factor.grid
        window = grid.numel() if self._model.reach is None else (self._reach + 1) * math.prod(grid[1:])
        return grid.numel() * window**2, grid.numel() * window

    def _factor_kept(self) -> BlockCholesky:
        versions = None
        if not torch.compiler.is_compiling():
            versions = [0 if t.is_inference() else t._version for t in self.prior_factor.coefficients[:2]]
        if self._kept is None or versions != self._kept_versions:  # an optimiser may have changed them in place
            with torch.no_grad():
                self._kept, self._kept_versions = self._factorise(), versions
        return self._kept

    def _factorise(self) -> BlockCholesky:
        """By elimination of one block of rows after the other."""
        return block_cholesky(*self._sum_of_blocks())

    def _sum_of_blocks(self) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[tuple], list[int], torch.device]:
        """A as `block_cholesky` takes it: Λ_ff is the sum of L_f L_fᵀ over its columns."""
        factor, grid = self.prior_factor, self.prior_factor.grid
        ndim, rows, device = len(grid), grid[0], factor.device
        known = self.known.flatten(-ndim).to(torch.float64)
        if self._model.reach is None:
            root = factor.to_dense() * (1 - known)[..., None]
            free = (1 - known)[..., None] * (1 - known)[..., None, :]
            dense = root @ root.mT + free * self._model.matrix()
            return lambda dense: (dense, known), [(dense,)], [grid.numel()], device
        row = math.prod(grid[1:])
        blocks = block_rows(grid)

        def contribution(block: tuple[int, int], coefficients: Tensor, observations: Tensor) -> tuple[Tensor, Tensor]:
            own = slice(block[0] * row, block[1] * row)
            columns = strip(coefficients, factor.stencil, rows - block[0])
            columns = columns * (1 - known[..., own.start : own.start + columns.shape[-2], None])
            observed, diagonal = self._model.gram(observations, rows - block[0])
            gram = columns @ columns.mT
            return gram if observed is None else add_padded(gram, observed), known[..., own] + diagonal

        parts = list(zip(blocks, block_coefficients(factor), self._model.blocks(), strict=True))
        return contribution, parts, [(stop - start) * row for start, stop in blocks], device

    def _probe(self) -> Tensor:
        return self.product(torch.ones(self.prior_factor.grid, dtype=torch.float64, device=self.prior_factor.device))

    def _is_differentiated(self) -> bool:
        """Whether A depends on something whose gradient is asked for."""
        return torch.is_grad_enabled() and self._probe().requires_grad

    def _is_transformed(self) -> bool:
        """Whether A depends on something that a transformation of torch maps over or differentiates."""
        return is_transforming() and is_transformed(self._probe())

    @torch.no_grad()
    def _iterate(self, b: Tensor) -> Tensor:
        if self._kept_preconditioner is None:
            self._kept_preconditioner = self._preconditioner()
        preconditioner = self._kept_preconditioner
        x, self.convergence = conjugate_gradients(
            self.product, b, preconditioner, len(self.prior_factor.grid), self._tolerance, self._max_iterations
        )
        if not self.convergence.residual <= self._tolerance:
            warnings.warn(
                f"conjugate gradients stopped after {self.convergence.iterations} iterations at a relative residual of "
                f"{self.convergence.residual:.1e}, above the tolerance of {self._tolerance:.1e}",
                RuntimeWarning,
                stacklevel=2,
            )
        return x

    def _preconditioner(self) -> Callable[[Tensor], Tensor]:
        """An approximation of A⁻¹: that of the model, or the prior's factor, with W on its diagonal."""
        if self._model.diagonal is None:
            return self._model.preconditioner(self.prior_factor)
        M = self._enlarged_factor()
        return lambda r: M.solve(M.solve(r), transpose=True)

    def _enlarged_factor(self) -> StencilCholesky:
        """The prior's factor on the free sites, its diagonal enlarged so that that of Λ_ff + W is met exactly.

        What a free site owes to the columns of known ones counts like the noise: it is missing from the product with Lᵀ.
        """
        factor, known = self.prior_factor, self.known.double()
        owed = squares_matvec(factor, known)
        diag = (factor.diag.square() + self._model.diagonal.clamp(min=0) + owed).sqrt()
        _, both_free = gmrf_kernels.outer(1 - known, 1 - known, factor.stencil.offsets, factor.stencil.ndim)
        off_diag = factor.coefficients.off_diag.where(both_free > 0, 0)
        return StencilCholesky(diag.log().masked_fill(self.known, 0), off_diag, factor.stencil)
