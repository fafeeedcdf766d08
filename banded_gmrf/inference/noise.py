"""Observation models of the field itself, y = x + noise, independent from site to site or correlated; what any model offers."""

import math
from typing import Protocol

import torch
from torch import Tensor

from ..analysis.marginals import precision_diagonal
from ..cholesky import fused_nats
from ..recursions.strips import block_coefficients, block_rows, strip


class ObservationModel(Protocol):
    """Observations y that are normal given the field x: what a posterior asks of them.

    Attributes:
        batch_shape: of the model's own tensors.
        event_shape: of the observations y of one field.
        reach: how many rows apart W, the precision of y as seen from the field, couples sites; None if any.
        diagonal: that of W, (*batch, *grid); None where it is not known.
    """

    batch_shape: torch.Size
    event_shape: torch.Size
    reach: int | None
    diagonal: Tensor | None

    def observed(self, values: Tensor) -> Tensor:
        """``values`` (*batch, *event_shape) where they are observed, 0 elsewhere."""

    def precision(self, x: Tensor) -> Tensor:
        """W x, (*sample, *batch, *grid)."""

    def score(self, values: Tensor, x: Tensor) -> Tensor:
        """The derivative of log p(values | x) by x."""

    def root(self, z: Tensor) -> Tensor:
        """M z with M Mᵀ = W, for z (*sample, *batch, *event_shape)."""

    def log_likelihood(self, values: Tensor, x: Tensor) -> Tensor:
        """log p(values | x), (*batch) in nats."""


class _SitewiseModel:
    """Observations of the sites themselves, y = x + noise."""

    def score(self, values: Tensor, x: Tensor) -> Tensor:
        """The derivative of log p(values | x) by x."""
        return self.precision(values - self.loc - x)

    def log_likelihood(self, values: Tensor, x: Tensor) -> Tensor:
        """log p(values | x), (*batch) in nats."""
        return self.log_prob(values - x)


class IndependentNoise(_SitewiseModel):
    """Noise with the precision W = diag(weight).

    Args:
        weight: float64 (*batch, *grid) or any shape that broadcasts to it, 0 where there is no observation.
        grid: the grid.
    """

    reach = 0

    def __init__(self, weight: Tensor, grid: torch.Size):
        self.diagonal, self.event_shape = weight, grid
        self._noisy = weight > 0
        self.batch_shape = weight.shape[: max(0, weight.ndim - len(grid))]
        self.loc = weight.new_zeros(())

    def observed(self, values: Tensor) -> Tensor:
        """``values`` where they are observed, 0 elsewhere."""
        return values.where(self._noisy, 0)

    def precision(self, x: Tensor) -> Tensor:
        """W x."""
        return self.diagonal * x

    def root(self, z: Tensor) -> Tensor:
        """M z with M Mᵀ = W."""
        return self.diagonal.where(self._noisy, 1).sqrt().where(self._noisy, 0) * z  # √ has no finite derivative at 0

    def log_prob(self, noise: Tensor) -> Tensor:
        """The log density of the noise at the observed sites, (*batch) in nats."""
        log_weight = self.diagonal.where(self._noisy, 1).log() - math.log(2 * math.pi)
        sites = 0.5 * (log_weight - self.diagonal * noise.square()).where(self._noisy, 0)
        return sites.flatten(-len(self.event_shape)).sum(-1)

    def blocks(self) -> list[Tensor]:
        """What `gram` needs of each block of rows."""
        weight = self.diagonal.expand(*self.batch_shape, *self.event_shape)
        return [
            weight[(..., slice(*rows), *[slice(None)] * (len(self.event_shape) - 1))] for rows in block_rows(self.event_shape)
        ]

    def gram(self, block: Tensor, rows_left: int) -> tuple[None, Tensor]:
        """What a block adds to W: nothing but the diagonal of its own sites, (*batch, w)."""
        return None, block.flatten(-len(self.event_shape))


class CorrelatedNoise(_SitewiseModel):
    """Noise that is a GMRF itself, with the precision W = M Mᵀ; every site is observed.

    Args:
        distribution: a `GMRF`.
    """

    def __init__(self, distribution):
        self.loc, self.batch_shape = distribution.loc.double(), distribution.batch_shape
        self.event_shape = distribution.event_shape
        self._factor = distribution.precision_cholesky.unexpanded().to(torch.float64)
        self.reach = distribution.stencil.row_reach

    @property
    def diagonal(self) -> Tensor:
        """That of W."""
        return precision_diagonal(self._factor)

    def observed(self, values: Tensor) -> Tensor:
        """All of them."""
        return values

    def precision(self, x: Tensor) -> Tensor:
        """W x."""
        return self._factor.matvec(self._factor.matvec(x, transpose=True))

    def root(self, z: Tensor) -> Tensor:
        """M z."""
        return self._factor.matvec(z)

    def log_prob(self, noise: Tensor) -> Tensor:
        """Its log density, (*batch) in nats."""
        return -fused_nats(noise - self.loc, *self._factor.coefficients)

    def blocks(self) -> tuple[Tensor, ...]:
        """What `gram` needs of each block of rows."""
        return block_coefficients(self._factor)

    def gram(self, block: Tensor, rows_left: int) -> tuple[Tensor, float]:
        """What a block adds to W: (*batch, h, h) for its sites and the next rows, ``rows_left`` in all at most; and 0."""
        columns = strip(block, self._factor.stencil, rows_left)
        return columns @ columns.mT, 0.0
