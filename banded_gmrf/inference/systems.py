"""The linear systems of a posterior, with A = Λ_ff + W on the free sites: directly, by one factorisation, or by iteration.

Direct: a Cholesky factor, made once and kept, by the prior's own way of elimination, or dense where an operator is observed
through. Samples, determinants and variances need it; means merely can use it. Iterative: conjugate gradients, which form no
matrix.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..recursions.elimination import block_cholesky
from ..recursions.solve_and_logdet import solve_and_logdet
from ..stencil import as_integer
from ..transformations import is_transformed, is_transforming
from .conjugate_gradients import Convergence, ImplicitGradient, conjugate_gradients, relative_residual
from .noise import ObservationModel
from .priors import Factor, Prior, SumOfBlocks, tensor_versions

METHODS = ("auto", "direct", "iterative")
_MAX_DENSE_SITES = 2**13
# What "auto" factorises of dense matrices: a few seconds and half a gigabyte on two cores.
_AUTO_DENSE_OPERATIONS = 2**35
_AUTO_DENSE_NUMBERS = 2**26


class PosteriorSystem:
    """Systems with A, which is Λ_ff + W on the free sites and the identity on the others; in float64.

    Args:
        prior: the field before the observations.
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
    _kept: Factor | None = None
    _kept_versions: list[int] | None = None
    _kept_preconditioner: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        prior: Prior,
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
        self.known, self.prior, self._model = known, prior, model
        self._tolerance, self._max_iterations = tolerance, max_iterations
        if method == "auto":
            batch = torch.broadcast_shapes(prior.batch_shape, known.shape[: -len(prior.grid)], model.batch_shape).numel()
            self.direct = self._auto_is_direct(batch)
        else:
            self.direct = method == "direct"
            if self.direct:
                self.check_factorisable("method 'direct'")

    def check_factorisable(self, name: str) -> None:
        """Raise ValueError for what ``name`` does with a factor of A, if that is too large: see `Prior.check_factorisable`.

        A dense one, where an operator is observed through, is for 8192 sites at most.
        """
        grid = self.prior.grid
        if self._model.reach is not None:
            self.prior.check_factorisable(name, self._model.reach)
        elif grid.numel() > _MAX_DENSE_SITES:
            raise ValueError(f"{name} with an operator needs at most {_MAX_DENSE_SITES} sites, the grid {tuple(grid)} has more")

    def product(self, x: Tensor) -> Tensor:
        """A x, (*sample, *batch, *grid)."""
        free = x.masked_fill(self.known, 0)
        return (self.prior_product(free) + self._model.precision(free)).where(~self.known, x)

    def prior_product(self, x: Tensor) -> Tensor:
        """Λ x, (*sample, *batch, *grid)."""
        return self.prior.product(x)

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
                self.convergence = Convergence(0, relative_residual(b - self.product(x), b, len(self.prior.grid)))
        return x

    def solve_and_logdet(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A⁻¹b, directly whatever the method, and log |A|: (*sample, *batch, *grid) and (*batch).

        Differentiable any number of times, by autograd and under torch's transformations; of a `SparsePrior`, by autograd once.
        """
        blocks = None
        if not (torch.compiler.is_compiling() or self._is_transformed() or is_transformed(b)) and self._is_differentiated():
            blocks = self._sum_of_blocks()
        if blocks is None:
            factor = self.factor()
            return self.solve_with(factor, b), factor.logdet()
        grid = self.prior.grid
        x, logdet = solve_and_logdet(*blocks, self._factor_kept(), b.flatten(-len(grid)))
        return x.unflatten(-1, grid), logdet

    def logdet(self) -> Tensor:
        """log |A|, (*batch)."""
        return self.solve_and_logdet(torch.zeros(self.prior.grid, dtype=torch.float64, device=self.prior.device))[1]

    def factor(self) -> Factor:
        """The factor of A: the one that is kept, or one with a graph where a derivative by A is asked for."""
        return self._factorise() if self._is_differentiated() or self._is_transformed() else self._factor_kept()

    def solve_with(self, factor: Factor, b: Tensor, root: bool = False) -> Tensor:
        """A⁻¹b with a factor C of A, or C⁻ᵀb; vectors (*sample, *batch, *grid)."""
        grid = self.prior.grid
        x = (factor.solve_root if root else factor.solve)(b.flatten(-len(grid)))
        return x.unflatten(-1, grid)

    def precision_diagonal(self) -> Tensor | None:
        """That of A on the free sites, (*batch, *grid); None where it is not known."""
        if self._model.diagonal is None:
            return None
        return self.prior.diagonal() + self._model.diagonal

    def _auto_is_direct(self, batch: int) -> bool:
        if self._model.reach is not None:
            return self.prior.auto_is_direct(batch, self._model.reach)
        n = self.prior.grid.numel()
        return batch * n**3 <= _AUTO_DENSE_OPERATIONS and batch * n**2 <= _AUTO_DENSE_NUMBERS

    def _factor_kept(self) -> Factor:
        versions = tensor_versions(*self.prior.tensors())
        if self._kept is None or versions != self._kept_versions:  # an optimiser may have changed them in place
            with torch.no_grad():
                self._kept, self._kept_versions = self._factorise(), versions
        return self._kept

    def _factorise(self) -> Factor:
        blocks = self._sum_of_blocks()
        return self.prior.factorise(self.known, self._model) if blocks is None else block_cholesky(*blocks)

    def _sum_of_blocks(self) -> SumOfBlocks | None:
        """A as `block_cholesky` takes it; None where the prior has another way of elimination."""
        if self._model.reach is not None:
            return self.prior.sum_of_blocks(self.known, self._model)
        n = self.prior.grid.numel()
        known = self.known.flatten(-len(self.prior.grid)).to(torch.float64)
        free = 1 - known
        dense = self.prior.dense(free) + free[..., None] * free[..., None, :] * self._model.matrix()
        return lambda dense: (dense, known), [(dense,)], [n], self.prior.device

    def _probe(self) -> Tensor:
        return self.product(torch.ones(self.prior.grid, dtype=torch.float64, device=self.prior.device))

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
            self.product, b, preconditioner, len(self.prior.grid), self._tolerance, self._max_iterations
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
        """An approximation of A⁻¹: that of the model, or the prior's where W is near its diagonal."""
        if self._model.diagonal is None:
            return self._model.preconditioner(self.prior)
        return self.prior.preconditioner(self.known, self._model)
