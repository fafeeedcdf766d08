"""`Conditionable`, the part of `GMRF` that makes posteriors: from a description of what was observed to a distribution."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, check_device, check_dtype, check_tensor, check_vector

from ..operators.base import LinearOperator, as_operator, check_adjoint
from ..transformations import require
from ..validation import broadcast_fields, check_not_boolean
from .constraints import ConstrainedGMRF
from .laplace import LaplaceGMRF, LogLikelihood, laplace
from .noise import CorrelatedNoise, IndependentNoise
from .posterior import ConditionalGMRF
from .priors import FactorPrior, Prior
from .seen_through import SeenThrough
from .trend import TrendPosterior, trend_parts


class Conditionable:
    """Methods of a `GMRF` that condition it on observations."""

    def condition(
        self,
        mask: Tensor,
        values: Tensor,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        *,
        method: str = "auto",
    ) -> ConditionalGMRF:
        """The distribution given the values of some sites: for interpolation and inpainting.

        Args:
            mask: bool (*batch, *grid), true where a site is observed; its batch is broadcast against the distribution's.
            values: (*batch, *grid); only the observed sites are read.
            tolerance: residual, relative to the right-hand side, at which the iterative method stops; between 0 and 1.
            max_iterations: of the iterative method, at least 1; if they do not suffice, it warns with the residual
                (RuntimeWarning).
            method: "direct", one factorisation of the free sites' precision for everything; "iterative", conjugate gradients
                for each mean and each sample; or "auto", which is direct where that takes a few seconds at most. See
                `ConditionalGMRF` for what each costs.

        Returns:
            A `ConditionalGMRF`, a distribution on the whole grid.

        Raises:
            TypeError: ``mask`` is not of bools, ``values`` has another dtype than the distribution, or ``max_iterations`` is
                not an integer.
            ValueError: grids, batches or devices that do not fit, a ``tolerance`` that is not between 0 and 1,
                ``max_iterations`` less than 1, another ``method``, or a grid that is too large for "direct"; with
                ``validate_args``, NaN or infinity among the observed values.
        """
        solver = self._solver(method, tolerance, max_iterations)
        self.check_field("values", values)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask is {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}, expected a bool tensor"
            )
        grid = self.event_shape
        if mask.ndim < len(grid) or mask.shape[mask.ndim - len(grid) :] != grid:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (..., {', '.join(map(str, grid))})")
        check_device("mask", mask, "values", values)
        _broadcast_batches(self, values=values.shape[: values.ndim - len(grid)], mask=mask.shape[: mask.ndim - len(grid)])
        nothing = IndependentNoise(values.new_zeros((), dtype=torch.float64), grid)
        _check_observed(self, "values", values, mask)
        return ConditionalGMRF(self, mask, values, values, nothing, **solver)

    def posterior(
        self,
        observation: Tensor,
        noise_variance: Tensor | float | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        *,
        noise: "Conditionable | None" = None,
        operator: LinearOperator | None = None,
        method: str = "auto",
        covariates: Tensor | None = None,
        covariate_variance: Tensor | float | None = None,
    ) -> ConditionalGMRF | TrendPosterior:
        """The distribution given observation = x + noise, or A x + noise: for denoising, deblurring, superresolution.

        Its mean is the Wiener filter, loc + (Λ + AᵀVA)⁻¹ AᵀV (observation - A loc) with the precision V of the noise.

        Args:
            observation: (*batch, *grid), broadcast against the distribution's batch; with an operator (*batch, *output_shape).
            noise_variance: of noise that is independent from one observation to the next: a number, or a tensor that
                broadcasts to (*batch, *grid), with an operator (*batch, *output_shape), in squared units of the observation;
                infinite where nothing is observed. 0 where the observation is exact; not with an operator, unless it merely
                selects sites.
            tolerance, max_iterations, method: as for `condition`. With an operator that does more than select sites, a direct
                factor is dense: n³ operations for n sites, and at most 8192 of them.
            noise: instead of a variance, the distribution of correlated noise on the same grid, or on that of the observation,
                in any dtype.
            operator: A, one of `banded_gmrf.operators`, or another object with a call and ``.adjoint``, or ``A`` and
                ``A_adjoint``, that takes and gives batches (N, *shape).
            covariates: (m, *grid), the fields of a linear trend: x stands for the field plus Σ_k β_k covariates[k].
            covariate_variance: the prior variance of β, of mean 0 and independent of the field: a number, (m,), or a
                covariance (m, m).

        Returns:
            A `ConditionalGMRF`, a distribution on the whole grid; with covariates a `TrendPosterior`, that of field and trend
            together, whose ``coefficients`` are β given the observation.

        Raises:
            TypeError: ``observation`` has another dtype than the distribution, ``noise`` is no `GMRF`, both or neither are
                given of the noise's two descriptions, ``operator`` has no adjoint, or ``max_iterations`` is not an integer.
            ValueError: grids, batches or devices that do not fit, a variance that is negative or NaN, or ``tolerance``,
                ``max_iterations`` or ``method`` as for `condition`; with ``validate_args``, NaN or infinity where something was
                observed, and an operator whose adjoint is not its adjoint, by a product of random vectors.
        """
        if covariates is not None:
            trend = trend_parts(covariates, covariate_variance, self.event_shape, self.loc.device)
            local = self.posterior_in_double(
                observation, noise_variance, tolerance, max_iterations, noise=noise, operator=operator, method=method
            )
            return TrendPosterior(self, local, *trend, self._validate_args)
        if covariate_variance is not None:
            raise TypeError("covariate_variance is given without covariates")
        factored = isinstance(noise, Conditionable) and hasattr(noise, "precision_cholesky")  # not so a SparseGMRF
        if noise is not None and not factored:
            raise TypeError(f"noise is {type(noise).__name__}, expected GMRF")
        if (noise_variance is None) == (noise is None):
            raise TypeError(f"posterior takes either noise_variance or noise, got {'neither' if noise is None else 'both'}")
        solver, grid = self._solver(method, tolerance, max_iterations), self.event_shape
        shape = grid
        if operator is not None:
            operator = as_operator(operator).bind(grid, self.loc.device)
            shape = operator.output_shape
            if self._validate_args:
                check_adjoint(operator, self.loc.device)
        check_vector("observation", observation, "the distribution", self.loc, shape)
        batches = {"observation": observation.shape[: observation.ndim - len(shape)]}
        if operator is not None:
            batches["operator"] = operator.batch_shape
        if noise is not None:
            if noise.event_shape != shape:
                others = "the distribution" if operator is None else "the observation"
                raise ValueError(f"noise is on the grid {tuple(noise.event_shape)}, {others} on {tuple(shape)}")
            check_device("noise", noise.loc, "observation", observation)
            _broadcast_batches(self, **batches, noise=noise.batch_shape)
            _check_observed(self, "observation", observation, torch.ones_like(observation, dtype=torch.bool))
            known, model = torch.zeros(grid, dtype=torch.bool, device=observation.device), CorrelatedNoise(noise)
        else:
            variance = self._variance(noise_variance, observation, shape)
            _broadcast_batches(self, **batches, noise_variance=variance.shape[: variance.ndim - len(shape)])
            _check_observed(self, "observation", observation, variance < math.inf)
            if operator is not None and operator.selected_sites() is not None:
                seen = operator.adjoint(torch.ones_like(variance)) > 0
                variance = operator.adjoint(variance).where(seen, math.inf)
                observation, operator, shape = operator.adjoint(observation), None, grid
            known = variance == 0
            if operator is not None:
                if known.any():
                    raise ValueError(
                        "noise_variance has entries that are 0, expected more than 0 with an operator: see constrain"
                    )
                known = torch.zeros(grid, dtype=torch.bool, device=observation.device)
            exact = variance == 0
            model = IndependentNoise((1 / variance.masked_fill(exact, 1)).masked_fill(exact, 0), shape)
        if operator is None:
            return ConditionalGMRF(self, known, observation, observation, model, **solver)
        return ConditionalGMRF(self, known, self.loc.new_zeros(grid), observation, SeenThrough(operator, model), **solver)

    def constrain(self, A: Tensor | LinearOperator, e: Tensor) -> ConstrainedGMRF:
        """The distribution given that A x = e exactly: a sum that is 0, means of regions, values along a line.

        It takes one solve for each constraint, and m² numbers for m of them.

        Args:
            A: (m, *grid), one field of weights for each constraint, all independent of each other; or a linear operator.
            e: (*batch, m), the values; of an operator (*batch, *output_shape).

        Returns:
            A `ConstrainedGMRF`, a distribution on the whole grid.

        Raises:
            TypeError, ValueError: as for `ConstrainedGMRF`.
        """
        return ConstrainedGMRF(self, A, e, self._validate_args)

    def laplace(
        self,
        log_likelihood: LogLikelihood,
        tolerance: float = 1e-10,
        max_iterations: int = 100,
        *,
        operator: LinearOperator | None = None,
        method: str = "auto",
    ) -> LaplaceGMRF:
        """Laplace's approximation of the posterior under any log likelihood: counts, classes, noise with heavy tails.

        For counts, say: ``q.laplace(lambda x: torch.distributions.Poisson(x.exp()).log_prob(counts))``. The mode comes from
        damped Newton iterations, derivatives of the log likelihood by autograd. Differentiable once, in the prior and in
        whatever the log likelihood is made of.

        Args:
            log_likelihood: takes a field (*batch, *grid) in float64, with an operator A x (*batch, *output_shape), and gives
                the log density of the observation at each of its sites, in nats, of the same shape up to its own batch. It is
                twice differentiable, and 0 where nothing was observed. It need not be concave.
            tolerance: the iteration stops after a step that promises at most this many nats.
            max_iterations: of Newton's method; if they do not suffice, it warns (RuntimeWarning).
            operator: as for `posterior`.
            method: as for `condition`, of each step and of the result.

        Returns:
            A `LaplaceGMRF`, a `ConditionalGMRF` around the mode; its ``log_evidence`` is Laplace's approximation.

        Raises:
            TypeError: ``log_likelihood`` is no function, or ``operator`` has no adjoint.
            ValueError: a log likelihood of another shape, not finite at the prior's mean, or with a derivative that is NaN;
                ``tolerance`` or ``max_iterations`` out of range; with ``validate_args``, a log likelihood of one site that
                depends on others.
            torch.linalg.LinAlgError: the log density has no curvature at its mode.
            NotImplementedError: under a transformation of `torch.func`.
        """
        if operator is not None:
            operator = as_operator(operator).bind(self.event_shape, self.loc.device)
            if self._validate_args:
                check_adjoint(operator, self.loc.device)
        return laplace(self, log_likelihood, operator, tolerance, max_iterations, method, self._validate_args)

    def posterior_in_double(self, observation: Tensor, *arguments: Any, **options: Any) -> ConditionalGMRF:
        """`posterior` of the distribution in float64, given an observation (*batch, *grid) of its own dtype."""
        check_tensor("observation", observation)
        if observation.dtype != accumulate_dtype(self.loc.dtype):
            check_dtype("observation", observation, "the distribution", self.loc)
        field = self if self.loc.dtype == torch.float64 else self.to(torch.float64)
        return field.posterior(observation.double(), *arguments, **options)

    def prior_in_double(self) -> Prior:
        """What posteriors ask of the distribution."""
        return FactorPrior(self.precision_cholesky.unexpanded().to(torch.float64))

    def with_loc(self, loc: Tensor) -> Self:
        """The same field with another mean, (*batch, *grid)."""
        return type(self)(loc, self.precision_cholesky, validate_args=False)

    def mean_in_double(self) -> Tensor:
        """The mean in float64, (*batch, *grid)."""
        return self.loc.double()

    def free_sites(self) -> None:
        """None: no site is known exactly."""
        return None

    def null_space(self) -> None:
        """None: the distribution is proper."""
        return None

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ x in float64, of vectors (*sample, *batch, *grid) in float64."""
        factor = self.precision_cholesky.unexpanded().to(torch.float64)
        return factor.solve(factor.solve(x), transpose=True)

    def _variance(self, noise_variance: Tensor | float, observation: Tensor, shape: torch.Size) -> Tensor:
        """The variance of independent noise as a float64 tensor that has the axes of one observation."""
        check_not_boolean("noise_variance", noise_variance)
        try:
            variance = torch.as_tensor(noise_variance, dtype=torch.float64, device=observation.device)
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"noise_variance is {type(noise_variance).__name__}, expected a number or a tensor"
            raise TypeError(message) from error
        full = (*self.batch_shape, *shape)
        try:
            torch.broadcast_shapes(variance.shape, full)
        except RuntimeError:
            raise ValueError(
                f"noise_variance has shape {tuple(variance.shape)}, which does not broadcast with {full}"
            ) from None
        require(variance >= 0, "noise_variance has negative or NaN entries, expected at least 0")
        return variance.expand(torch.broadcast_shapes(variance.shape, shape))

    def _solver(self, method: str, tolerance: float, max_iterations: int) -> dict[str, Any]:
        return {
            "method": method,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "validate_args": self._validate_args,
        }


def _check_observed(prior, name: str, values: Tensor, observed: Tensor) -> None:
    """Raise ValueError, if the prior checks its arguments, for NaN or infinity where something was observed."""
    if prior._validate_args:
        message = f"{name} has NaN or infinite entries where something was observed, expected finite ones"
        require(values.isfinite() | ~observed, message)


def _broadcast_batches(prior, **batches: Sequence[int]) -> None:
    """Check that all these batches broadcast with the distribution's and with each other."""
    batch, others = prior.batch_shape, "the distribution"
    for name, shape in batches.items():
        batch = broadcast_fields(name, shape, others, batch)
        others += f" and {name}"
