"""`LowRankPosterior`: what a field with a low-rank part, x = g + Σ_r factors[r] w_r, is given observations.

Given the weights w, the field is a GMRF's posterior, whose mean moves linearly with w: by G w. The weights given the
observations are normal as well, with the precision

    C Cᵀ = I + (F - G)ᵀΛ(F - G) + GᵀW G

for factors F and the precision W of the observations as seen from the field. So the posterior is again a local field with a
low-rank part: the local one at the mean ŵ of the weights, and the factors G C⁻ᵀ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from gmrf_kernels.checks import accumulate_dtype, check_vector
from gmrf_kernels.low_rank import capacitance_logdet, capacitance_root, solve_capacitance

from ..analysis.marginals import VarianceEstimate
from ..batched import expanded
from ..factors import (
    added_covariance,
    added_variance,
    mixture,
    products,
    random_mixture,
    rank_first,
    rank_last,
)
from ..operators.base import LinearOperator
from ..validation import broadcast_fields
from .constraints import ConstrainedGMRF
from .inferred_field import InferredField
from .posterior import ConditionalGMRF


class LowRankPosterior(InferredField):
    """A `LowRankGMRF` given observations, on the whole grid; made by `LowRankGMRF.condition` and `LowRankGMRF.posterior`.

    A `torch.distributions.Distribution`. Sites that are known exactly have their value in every sample and the variance 0; log
    densities and entropies are those of the other sites. Costs, methods, errors and derivatives are those of
    `ConditionalGMRF`, with one solve more for each factor. All is computed in float64.

    Args:
        prior: a `LowRankGMRF`.
        local: the posterior, in float64, of the prior's local part, the field with all weights at 0.
        validate_args: check samples given to `log_prob`; None takes torch's default.
    """

    _conditioned = "_prior"
    _own = ("_factors", "_log_ratio", "_weights", "_weights_root")

    def __init__(self, prior, local: ConditionalGMRF, validate_args: bool | None = None):
        grid, batch = local.event_shape, local.batch_shape
        super().__init__(batch, grid, validate_args=validate_args)
        self._prior = prior.expand(batch) if batch != prior.batch_shape else prior
        fields = rank_first(self._prior.factors.double(), len(grid), len(batch))
        response = local.respond(fields)
        root = capacitance_root(response.information)
        weights = solve_capacitance(root, response.score)
        self._weights, self._weights_root = weights, root
        factors = rank_last(fields, len(grid))
        self._local = local.with_prior_mean(local.prior.loc + mixture(weights, factors, len(grid)))
        # G S with S = C⁻ᵀ for the root C, in rows.
        rows = torch.linalg.solve_triangular(root, rank_last(response.mean, len(grid)).flatten(-len(grid)), upper=False)
        self._factors = rows.unflatten(-1, grid)
        self._log_ratio = -0.5 * weights.square().sum(-1) - capacitance_logdet(root)  # of p(ŵ) and p(ŵ | observations)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "LowRankPosterior":
        """The distribution repeated over a larger batch; nothing is computed again.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        new = self._expanded(self._get_checked_instance(LowRankPosterior, _instance), batch_shape)
        new._local = self._local.expand(batch_shape)
        return new

    @property
    def prior(self):
        """The `LowRankGMRF` before the observations, expanded to this distribution's batch."""
        return self._prior

    @property
    def factors(self) -> Tensor:
        """Those of this distribution, (*batch, R, *grid) in float64; 0 where a site is known exactly."""
        return expanded(self._factors, len(self._event_shape) + 1, self._batch_shape)

    @property
    def weights(self) -> MultivariateNormal:
        """What the observations say about the weights w: batch ``batch_shape``, events (R,), in float64.

        Raises:
            ValueError: R = 0.
        """
        if self._weights.shape[-1] == 0:
            raise ValueError("the distribution has no factors, expected at least one for the weights of them")
        root = expanded(self._weights_root, 2, self._batch_shape)
        mean = expanded(self._weights, 1, self._batch_shape)
        return MultivariateNormal(mean, torch.cholesky_inverse(root), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self._local.mean.to(self._dtype)

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Variances of all sites, with their standard errors; arguments, result and errors as for `ConditionalGMRF`."""
        local, error = self._local.marginal_variance(method, num_samples)
        variance = local + added_variance(self._factors, len(self._event_shape))
        return VarianceEstimate(variance.to(self._dtype), error.to(self._dtype))

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites; arguments, shapes and errors as for `GMRF.covariance_columns`."""
        columns = self._local.covariance_columns(sites) + added_covariance(self._factors, sites, self._event_shape)
        return columns.to(accumulate_dtype(self._dtype))

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable; one solve for all."""
        x = self._local.rsample(sample_shape)
        return (x + random_mixture(self._factors, x, len(self._event_shape))).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of the free sites in nats; -∞ where a site that is known exactly has another value.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for `ConditionalGMRF.log_prob`.
        """
        grid = self._event_shape
        check_vector("value", value, "the distribution", self._prior.loc, grid)
        broadcast_fields("value", value.shape[: value.ndim - len(grid)], "the distribution", self._batch_shape)
        times_precision, root = self._capacitance()
        residual = value.double() - self._local.mean_in_double()
        weights = solve_capacitance(root, products(times_precision, residual, len(grid)))
        rest = value.double() - mixture(weights, self._factors, len(grid))
        log_density = self._local.log_prob(rest) - 0.5 * weights.square().sum(-1) - capacitance_logdet(root)
        return log_density.to(accumulate_dtype(value.dtype))

    def entropy(self) -> Tensor:
        """Differential entropy of the free sites in nats, (*batch).

        Raises:
            ValueError: a grid too large, as for `ConditionalGMRF.entropy`.
        """
        entropy = self._local.entropy() + capacitance_logdet(self._capacitance()[1])
        return entropy.to(accumulate_dtype(self._dtype))

    @property
    def log_evidence(self) -> Tensor:
        """log p(observations) under the prior and the noise, in nats: (*batch,) in float64, differentiable.

        From p(y) = p(y | ŵ) p(ŵ) / p(ŵ | y) at the mean ŵ of the weights.

        Raises:
            ValueError: a grid too large, as for `ConditionalGMRF.log_evidence`.
        """
        return self._local.log_evidence + self._log_ratio

    def constrain(self, A: Tensor | LinearOperator, e: Tensor) -> ConstrainedGMRF:
        """The distribution given that A x = e as well, exactly; see `GMRF.constrain`."""
        return ConstrainedGMRF(self, A, e, self._validate_args)

    def mean_in_double(self) -> Tensor:
        """The mean in float64, (*batch, *grid)."""
        return self._local.mean_in_double()

    def free_sites(self) -> Tensor:
        """Bool, (*batch, *grid) or what broadcasts to it: the sites that are not known exactly."""
        return self._local.free_sites()

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ x in float64, of vectors (*sample, *batch, *grid) in float64; 0 where a site is known exactly."""
        ndim = len(self._event_shape)
        return self._local.covariance_times(x) + mixture(products(self._factors, x, ndim), self._factors, ndim)

    def __repr__(self) -> str:
        rank = self._factors.shape[-len(self._event_shape) - 1]
        return f"LowRankPosterior(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}, rank={rank})"

    @property
    def _dtype(self) -> torch.dtype:
        return self._prior.loc.dtype

    def _capacitance(self) -> tuple[Tensor, Tensor]:
        """The local precision times the factors, (*batch, R, *grid), and the root of I + their products with the factors."""
        ndim = len(self._event_shape)
        fields = rank_first(self._factors, ndim, len(self._batch_shape))
        times_precision = rank_last(self._local.precision_times(fields), ndim)
        gram = times_precision.flatten(-ndim) @ self._factors.flatten(-ndim).mT
        return times_precision, capacitance_root(0.5 * (gram + gram.mT))
