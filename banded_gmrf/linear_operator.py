"""Precision, covariance and factor for the library linear_operator, and so for gpytorch. Nothing else imports this module.

Sites are in raster order: a field (*batch, *grid) is a vector (*batch, n). A product with Σ, or a solve with Λ, is two
triangular solves; a product with Λ, or a solve with Σ, is two products with the factor. Determinants, inverse quadratic forms
and roots for samples are exact, where linear_operator would estimate those of large matrices by conjugate gradients and
Lanczos iterations.
"""

import torch
from linear_operator import LinearOperator
from linear_operator.operators import RootLinearOperator
from torch import Tensor

from .analysis.marginals import marginal_variance
from .cholesky import StencilCholesky, squares_matvec
from .gmrf import GMRF
from .stencil import Stencil


class _FactoredOperator(LinearOperator):
    """What the operators share: how linear_operator stores their arguments, and vectors laid out as fields."""

    def __init__(self, log_diag: Tensor, off_diag: Tensor, stencil: Stencil, **options: bool):
        super().__init__(log_diag, off_diag, stencil=stencil, **options)
        self.factor = StencilCholesky(log_diag, off_diag, stencil)

    @classmethod
    def of(cls, field: GMRF | StencilCholesky, **options: bool):
        """The operator of a distribution, or of the distribution with a given factor.

        Raises:
            TypeError: neither a `GMRF` nor a `StencilCholesky`.
        """
        factor = field.precision_cholesky if isinstance(field, GMRF) else field
        if not isinstance(factor, StencilCholesky):
            raise TypeError(f"field is a {type(field).__name__}, expected a GMRF or a StencilCholesky")
        return cls(factor.log_diag, factor.off_diag, factor.stencil, **options)

    def _size(self) -> torch.Size:
        n = self.factor.grid.numel()
        return torch.Size((*self.factor.batch_shape, n, n))

    def _expand_batch(self, batch_shape) -> LinearOperator:
        options = {name: value for name, value in self._kwargs.items() if name != "stencil"}
        return type(self).of(self.factor.expand(batch_shape), **options)


class CholeskyOperator(_FactoredOperator):
    """The factor L as a `linear_operator.LinearOperator` (*batch, n, n), or its transpose, its inverse, or both.

    Args:
        log_diag, off_diag, stencil: as for `StencilCholesky`; ``CholeskyOperator.of`` takes them from one.
        transposed: Lᵀ in place of L.
        inverted: L⁻¹ in place of L, or L⁻ᵀ.
    """

    def __init__(self, log_diag: Tensor, off_diag: Tensor, stencil: Stencil, transposed: bool = False, inverted: bool = False):
        super().__init__(log_diag, off_diag, stencil, transposed=transposed, inverted=inverted)
        self._transposed, self._inverted = transposed, inverted

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.ndim == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        operation = self.factor.solve if self._inverted else self.factor.matvec
        # The axis of the columns becomes the sample's: it must not meet an axis of the batch that the columns lack.
        batch = torch.broadcast_shapes(rhs.shape[:-2], self.factor.batch_shape)
        fields = rhs.expand(*batch, *rhs.shape[-2:]).movedim(-1, 0).unflatten(-1, self.factor.grid)
        return operation(fields, transpose=self._transposed).flatten(-len(self.factor.grid)).movedim(0, -1)

    def _transpose_nonbatch(self) -> "CholeskyOperator":
        return CholeskyOperator.of(self.factor, transposed=not self._transposed, inverted=self._inverted)


class _SymmetricOperator(_FactoredOperator):
    """A = R Rᵀ with a root R that is cheap to apply and to invert."""

    def _root(self) -> CholeskyOperator:
        raise NotImplementedError

    def _inverse_root(self) -> CholeskyOperator:
        raise NotImplementedError

    def _log_determinant(self) -> Tensor:
        raise NotImplementedError

    def _matmul(self, rhs: Tensor) -> Tensor:
        root = self._root()
        return root._matmul(root.mT._matmul(rhs))

    def _transpose_nonbatch(self) -> LinearOperator:
        return self

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """A⁻¹ times (*batch, n, k) or (n,), exact; then ``left_tensor`` times that, if it is given."""
        inverse = self._inverse_root()
        solution = inverse.mT._matmul(inverse._matmul(right_tensor))
        return solution if left_tensor is None else left_tensor @ solution

    def _solve(self, rhs: Tensor, preconditioner=None, num_tridiag: int | None = 0) -> Tensor:
        return self.solve(rhs)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """tr(RᵀA⁻¹R) of (*batch, n, k), or its k terms; exact."""
        return self.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """What `inv_quad` gives, and log |A| in nats; both exact."""
        inv_quad = None
        if inv_quad_rhs is not None:
            squares = self._inverse_root()._matmul(inv_quad_rhs).square()
            inv_quad = squares.sum(-1) if inv_quad_rhs.ndim == 1 else squares.sum(-2)
            if reduce_inv_quad and inv_quad_rhs.ndim > 1:
                inv_quad = inv_quad.sum(-1)
        return inv_quad, self._log_determinant() if logdet else torch.zeros((), dtype=self.dtype, device=self.device)

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """R Rᵀ with the exact root R: of the covariance L⁻ᵀ, by which samples are drawn."""
        return RootLinearOperator(self._root())


class PrecisionOperator(_SymmetricOperator):
    """The precision Λ = L Lᵀ as a `linear_operator.LinearOperator` (*batch, n, n).

    Args:
        log_diag, off_diag, stencil: as for `StencilCholesky`; ``PrecisionOperator.of(q)`` takes them from a `GMRF`.
    """

    def _root(self) -> CholeskyOperator:
        return CholeskyOperator.of(self.factor)

    def _inverse_root(self) -> CholeskyOperator:
        return CholeskyOperator.of(self.factor, inverted=True)

    def _log_determinant(self) -> Tensor:
        return 2 * self.factor.logdet()

    def _diagonal(self) -> Tensor:
        return squares_matvec(self.factor, torch.ones_like(self.factor.diag)).flatten(-len(self.factor.grid))


class CovarianceOperator(_SymmetricOperator):
    """The covariance Σ = Λ⁻¹ as a `linear_operator.LinearOperator` (*batch, n, n): of a ``gpytorch`` distribution, say.

    Args:
        log_diag, off_diag, stencil: as for `StencilCholesky`; ``CovarianceOperator.of(q)`` takes them from a `GMRF`.
    """

    def _root(self) -> CholeskyOperator:
        return CholeskyOperator.of(self.factor, transposed=True, inverted=True)

    def _inverse_root(self) -> CholeskyOperator:
        return CholeskyOperator.of(self.factor, transposed=True)

    def _log_determinant(self) -> Tensor:
        return -2 * self.factor.logdet()

    def _diagonal(self) -> Tensor:
        """By `GMRF.marginal_variance` with its defaults."""
        return marginal_variance(self.factor, "auto", 256).variance.flatten(-len(self.factor.grid))
