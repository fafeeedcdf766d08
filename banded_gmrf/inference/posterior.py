"""`ConditionalGMRF`: what a GMRF says about a field of which something was observed, exactly or with noise.

Let W = M Mᵀ be the precision of the observations as seen from the field: that of the noise for y = x + noise (0 where there is
no observation), AᵀVA for y = A x + noise with the precision V of the noise. Call *free* the sites that are not known exactly.
The free sites given all observations are a GMRF again, with the precision Λ_ff + W, and a mean and samples from one linear
system each: for x and z drawn from the prior and from N(0, I), x corrected by

    (Λ_ff + W) d = W (y - x) + M z - Λ_fo (x_o - values)

is a draw from the posterior, and the prior's mean with z = 0 becomes the posterior's (Papandreou & Yuille, Gaussian sampling by
local perturbations, NIPS 2010; for exact observations Rue & Held, Gaussian Markov Random Fields, 2005). With a factor C of
Λ_ff + W at hand, a draw is the mean and C⁻ᵀz.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmrf_kernels import standard_normal
from gmrf_kernels.checks import accumulate_dtype, check_vector

from ..analysis.marginals import VarianceEstimate
from ..operators.base import LinearOperator
from ..validation import as_sample_shape, as_sites, broadcast_fields, unit_vectors
from .conjugate_gradients import Convergence
from .constraints import ConstrainedGMRF
from .inferred_field import InferredField
from .noise import ObservationModel
from .systems import PosteriorSystem

_CHUNK_ELEMENTS = 2**22


class MeanResponse(NamedTuple):
    """What a move of the prior's mean by Σ_r w_r fields[r] does to a posterior.

    Attributes:
        mean: by how much its mean moves for w_r = 1, (R, *batch, *grid).
        information: minus the second derivatives of the log evidence by w, (*batch, R, R).
        score: its first derivatives at w = 0, (*batch, R).
    """

    mean: Tensor
    information: Tensor
    score: Tensor


class ConditionalGMRF(InferredField):
    """A GMRF given observations, on the whole grid; made by `GMRF.condition` and `GMRF.posterior`.

    A `torch.distributions.Distribution` with the prior's grid as its event. Sites that are known exactly have their value in
    every sample and the variance 0; log densities and entropies are those of the other sites, the *free* ones.

    With n sites in rows of W, and stencils that reach r rows, the method "direct" factorises Λ_ff + W once, in n (r + 1)² W²
    operations and n (r + 1) W numbers, and keeps the factor: then a mean or a sample takes n (r + 1) W operations, and all
    variances about as long as the factor. The method "iterative" solves one system for each mean and each sample by conjugate
    gradients. "auto" is direct where that takes a few seconds at most (2³⁵ operations and 2²⁶ numbers, batch included), and
    iterative beyond.

    Everything is computed in float64, whatever the dtype: in float32 products with Λ of a trained network are not precise
    enough to reach a residual of 10⁻⁶. All is differentiable in the prior, the observations and the noise: a mean once, by
    one more solve. With the method "direct", torch's transformations differentiate it any number of times.

    Args:
        prior: a `GMRF`.
        known: bool (*batch, *grid), the sites that are known exactly.
        values: (*batch, *grid), their values; ignored elsewhere.
        observations: (*batch, *shape) those that are not exact; ignored where there is none, NaN included.
        model: how these depend on the field.
        method: "auto", "direct" or "iterative".
        tolerance: the iteration stops at this residual relative to the right-hand side (Euclidean norms).
        max_iterations: of the iteration, which then warns.
        validate_args: check samples given to `log_prob`; None takes torch's default.

    Attributes:
        convergence: that of the last solve, for `mean`, `rsample` or a backward pass; None before the first.

    Raises:
        TypeError: ``max_iterations`` is not an integer.
        ValueError: another ``method``, a grid too large for "direct", ``tolerance`` is not between 0 and 1, or
            ``max_iterations`` less than 1.
    """

    _conditioned = "_prior"
    _own = ("_system", "_known", "_model", "_values", "_observations")

    def __init__(
        self,
        prior,
        known: Tensor,
        values: Tensor,
        observations: Tensor,
        model: ObservationModel,
        method: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        validate_args: bool | None = None,
    ):
        grid = prior.event_shape
        batch = torch.broadcast_shapes(
            prior.batch_shape,
            model.batch_shape,
            known.shape[: known.ndim - len(grid)],
            values.shape[: values.ndim - len(grid)],
            observations.shape[: observations.ndim - len(model.event_shape)],
        )
        self._system = PosteriorSystem(prior.prior_in_double(), known, model, method, tolerance, max_iterations)
        self._prior, self._known, self._model = prior.expand(batch), known, model
        self._values = values.double().where(known, 0)
        self._observations = model.observed(observations.double())
        super().__init__(batch, grid, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "ConditionalGMRF":
        """The distribution repeated over a larger batch; nothing is copied or factorised again.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        return self._expanded(self._get_checked_instance(ConditionalGMRF, _instance), batch_shape)

    @property
    def convergence(self) -> Convergence | None:
        """How the last solve ended, see `Convergence`; None before the first."""
        return self._system.convergence

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self._mean().to(self._prior.loc.dtype)

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Variances of all sites, with their standard errors.

        Args:
            method: "exact", by a selected inverse of the factor; "monte_carlo", from samples, Rao-Blackwellised over each site
                given all others (Sidén, Lindgren, Bolin & Villani, JCGS 2018), or plain where an operator is observed through;
                or "auto", which is exact where the posterior's own method is direct.
            num_samples: of Monte Carlo, each one solve. The standard error is at most √(2 / num_samples) times the variance.

        Returns:
            A named tuple of ``variance`` and ``standard_error``, both (*batch, *grid); the latter is 0 if the method is exact.

        Raises:
            ValueError: another method, fewer than one sample, or a grid too large for "exact", as for `log_evidence`.
        """
        if method not in ("auto", "exact", "monte_carlo"):
            raise ValueError(f"method is {method!r}, expected 'auto', 'exact' or 'monte_carlo'")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if method == "exact" or (method == "auto" and self._system.direct):
            self._system.check_factorisable("an exact variance")
            variance = self._system.factor().inverse_diagonal().unflatten(-1, self._event_shape).masked_fill(self._known, 0)
            estimate = variance, torch.zeros_like(variance)
        else:
            estimate = self._monte_carlo_variance(num_samples)
        return VarianceEstimate(*(t.to(self._prior.loc.dtype).expand(self._extended_shape()) for t in estimate))

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites, by one solve for each; arguments as for `GMRF.covariance_columns`.

        Returns:
            (*batch, *grid) for one site, (m, *batch, *grid) for m; 0 where one of the two is known exactly.
        """
        grid, batch = self._event_shape, self._batch_shape
        sites = as_sites(sites, grid, self._prior.loc.device)
        units = unit_vectors(sites.reshape(-1, len(grid)), grid, len(batch), torch.float64).expand(-1, *batch, *grid)
        columns = self._system.solve(units.masked_fill(self._known, 0)).to(accumulate_dtype(self._prior.loc.dtype))
        return columns if sites.ndim > 1 else columns[0]

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable; one solve for all."""
        shape, prior = self._extended_shape(as_sample_shape(sample_shape)), self._prior
        if not self._system.direct:
            x = prior.rsample(sample_shape)
            z = standard_normal((*shape[: len(shape) - len(self._event_shape)], *self._model.event_shape), **self._double)
            return self._correct(x, z).to(prior.loc.dtype)
        factor = self._system.factor()
        deviation = self._system.solve_with(factor, standard_normal(shape, **self._double), root=True)
        return (self._mean(factor) + deviation.masked_fill(self._known, 0)).to(prior.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of the free sites in nats; -∞ where a site that is known exactly has another value.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError: another dtype than the prior's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast; a grid too large, as for `log_evidence`;
                with ``validate_args`` also NaN, and another value of a known site.
        """
        grid = self._event_shape
        check_vector("value", value, "the distribution", self._prior.loc, grid)
        broadcast_fields("value", value.shape[: value.ndim - len(grid)], "the distribution", self._batch_shape)
        self._system.check_factorisable("log_prob")
        if self._validate_args and value.numel() > 0:
            self._validate_sample(value)
        apart = (value.double() - self._values).abs().masked_fill(~self._known, 0)
        contradicts = (apart > 8 * torch.finfo(value.dtype).eps * self._values.abs()).flatten(-len(grid)).any(-1)
        if self._validate_args and contradicts.any():
            raise ValueError("value differs from the observation at a site that is known exactly, where its density is 0")
        mean, logdet = self._mean_and_logdet()
        free = (value.double() - mean).masked_fill(self._known, 0)
        squares = (free * self._system.product(free)).flatten(-len(grid)).sum(-1)
        log_density = 0.5 * (logdet - squares - self._num_free() * math.log(2 * math.pi))
        return log_density.masked_fill(contradicts, -math.inf).to(accumulate_dtype(value.dtype))

    def entropy(self) -> Tensor:
        """Differential entropy of the free sites in nats, (*batch).

        Raises:
            ValueError: a grid too large, as for `log_evidence`.
        """
        self._system.check_factorisable("entropy")
        entropy = 0.5 * (self._num_free() * (1 + math.log(2 * math.pi)) - self._system.logdet())
        return entropy.to(accumulate_dtype(self._prior.loc.dtype)).expand(self._batch_shape)

    @property
    def log_evidence(self) -> Tensor:
        """log p(observations) under the prior and the noise, in nats: (*batch,) in float64, differentiable.

        From p(observations) = p(x) p(observations | x) / p(x | observations) at the posterior mean; the last factor takes the
        determinant of Λ_ff + W.

        Raises:
            ValueError: the grid is too large: n (r + 1)² W² > 2⁴⁰ operations or n (r + 1) W > 2³⁰ numbers, with n sites in rows
                of W and stencils, of the prior and of correlated noise, that reach r rows; with an operator, n > 8192.
        """
        self._system.check_factorisable("log_evidence")
        mean, logdet = self._mean_and_logdet()
        log_prior = self._system.prior.log_density(mean - self._prior.loc.double())
        log_likelihood = self._model.log_likelihood(self._observations, mean)
        log_evidence = log_prior + log_likelihood + 0.5 * (self._num_free() * math.log(2 * math.pi) - logdet)
        return log_evidence.expand(self._batch_shape)

    def constrain(self, A: Tensor | LinearOperator, e: Tensor) -> ConstrainedGMRF:
        """The distribution given that A x = e as well, exactly; see `GMRF.constrain`."""
        return ConstrainedGMRF(self, A, e, self._validate_args)

    @property
    def prior(self):
        """The `GMRF` before the observations, expanded to this distribution's batch."""
        return self._prior

    def mean_in_double(self) -> Tensor:
        """The mean in float64, (*batch, *grid)."""
        return self._mean()

    def free_sites(self) -> Tensor:
        """Bool, (*batch, *grid) or what broadcasts to it: the sites that are not known exactly."""
        return ~self._known

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ x in float64, of vectors (*sample, *batch, *grid) in float64; 0 where a site is known exactly."""
        return self._system.solve(x.masked_fill(self._known, 0)).masked_fill(self._known, 0)

    def precision_times(self, x: Tensor) -> Tensor:
        """(Λ_ff + W) x in float64, of vectors (*sample, *batch, *grid) in float64 that are 0 where a site is known exactly."""
        return self._system.product(x)

    def respond(self, fields: Tensor) -> MeanResponse:
        """How this posterior depends on a move of the prior's mean, loc + Σ_r w_r fields[r]; see `MeanResponse`.

        It takes one solve for each of the fields (R, *batch, *grid), in float64.
        """
        system, ndim = self._system, len(self._event_shape)
        start = fields.masked_fill(self._known, 0)
        rhs = system.prior_product(fields - start) - self._model.precision(start)
        mean = start + system.solve(rhs.masked_fill(self._known, 0))
        pairs = ((fields - mean, system.prior_product), (mean, self._model.precision))
        information = 0
        for moved, product in pairs:
            left, right = (t.movedim(0, -ndim - 1).flatten(-ndim) for t in (moved, product(moved)))
            information = information + left @ right.mT
        pull = system.prior_product(self._mean() - self._prior.loc.double()).flatten(-ndim)
        score = (fields.movedim(0, -ndim - 1).flatten(-ndim) @ pull.unsqueeze(-1)).squeeze(-1)
        return MeanResponse(mean, 0.5 * (information + information.mT), score)

    def with_prior_mean(self, loc: Tensor) -> "ConditionalGMRF":
        """The posterior under the prior with another mean (*batch, *grid); nothing is factorised again."""
        new = copy.copy(self)
        new._prior = self._prior.with_loc(loc)
        return new

    def __repr__(self) -> str:
        return f"ConditionalGMRF(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    @property
    def _double(self) -> dict:
        return {"dtype": torch.float64, "device": self._prior.loc.device}

    def _num_free(self) -> Tensor:
        return (~self._known).double().flatten(-len(self._event_shape)).sum(-1)

    def _mean(self, factor=None) -> Tensor:
        """In float64; with ``factor``, from it."""
        zeros = torch.zeros(self._model.event_shape, **self._double)
        return self._correct(self._prior.loc, zeros, factor).expand(self._extended_shape())

    def _mean_and_logdet(self) -> tuple[Tensor, Tensor]:
        """The mean, in float64, and log |Λ_ff + W|."""
        start, rhs = self._correction(self._prior.loc, torch.zeros(self._model.event_shape, **self._double))
        correction, logdet = self._system.solve_and_logdet(rhs)
        return (start + correction).expand(self._extended_shape()), logdet

    def _correct(self, x: Tensor, z: Tensor, factor=None) -> Tensor:
        """``x`` given the observations, with z for their noise: (*sample, *batch, *grid) in float64."""
        start, rhs = self._correction(x, z)
        return start + (self._system.solve(rhs) if factor is None else self._system.solve_with(factor, rhs))

    def _correction(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` with its known sites, and the right-hand side of what is to be added at the free ones."""
        x = x.double()
        start, model = self._values.where(self._known, x), self._model
        rhs = model.score(self._observations, x) + model.root(z) - self._system.prior_product(start - x)
        return start, rhs.masked_fill(self._known, 0)

    def _monte_carlo_variance(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Var x_j = 1 / A_jj + Var E[x_j | others], A = Λ_ff + W, the second term from deviations d from the mean.

        E[d_j | others] = d_j - (A d)_j / A_jj, and A d is what d was solved from. It is normal with mean 0, so that the mean of
        N squares has the standard error √(2 / N) times its expectation.
        """
        system, model, grid = self._system, self._model, self._event_shape
        diagonal = system.precision_diagonal()
        conditional = 0 if diagonal is None else 1 / diagonal
        size = max(1, _CHUNK_ELEMENTS // max(1, self._extended_shape().numel()))
        squares = torch.zeros((), **self._double)
        for start in range(0, num_samples, size):
            count = min(size, num_samples - start)
            u = standard_normal((count, *self._batch_shape, *grid), **self._double)
            z = standard_normal((count, *self._batch_shape, *model.event_shape), **self._double)
            rhs = (system.prior.root(u) + model.root(z)).masked_fill(self._known, 0)
            squares = squares + (system.solve(rhs) - rhs * conditional).square().sum(0)
        explained = squares / num_samples
        variance = (conditional + explained).masked_fill(self._known, 0)
        return variance, (explained * math.sqrt(2 / num_samples)).masked_fill(self._known, 0)
