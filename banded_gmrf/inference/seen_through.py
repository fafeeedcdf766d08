"""Observation model: what a linear operator shows of a field, y = A x + noise, with a preconditioner that knows blurs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.base import LinearOperator
from ..validation import unit_vectors
from .noise import CorrelatedNoise, IndependentNoise
from .priors import Prior

_PROBES = 16


class SeenThrough:
    """Observations y = A x + noise: W = AᵀVA with the precision V of the noise.

    Args:
        operator: A, on the grid of the field.
        noise: that of the observations.
    """

    reach = None  # an operator may couple any two sites
    diagonal = None

    def __init__(self, operator: LinearOperator, noise: IndependentNoise | CorrelatedNoise):
        self._operator, self.noise = operator, noise
        self.batch_shape = torch.broadcast_shapes(operator.batch_shape, noise.batch_shape)
        self.event_shape = operator.output_shape

    def observed(self, values: Tensor) -> Tensor:
        """``values`` where they are observed, 0 elsewhere."""
        return self.noise.observed(values)

    def precision(self, x: Tensor) -> Tensor:
        """W x."""
        return self._operator.adjoint(self.noise.precision(self._operator(x)))

    def score(self, values: Tensor, x: Tensor) -> Tensor:
        """The derivative of log p(values | x) by x."""
        return self._operator.adjoint(self.noise.score(values, self._operator(x)))

    def root(self, z: Tensor) -> Tensor:
        """M z with M Mᵀ = W."""
        return self._operator.adjoint(self.noise.root(z))

    def log_likelihood(self, values: Tensor, x: Tensor) -> Tensor:
        """log p(values | x), (*batch) in nats."""
        return self.noise.log_likelihood(values, self._operator(x))

    def matrix(self) -> Tensor:
        """W, dense: (*batch, n, n)."""
        A = self._operator.to_dense()
        columns = A.movedim(-1, 0).unflatten(-1, self.event_shape)
        weighted = self.noise.precision(columns)
        return A.mT @ weighted.flatten(weighted.ndim - len(self.event_shape)).movedim(0, -1)

    def preconditioner(self, prior: Prior) -> Callable[[Tensor], Tensor]:
        """An approximation of (Λ + W)⁻¹: both taken as stationary, on a torus.

        Λ and W are known by their columns at some sites well inside the grid. Axes along which the operator does not wrap
        around are mirrored at their ends. This makes the torus twice as long and the Fourier basis that of cosines: fields, and
        what is seen of them, are smooth across a mirror, but not from one end of the grid to the other.
        """
        grid = prior.grid
        ndim, axes = len(grid), tuple(range(-len(grid), 0))
        mirrored = [axis for axis in axes if axis + ndim not in self._operator.periodic_axes()]
        torus = [2 * n if axis in mirrored else n for axis, n in zip(axes, grid, strict=True)]
        generator = torch.Generator().manual_seed(0)
        places = [n // 4 + torch.randint(max(1, n // 2), (_PROBES,), generator=generator) for n in grid]
        sites = torch.stack(places, -1)
        batch = len(torch.broadcast_shapes(prior.batch_shape, self.batch_shape))
        units = unit_vectors(sites.to(prior.device), grid, batch, torch.float64)
        before = prior.column_spectrum(units, torus)  # wherever its site is; columns of W move to the origin
        padding = [side for n, size in zip(grid[::-1], torus[::-1], strict=True) for side in (0, size - n)]
        columns = torch.nn.functional.pad(self.precision(units), padding)
        seen = (
            sum(column.roll([-s for s in site], axes) for column, site in zip(columns, sites.tolist(), strict=True)) / _PROBES
        )
        lags = torch.fft.irfftn(before, s=torus, dim=axes) + seen
        for axis in mirrored:  # only what is even is a product with cosines
            lags = 0.5 * (lags + lags.flip(axis).roll(1, axis))
        spectrum = torch.fft.rfftn(lags, dim=axes).real
        largest = spectrum.amax(axes, keepdim=True)
        spectrum = spectrum.clamp(min=1e-12 * largest)

        def solve(r: Tensor) -> Tensor:
            for axis in mirrored:
                r = torch.cat([r, r.flip(axis)], axis)
            x = torch.fft.irfftn(torch.fft.rfftn(r, dim=axes) / spectrum, s=torus, dim=axes)
            return x[(..., *(slice(n) for n in grid))]

        return solve
