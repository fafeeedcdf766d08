"""The Gaussian Markov random field as a torch distribution."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from gmrf_kernels.ops import accumulate_dtype, broadcast_batch, check_vector

from . import marginals
from .cholesky import StencilCholesky, negative_log_likelihood
from .marginals import VarianceEstimate
from .stencil import Stencil


class _Finite(constraints.Constraint):
    """Tensors (*batch, *grid) without NaN or infinity."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return value.isfinite().flatten(-self.event_dim).all(-1)


class _FiniteWhereItExists(constraints.Constraint):
    """Off-diagonals (*batch, K-1, *grid) whose existing entries are finite; the others are ignored."""

    def __init__(self, stencil: Stencil):
        self._stencil = stencil
        self.event_dim = stencil.ndim + 1
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        batch = value.shape[: -self.event_dim]
        for axis, stride in enumerate(value.stride()[: len(batch)]):
            if stride == 0 and batch[axis] > 1:  # one factor shared along a batch axis is checked once
                value = value.narrow(axis, 0, 1)
        exists = self._stencil.mask(value.shape[-self._stencil.ndim :], device=value.device)
        return (value.isfinite() | ~exists).flatten(-self.event_dim).all(-1).expand(batch)


class GMRF(Distribution):
    """Gaussian Markov random field x ~ N(loc, Λ⁻¹), Λ = L Lᵀ, on a grid of 1 to 3 axes.

    A `torch.distributions.Distribution` with ``event_shape`` = grid; log densities and entropies are in nats.

    In a Pyro model use ``banded_gmrf.pyro.GMRF``, the same with the methods that Pyro needs: ``pyro.sample`` takes no plain
    torch distribution. ``import banded_gmrf`` itself never imports Pyro.

    Args:
        loc: the mean, (*batch, *grid), of the factor's dtype (float32 is accepted beside float16 and bfloat16).
        precision_cholesky: the factor L; its batch is broadcast against that of ``loc`` and never copied.
        validate_args: check that ``loc``, ``log_diag`` and the existing entries of ``off_diag`` are finite, and samples given
            to `log_prob`; None takes torch's default. One pass over the coefficients at construction.

    Raises:
        TypeError: ``precision_cholesky`` is not a `StencilCholesky`, or the dtypes differ.
        ValueError: grids, batches or devices that do not fit; with ``validate_args``, NaN or infinity.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, precision_cholesky: StencilCholesky, validate_args: bool | None = None):
        if not isinstance(precision_cholesky, StencilCholesky):
            raise TypeError(f"precision_cholesky is a {type(precision_cholesky).__name__}, expected a StencilCholesky")
        grid = precision_cholesky.grid
        check_vector("loc", loc, "precision_cholesky", precision_cholesky.log_diag, grid)
        batch = broadcast_batch("loc", loc.shape[: loc.ndim - len(grid)], "precision_cholesky", precision_cholesky.batch_shape)
        self.loc = loc.expand(*batch, *grid)
        self._factor = precision_cholesky
        super().__init__(batch, grid, validate_args=validate_args)

    @property
    def arg_constraints(self):
        finite = _Finite(len(self._event_shape))
        return {"loc": finite, "log_diag": finite, "off_diag": _FiniteWhereItExists(self._factor.stencil)}

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def stencil(self) -> Stencil:
        return self._factor.stencil

    @property
    def log_diag(self) -> Tensor:
        """Log-diagonal of the factor, (*batch, *grid)."""
        return self.precision_cholesky.log_diag

    @property
    def off_diag(self) -> Tensor:
        """Off-diagonals of the factor, (*batch, K-1, *grid)."""
        return self.precision_cholesky.off_diag

    @property
    def precision_cholesky(self) -> StencilCholesky:
        """The factor L, expanded to ``batch_shape`` without a copy."""
        return self._factor.expand(self._batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "GMRF":
        new = self._get_checked_instance(GMRF, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, *self._event_shape)
        new._factor = self._factor
        super(GMRF, new).__init__(batch_shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """(*batch, *grid)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, the diagonal of Λ⁻¹: (*batch, *grid); those of `marginal_variance` with its defaults."""
        return self.marginal_variance().variance

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Marginal variances, the diagonal of Λ⁻¹, with their standard errors; differentiable in the factor.

        With n sites in rows of W = n / grid[0] and a stencil that reaches r rows down, exact variances take about
        2 n (r + 1)² W² operations, and memory for a few matrices of (r + 1) W rows. Monte Carlo takes one solve and one
        product with L per sample.

        Args:
            method: "exact"; "monte_carlo", from samples, Rao-Blackwellised over each site given all others (Sidén, Lindgren,
                Bolin & Villani, JCGS 2018); or "auto", which is exact while n (r + 1)² W² ≤ 2⁴⁰ (a 7 x 7 stencil on 512 x 512
                sites) and Monte Carlo beyond.
            num_samples: of Monte Carlo. The standard error is at most √(2 / num_samples) times the variance.

        Returns:
            A named tuple of ``variance`` and ``standard_error``, both (*batch, *grid); the latter is 0 if the method is exact.

        Raises:
            ValueError: another method, or fewer than one sample.
        """
        estimate = marginals.marginal_variance(self._factor, method, num_samples)
        return VarianceEstimate(*(t.to(self.loc.dtype).expand(self.loc.shape) for t in estimate))

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """loc + L⁻ᵀu with u ~ N(0, I): (*sample_shape, *batch, *grid), differentiable in ``loc`` and the factor."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._factor.solve(u, transpose=True)

    def whiten(self, value: Tensor) -> Tensor:
        """Lᵀ(value - loc), standard normal if ``value`` follows this distribution.

        Returns:
            (*sample, *batch, *grid), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError: another dtype than the factor's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        return self._factor.matvec(self._residual(value), transpose=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, Λ⁻¹) in nats.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for `whiten`; with ``validate_args`` also for NaN.
        """
        residual = self._residual(value)
        if self._validate_args and value.numel() > 0:  # torch's check of the support fails on no values at all
            self._validate_sample(value)
        factor = self._factor
        return -negative_log_likelihood(residual, factor._log_diag, factor._off_diag, factor.stencil)

    def entropy(self) -> Tensor:
        """Differential entropy ½ n (1 + log 2π) - log |L| in nats: (*batch,)."""
        n = self._event_shape.numel()
        return (0.5 * n * (1 + math.log(2 * math.pi)) - self._factor.logdet()).expand(self._batch_shape)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {getattr(self, name).shape}" for name in self.arg_constraints)
        return f"{type(self).__name__}({shapes})"

    def _residual(self, value: Tensor) -> Tensor:
        check_vector("value", value, "precision_cholesky", self._factor.log_diag, self._event_shape)
        broadcast_batch("value", value.shape[: value.ndim - len(self._event_shape)], "the distribution", self._batch_shape)
        return value.to(accumulate_dtype(value.dtype)) - self.loc
