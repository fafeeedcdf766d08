"""`LowRankGMRF`: a Gaussian Markov random field plus a few whole-grid fields with random weights."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, check_vector
from gmrf_kernels.low_rank import capacitance_logdet

from .analysis.marginals import VarianceEstimate
from .batched import Batched, expanded, register_pytree
from .cholesky import StencilCholesky
from .factors import (
    added_covariance,
    added_variance,
    mixture,
    products,
    random_mixture,
    rank_first,
    rank_last,
)
from .gmrf import GMRF
from .inference.constraints import ConstrainedGMRF
from .inference.inferred_field import InferredField
from .inference.low_rank_posterior import LowRankPosterior
from .low_rank_density import log_density, whitened_factors
from .operators.base import LinearOperator
from .stencil import Stencil
from .transformations import without_autocast
from .validation import Finite, broadcast_fields, warn_of_missing_rank


@register_pytree("banded_gmrf.LowRankGMRF")
@dataclasses.dataclass(init=False, eq=False, repr=False)  # of the fields alone: see `Batched`
class LowRankGMRF(InferredField, Batched):
    """x = loc + L⁻ᵀu + Σ_r factors[r] w_r with u ~ N(0, I) and w ~ N(0, I): covariance Λ⁻¹ + Σ_r factors[r] factors[r]ᵀ.

    A GMRF has what neighbours share; each factor adds what sites at any distance share, such as brightness, or both eyes. A
    `torch.distributions.Distribution` with ``event_shape`` = grid; log densities and entropies are in nats. `to`, `detach` and
    indexing work as for a tensor that has the batch axes alone, and a distribution is a pytree node.

    A density whitens all R factors: beside a GMRF's it costs R products with Lᵀ, and the n R² operations of their Gram matrix.
    A sample costs R multiplications for each site more. See ``banded_gmrf/factors.py`` for the formulas, and Monteiro et al.,
    Stochastic Segmentation Networks, NeurIPS 2020, for the low-rank part beside independent sites.

    Factors may be 0, equal to each other, or large: the Gram matrix is computed in float64, and is positive definite while the
    whitened factors Lᵀf have norms below about 10⁷. Beyond, `log_prob` and `entropy` of factors that are nearly parallel are
    wrong by nats, or NaN.

    Args:
        loc: the mean, (*batch, *grid), of the factor's dtype (float32 is accepted beside float16 and bfloat16).
        precision_cholesky: the factor L of the local precision Λ = L Lᵀ.
        factors: (*batch, R, *grid), in the units of x; dtype as for ``loc``. R = 0 is a plain GMRF. The batches of all three
            are broadcast, and neither L nor the factors are copied.
        validate_args: check that all are finite, and samples given to `log_prob`; None takes torch's default.

    Raises:
        TypeError: ``precision_cholesky`` is not a `StencilCholesky`, or the dtypes differ.
        ValueError: grids, batches or devices that do not fit; more factors than the grid has sites; with ``validate_args``, NaN
            or infinity.

    Warns:
        UserWarning: factors without batch axes are as many as the batch has distributions: perhaps one is meant for each.
    """

    loc: Tensor
    precision_cholesky: StencilCholesky
    factors: Tensor
    validate_args: bool | None

    _conditioned, _own = "_local", ("_factors",)

    def __init__(self, loc: Tensor, precision_cholesky: StencilCholesky, factors: Tensor, validate_args: bool | None = None):
        local = GMRF(loc, precision_cholesky, validate_args)
        grid = local.event_shape
        ndim = len(grid)
        check_vector("factors", factors, "precision_cholesky", precision_cholesky.coefficients.off_diag, grid)
        if factors.ndim <= ndim:
            raise ValueError(f"factors has shape {tuple(factors.shape)}, expected (*batch, R, {', '.join(map(str, grid))})")
        rank = factors.shape[-ndim - 1]
        if rank > math.prod(grid):
            raise ValueError(f"factors has {rank} factors, expected at most as many as the grid {tuple(grid)} has sites")
        if factors.ndim == ndim + 1:
            warn_of_missing_rank(factors.shape, local.batch_shape)
        batch = broadcast_fields("factors", factors.shape[: -ndim - 1], "the local field", local.batch_shape)
        self._local = local if batch == local.batch_shape else local.expand(batch)
        self._factors = factors
        super().__init__(batch, grid, validate_args=validate_args)

    @property
    def arg_constraints(self):
        return {**self._local.arg_constraints, "factors": Finite(len(self._event_shape) + 1)}

    @property
    def local(self) -> GMRF:
        """The field without its low-rank part, loc + L⁻ᵀu, of the whole batch."""
        return self._local

    @property
    def loc(self) -> Tensor:
        """(*batch, *grid)."""
        return self._local.loc

    @property
    def precision_cholesky(self) -> StencilCholesky:
        """The factor L, expanded to ``batch_shape`` without a copy."""
        return self._local.precision_cholesky

    @property
    def factors(self) -> Tensor:
        """(*batch, R, *grid), expanded to ``batch_shape`` without a copy."""
        return expanded(self._factors, len(self._event_shape) + 1, self._batch_shape)

    @property
    def log_diag(self) -> Tensor:
        """Log-diagonal of L, (*batch, *grid)."""
        return self._local.log_diag

    @property
    def off_diag(self) -> Tensor:
        """Off-diagonals of L, (*batch, K-1, *grid)."""
        return self._local.off_diag

    @property
    def stencil(self) -> Stencil:
        """Shape of the columns of L."""
        return self._local.stencil

    @property
    def rank(self) -> int:
        """R, the number of factors."""
        return self._factors.shape[-len(self._event_shape) - 1]

    @property
    def validate_args(self) -> bool | None:
        """As at construction; None where torch's default was taken."""
        return self.__dict__.get("_validate_args")

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "LowRankGMRF":
        """The distribution repeated over a larger batch; nothing is copied.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        return self._expanded(self._get_checked_instance(LowRankGMRF, _instance), batch_shape)

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self._local.loc

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Marginal variances with their standard errors, those of the local field; arguments and errors as for `GMRF`."""
        local, error = self._local.marginal_variance(method, num_samples)
        variance = local + added_variance(self._factors.to(accumulate_dtype(local.dtype)), len(self._event_shape))
        return VarianceEstimate(variance.to(local.dtype), error)

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites; arguments, shapes and errors as for `GMRF.covariance_columns`."""
        columns = self._local.covariance_columns(sites)
        return columns + added_covariance(self.factors.to(columns.dtype), sites, self._event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """Σ as a dense matrix (*batch, n, n), sites in raster order, for n ≤ 8192 sites.

        Raises:
            ValueError: more sites.
        """
        local = self._local.covariance_matrix
        rows = self._factors.to(local.dtype).flatten(-len(self._event_shape))
        with without_autocast(rows):
            return local + rows.mT @ rows

    @property
    def precision_factors(self) -> Tensor:
        """U = L V C⁻ᵀ, with which the precision is Λ - Σ_r U[r] U[r]ᵀ: (*batch, R, *grid) in float64."""
        ndim = len(self._event_shape)
        whitened, root = self._capacitance()
        rows = torch.linalg.solve_triangular(root, whitened.flatten(-ndim), upper=False).unflatten(-1, self._event_shape)
        factor = self._local.precision_cholesky.unexpanded().to(torch.float64)
        return rank_last(factor.matvec(rank_first(rows, ndim, len(self._batch_shape))), ndim)

    @property
    def precision_matrix(self) -> Tensor:
        """Σ⁻¹ as a dense matrix (*batch, n, n), sites in raster order, for n ≤ 8192 sites.

        Raises:
            ValueError: more sites.
        """
        local = self._local.precision_matrix
        rows = self.precision_factors.flatten(-len(self._event_shape))
        return (local - rows.mT @ rows).to(local.dtype)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable in ``loc``, the factor L and the factors."""
        x = self._local.rsample(sample_shape)
        return (x + random_mixture(self._factors, x, len(self._event_shape))).to(x.dtype)

    def whiten(self, value: Tensor) -> Tensor:
        """T⁻¹Lᵀ(value - loc) with T Tᵀ = I + V Vᵀ, V = LᵀF: standard normal if ``value`` follows this distribution.

        T⁻¹ = I - V (C + I)⁻ᵀC⁻¹Vᵀ for the root C of I + VᵀV (Andrews, A square root formulation of the Kalman covariance
        equations, AIAA Journal 1968).

        Returns:
            (*sample, *batch, *grid), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for `GMRF.whiten`.
        """
        ndim = len(self._event_shape)
        y, (whitened, root) = self._local.whiten(value), self._capacitance()
        half = torch.linalg.solve_triangular(root, products(whitened, y, ndim).unsqueeze(-1), upper=False)
        plus = root + torch.eye(self.rank, dtype=root.dtype, device=root.device)
        weights = torch.linalg.solve_triangular(plus.mT, half, upper=True).squeeze(-1)
        return (y - mixture(weights, whitened, ndim)).to(y.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for `whiten`; with ``validate_args`` also for NaN.
        """
        self.check_field("value", value)
        if self._validate_args and value.numel() > 0:  # torch's check of the support fails on no values at all
            self._validate_sample(value)
        residual = value.to(accumulate_dtype(value.dtype)) - self.loc
        return log_density(residual, self.precision_cholesky.unexpanded(), self._factors)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (*batch)."""
        local = self._local.entropy()
        return (local + capacitance_logdet(self._capacitance()[1])).to(local.dtype)

    def condition(
        self,
        mask: Tensor,
        values: Tensor,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        *,
        method: str = "auto",
    ) -> LowRankPosterior:
        """The distribution given the values of some sites; arguments and errors as for `GMRF.condition`."""
        check_vector("values", values, "the distribution", self.loc, self._event_shape)
        local = self._local.to(torch.float64).condition(mask, values.double(), tolerance, max_iterations, method=method)
        return LowRankPosterior(self, local, self._validate_args)

    def posterior(
        self,
        observation: Tensor,
        noise_variance: Tensor | float | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        *,
        noise: GMRF | None = None,
        operator: LinearOperator | None = None,
        method: str = "auto",
    ) -> LowRankPosterior:
        """The distribution given observation = x + noise, or A x + noise; arguments and errors as for `GMRF.posterior`."""
        local = self._local.posterior_in_double(
            observation, noise_variance, tolerance, max_iterations, noise=noise, operator=operator, method=method
        )
        return LowRankPosterior(self, local, self._validate_args)

    def constrain(self, A: Tensor | LinearOperator, e: Tensor) -> ConstrainedGMRF:
        """The distribution given that A x = e exactly; see `GMRF.constrain`."""
        return ConstrainedGMRF(self, A, e, self._validate_args)

    def check_field(self, name: str, field: Tensor) -> None:
        """Check that a field (*sample, *batch, *grid) fits the distribution; see `GMRF.check_field`."""
        self._local.check_field(name, field)

    def mean_in_double(self) -> Tensor:
        """The mean in float64, (*batch, *grid)."""
        return self._local.mean_in_double()

    def free_sites(self) -> None:
        """None: no site is known exactly."""
        return None

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ x in float64, of vectors (*sample, *batch, *grid) in float64."""
        ndim, factors = len(self._event_shape), self._factors.double()
        return self._local.covariance_times(x) + mixture(products(factors, x, ndim), factors, ndim)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {getattr(self, name).shape}" for name in self.arg_constraints)
        return f"{type(self).__name__}({shapes})"

    def _capacitance(self) -> tuple[Tensor, Tensor]:
        """V = LᵀF, (*batch, R, *grid), and the root of I + VᵀV; both in float64."""
        return whitened_factors(self._local.precision_cholesky.unexpanded(), self._factors, len(self._batch_shape))

    def _parts(self) -> dict[str, tuple[Tensor | GMRF, int]]:
        return {"local": (self._local, 0), "factors": (self._factors, self.stencil.ndim + 1)}

    def _static(self) -> bool | None:
        return self.validate_args

    @classmethod
    def _from_parts(cls, static, parts, batch_shape=None) -> "LowRankGMRF":
        new = cls.__new__(cls)
        new._local, new._factors = parts
        if static is not None:
            new._validate_args = static
        known = isinstance(new._local, GMRF)  # transformations of torch also put in what only holds a place
        new._batch_shape, new._event_shape = (new._local.batch_shape, new._local.event_shape) if known else (torch.Size(),) * 2
        return new
