"""`SparseGMRF`, the Gaussian Markov random field of a sparse precision, of which no factor with a stencil is known."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from gmrf_kernels import standard_normal
from gmrf_kernels.checks import accumulate_dtype, check_vector

from .analysis.marginals import VarianceEstimate
from .batched import Batched, expanded, register_pytree
from .errors import NotPositiveDefiniteError
from .inference.conditioning import Conditionable
from .inference.constraints import ConstrainedGMRF
from .inference.intrinsic import null_space, pins
from .inference.priors import SparsePrior, tensor_versions
from .operators.base import LinearOperator
from .precision_matrix import StencilPrecision
from .recursions.dissection import DissectedCholesky
from .transformations import is_transformed, is_transforming, require
from .validation import Finite, FiniteWhereItExists, as_sample_shape, as_sites, broadcast_fields, unit_vectors

_CHUNK_ELEMENTS = 2**22


@register_pytree("banded_gmrf.SparseGMRF")
@dataclasses.dataclass(init=False, eq=False, repr=False)  # of the fields alone: see `Batched`
class SparseGMRF(Distribution, Batched, Conditionable):
    """Gaussian Markov random field x ~ N(loc, Λ⁻¹) of a sparse precision Λ, on a grid of 1 to 3 axes::

        q = bg.SparseGMRF(torch.zeros(grid, dtype=torch.float64), bg.matern_precision(grid, 39.0, 1))

    For fields that are defined by their precision: Matérn, conditional autoregressions, thin plates. The factor that a `GMRF`
    holds fills the band between the stencil's rows; here one is made by nested dissection, where it is needed first, and kept.
    That of a Matérn field of smoothness 1 on 344 x 403 sites has 24 million numbers in place of 223 million. Exact variances
    take about as long as the factor, and many samples at once little longer. Posteriors are factorised alike, up to 2⁴²
    operations and 2³⁰ numbers: see `ConditionalGMRF`.

    A singular Λ, the precision of an intrinsic field, is taken: such a field has no density and no samples, but it has a
    `posterior`, and those given constraints.

    A `torch.distributions.Distribution` with ``event_shape`` = grid, in nats. All is computed in float64, on the device of Λ
    as a sequence of dense operations on small matrices, and is differentiable in ``loc`` and Λ. Log densities and means are
    differentiable once, by a selected inverse and one more solve; torch's transformations differentiate them any number of
    times, step by step.

    Args:
        loc: the mean, (*batch, *grid), of Λ's dtype (float32 is accepted beside float16 and bfloat16).
        precision: Λ, a `StencilPrecision`; its batch is broadcast against that of ``loc``.
        validate_args: check that ``loc`` and the entries of Λ are finite, and samples given to `log_prob`; None takes torch's
            default.

    Raises:
        TypeError: ``precision`` is not a `StencilPrecision`, or the dtypes differ.
        ValueError: grids, batches or devices that do not fit; with ``validate_args``, NaN or infinity.
        torch.linalg.LinAlgError: of whatever needs a factor, where Λ is not positive definite.
    """

    has_rsample = True

    loc: Tensor
    precision: StencilPrecision
    validate_args: bool | None

    def __init__(self, loc: Tensor, precision: StencilPrecision, validate_args: bool | None = None):
        if not isinstance(precision, StencilPrecision):
            raise TypeError(f"precision is a {type(precision).__name__}, expected a StencilPrecision")
        grid = precision.grid
        check_vector("loc", loc, "precision", precision.off_diag, grid)
        batch = broadcast_fields("loc", loc.shape[: loc.ndim - len(grid)], "precision", precision.batch_shape)
        self.loc = expanded(loc, len(grid), batch)
        self._precision, self._kept = precision, {}
        super().__init__(batch, grid, validate_args=validate_args)
        if self._validate_args:
            for part, finite in (
                (precision.diag, Finite(len(grid))),
                (precision.off_diag, FiniteWhereItExists(precision.stencil)),
            ):
                require(finite.check(part), "precision has NaN or infinite entries, expected finite ones")

    @property
    def arg_constraints(self):
        return {"loc": Finite(len(self._event_shape))}

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def precision(self) -> StencilPrecision:
        """Λ, expanded to ``batch_shape`` without a copy."""
        return expanded(self._precision, 0, self._batch_shape)

    @property
    def validate_args(self) -> bool | None:
        """As at construction; None where torch's default was taken."""
        return self.__dict__.get("_validate_args")

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "SparseGMRF":
        """The distribution repeated over a larger batch; nothing is copied or factorised again.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        new = self._get_checked_instance(SparseGMRF, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, *self._event_shape)
        new._precision, new._kept = self._precision, self._kept
        super(SparseGMRF, new).__init__(batch_shape, self._event_shape, validate_args=False)
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
        """Marginal variances, (*batch, *grid), exact."""
        return self.marginal_variance().variance

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Marginal variances, the diagonal of Λ⁻¹, with their standard errors.

        Args:
            method: "exact", or "auto", which is the same: a selected inverse along the dissection (Takahashi, Fagan & Chen,
                PICA 1973); "monte_carlo", from samples, Rao-Blackwellised over each site given all others (Sidén, Lindgren,
                Bolin & Villani, JCGS 2018).
            num_samples: of Monte Carlo. The standard error is at most √(2 / num_samples) times the variance.

        Returns:
            A named tuple of ``variance`` and ``standard_error``, both (*batch, *grid); the latter is 0 if the method is exact.

        Raises:
            ValueError: another method, or fewer than one sample.
            torch.linalg.LinAlgError: Λ is not positive definite.
        """
        if method not in ("auto", "exact", "monte_carlo"):
            raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if method == "monte_carlo":
            estimate = self._monte_carlo_variance(num_samples)
        else:
            variance = self._factor().inverse_diagonal().unflatten(-1, self._event_shape)
            estimate = variance, torch.zeros_like(variance)
        return VarianceEstimate(*(t.to(self.loc.dtype).expand(self.loc.shape) for t in estimate))

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites, one solve for all of them; arguments as for `GMRF.covariance_columns`.

        Returns:
            (*batch, *grid) for one site, (m, *batch, *grid) for m; in float32 for float16 and bfloat16.
        """
        grid = self._event_shape
        sites = as_sites(sites, grid, self.loc.device)
        units = unit_vectors(sites.reshape(-1, len(grid)), grid, len(self._batch_shape), torch.float64)
        columns = self.covariance_times(units).to(accumulate_dtype(self.loc.dtype))
        columns = columns.expand(len(units), *self._batch_shape, *grid)
        return columns if sites.ndim > 1 else columns[0]

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable in ``loc`` and Λ."""
        shape = self._extended_shape(as_sample_shape(sample_shape))
        u = standard_normal(shape, torch.float64, self.loc.device).flatten(-len(self._event_shape))
        deviation = self._factor().solve_root(u).unflatten(-1, self._event_shape)
        return (self.loc.double() + deviation).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, Λ⁻¹) in nats.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError: another dtype than Λ's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, a batch that does not broadcast; with ``validate_args`` also NaN.
            torch.linalg.LinAlgError: Λ is not positive definite.
        """
        self.check_field("value", value)
        if self._validate_args and value.numel() > 0:  # torch's check of the support fails on no values at all
            self._validate_sample(value)
        log_density = self.prior_in_double().log_density(value.double() - self.loc.double())
        return log_density.to(accumulate_dtype(value.dtype))

    def entropy(self) -> Tensor:
        """Differential entropy ½ n (1 + log 2π) - ½ log |Λ| in nats: (*batch,)."""
        n = self._event_shape.numel()
        entropy = 0.5 * (n * (1 + math.log(2 * math.pi)) - self._factor().logdet())
        return entropy.to(accumulate_dtype(self.loc.dtype)).expand(self._batch_shape)

    def constrain(self, A: Tensor | LinearOperator, e: Tensor) -> ConstrainedGMRF:
        """The distribution given that A x = e exactly, see `GMRF.constrain`; proper also where the field is intrinsic, if the
        constraints determine what Λ does not: a sum, for `car_precision` with a dependence of 1.

        Raises:
            TypeError, ValueError: as for `ConstrainedGMRF`.
            torch.linalg.LinAlgError: Λ has negative directions, or some that neither Λ nor the constraints determine.
        """
        base = self
        try:
            self._factor()
        except NotPositiveDefiniteError:
            base = _PinnedGMRF(self.loc.double(), self._precision.to(torch.float64))
        return ConstrainedGMRF(base, A, e, self._validate_args)

    def prior_in_double(self) -> SparsePrior:
        """What posteriors ask of the distribution."""
        return SparsePrior(self._precision.to(torch.float64), self._factor)

    def with_loc(self, loc: Tensor) -> "SparseGMRF":
        """The same field with another mean, (*batch, *grid); nothing is factorised again."""
        new = SparseGMRF(loc, self._precision, validate_args=False)
        new._kept = self._kept
        return new

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ x in float64, of vectors (*sample, *batch, *grid) in float64."""
        ndim = len(self._event_shape)
        return self._factor().solve(x.flatten(-ndim)).unflatten(-1, self._event_shape)

    def check_field(self, name: str, field: Tensor) -> None:
        """Check that a field (*sample, *batch, *grid) fits the distribution; ``name`` is what an error calls it.

        Raises:
            TypeError: another dtype than Λ's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        check_vector(name, field, "precision", self._precision.off_diag, self._event_shape)
        broadcast_fields(name, field.shape[: field.ndim - len(self._event_shape)], "the distribution", self._batch_shape)

    def __repr__(self) -> str:
        return f"SparseGMRF(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def _factor(self) -> DissectedCholesky:
        """The factor of Λ, made once."""
        precision = self._precision.to(torch.float64)
        if is_transforming() and (is_transformed(precision.diag) or is_transformed(precision.off_diag)):
            return DissectedCholesky(precision)
        versions = tensor_versions(self._precision.diag, self._precision.off_diag)
        if self._kept.get("versions") != versions or "factor" not in self._kept:  # an optimiser may have changed them in place
            self.prior_in_double().check_factorisable("the factor of Λ", 0)
            self._kept.update(factor=DissectedCholesky(precision.detach()), versions=versions)
        return self._kept["factor"].attached_to(precision)

    def _monte_carlo_variance(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Var x_j = 1 / Λ_jj + Var E[x_j | others], the second term from samples of mean 0, as for `GMRF`."""
        grid, precision, factor = self._event_shape, self._precision.to(torch.float64), self._factor()
        shape = (*precision.batch_shape, grid.numel())
        size = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape)))
        squares = torch.zeros((), dtype=torch.float64, device=self.loc.device)
        for start in range(0, num_samples, size):
            u = standard_normal((min(size, num_samples - start), *shape), torch.float64, self.loc.device)
            x = factor.solve_root(u).unflatten(-1, grid)
            squares = squares + (x - precision.matvec(x) / precision.diag).square().sum(0)
        explained = squares / num_samples
        return 1 / precision.diag + explained, explained * math.sqrt(2 / num_samples)

    def _parts(self) -> dict[str, tuple[Tensor | StencilPrecision, int]]:
        return {"loc": (self.loc, self._precision.stencil.ndim), "precision": (self._precision, 0)}

    def _static(self) -> bool | None:
        return self.validate_args

    @classmethod
    def _from_parts(cls, static, parts, batch_shape=None) -> "SparseGMRF":
        new = cls.__new__(cls)
        new.loc, new._precision = parts
        new._kept = {}
        if static is not None:
            new._validate_args = static
        ndim = new._precision.stencil.ndim
        shape = new.loc.shape if isinstance(new.loc, Tensor) else torch.Size()
        new._batch_shape, new._event_shape = shape[: max(0, len(shape) - ndim)], shape[max(0, len(shape) - ndim) :]
        return new


class _PinnedGMRF(SparseGMRF):
    """N(loc, B⁻¹) with B of `inference.intrinsic`, of which an intrinsic field is a limit; what `ConstrainedGMRF` asks of that.

    Densities and entropies are those of N(loc, B⁻¹ + t N Nᵀ) for t to infinity, without ½ k log t, k the dimensions of N.

    Args:
        loc: (*batch, *grid).
        precision: Λ, singular; both in float64.
    """

    def __init__(self, loc: Tensor, precision: StencilPrecision):
        self._null = null_space(precision.detach())
        pinned = precision.diag + pins(precision.detach(), self._null)
        self._intrinsic = precision
        super().__init__(loc, StencilPrecision(pinned, precision.off_diag, precision.stencil), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "_PinnedGMRF":
        new = super().expand(batch_shape, object.__new__(_PinnedGMRF))
        new._null, new._intrinsic = self._null, self._intrinsic
        return new

    def null_space(self) -> Tensor:
        """N, (*batch, n, k)."""
        return self._null

    def log_prob(self, value: Tensor) -> Tensor:
        deviation = value.double() - self.loc
        squares = (deviation * self._intrinsic.matvec(deviation)).flatten(-len(self._event_shape)).sum(-1)
        return 0.5 * (self._logdet() - squares - self._event_shape.numel() * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        return 0.5 * (self._event_shape.numel() * (1 + math.log(2 * math.pi)) - self._logdet()).expand(self._batch_shape)

    def _logdet(self) -> Tensor:
        """log |B| - log |Nᵀ B N|."""
        grid = self._event_shape
        columns = self._null.movedim(-1, 0).unflatten(-1, grid)
        products = self._precision.matvec(columns).flatten(-len(grid)).movedim(0, -1)
        return self._factor().logdet() - torch.logdet(self._null.mT @ products)
