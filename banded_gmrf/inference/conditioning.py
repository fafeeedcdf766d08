"""`Conditionable`, the part of `GMRF` that makes posteriors: from a description of what was observed to a distribution."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmrf_kernels.checks import broadcast_batch, check_device

from .noise import CorrelatedNoise, IndependentNoise
from .posterior import ConditionalGMRF


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
        _broadcast_batches(self, values=values.shape, mask=mask.shape)
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
        method: str = "auto",
    ) -> ConditionalGMRF:
        """The distribution given observation = x + noise: for denoising.

        Its mean is the Wiener filter, loc + (Λ + W)⁻¹ W (observation - loc) with the precision W of the noise.

        Args:
            observation: (*batch, *grid), broadcast against the distribution's batch.
            noise_variance: of noise that is independent from site to site: a number, or a tensor that broadcasts to
                (*batch, *grid), in squared units of the field; infinite where nothing is observed, 0 where the observation is
                exact.
            tolerance, max_iterations, method: as for `condition`.
            noise: instead of a variance, the distribution of correlated noise on the same grid, in any dtype.

        Returns:
            A `ConditionalGMRF`, a distribution on the whole grid.

        Raises:
            TypeError: ``observation`` has another dtype than the distribution, ``noise`` is no `GMRF`, both or neither are
                given of the noise's two descriptions, or ``max_iterations`` is not an integer.
            ValueError: grids, batches or devices that do not fit, a variance that is negative or NaN, or ``tolerance``,
                ``max_iterations`` or ``method`` as for `condition`; with ``validate_args``, NaN or infinity where something was
                observed.
        """
        if not isinstance(noise, Conditionable | None):
            raise TypeError(f"noise is {type(noise).__name__}, expected GMRF")
        solver = self._solver(method, tolerance, max_iterations)
        self.check_field("observation", observation)
        if (noise_variance is None) == (noise is None):
            raise TypeError(f"posterior takes either noise_variance or noise, got {'neither' if noise is None else 'both'}")
        grid = self.event_shape
        if noise is not None:
            if noise.event_shape != grid:
                raise ValueError(f"noise is on the grid {tuple(noise.event_shape)}, the distribution on {tuple(grid)}")
            check_device("noise", noise.loc, "observation", observation)
            _broadcast_batches(self, observation=observation.shape, noise=(*noise.batch_shape, *grid))
            known = torch.zeros(grid, dtype=torch.bool, device=observation.device)
            _check_observed(self, "observation", observation, ~known)
            return ConditionalGMRF(self, known, observation, observation, CorrelatedNoise(noise), **solver)
        variance = torch.as_tensor(noise_variance, dtype=torch.float64, device=observation.device)
        shape = (*self.batch_shape, *grid)
        try:
            torch.broadcast_shapes(variance.shape, shape)
        except RuntimeError:
            raise ValueError(
                f"noise_variance has shape {tuple(variance.shape)}, which does not broadcast with {shape}"
            ) from None
        if not (variance >= 0).all():
            raise ValueError("noise_variance has negative or NaN entries, expected at least 0")
        variance = variance.expand(torch.broadcast_shapes(variance.shape, grid))
        _broadcast_batches(self, observation=observation.shape, noise_variance=variance.shape)
        known = variance == 0
        weight = (1 / variance.masked_fill(known, 1)).masked_fill(known, 0)
        _check_observed(self, "observation", observation, variance < math.inf)
        return ConditionalGMRF(self, known, observation, observation, IndependentNoise(weight, grid), **solver)

    def _solver(self, method: str, tolerance: float, max_iterations: int) -> dict[str, Any]:
        return {
            "method": method,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "validate_args": self._validate_args,
        }


def _check_observed(prior, name: str, values: Tensor, observed: Tensor) -> None:
    """Raise ValueError, if the prior checks its arguments, for NaN or infinity where something was observed."""
    if prior._validate_args and not (values.isfinite() | ~observed).all():
        raise ValueError(f"{name} has NaN or infinite entries where something was observed, expected finite ones")


def _broadcast_batches(prior, **shapes: Sequence[int]) -> None:
    """Check that the batches of all shapes (*batch, *grid) broadcast with the distribution's and with each other."""
    batch, others = prior.batch_shape, "the distribution"
    for name, shape in shapes.items():
        batch = broadcast_batch(name, shape[: len(shape) - len(prior.event_shape)], others, batch)
        others += f" and {name}"
