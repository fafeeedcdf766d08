"""`InferredField`, the base of fields made of others: what follows from their mean, variances and samples."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class InferredField(Distribution):
    """Base of distributions of a whole grid that are made of another one, by conditioning it or adding to it.

    A subclass has ``mean``, ``rsample`` and ``marginal_variance``, and says what an expansion of it shares.
    """

    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, as torch's own
    _conditioned: str  # the attribute with that other distribution, which an expansion expands
    _own: tuple[str, ...]  # the other attributes, which it shares

    def _expanded(self, new: "InferredField", batch_shape: Sequence[int]) -> "InferredField":
        """``new``, an instance without attributes, as this distribution repeated over a larger batch."""
        batch_shape = torch.Size(batch_shape)
        setattr(new, self._conditioned, getattr(self, self._conditioned).expand(batch_shape))
        for name in self._own:
            setattr(new, name, getattr(self, name))
        Distribution.__init__(new, batch_shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def mode(self) -> Tensor:
        """(*batch, *grid), the mean."""
        return self.mean

    @property
    def variance(self) -> Tensor:
        """(*batch, *grid), `marginal_variance` with its defaults: exact, or from 256 samples where that would take long."""
        return self.marginal_variance().variance

    @property
    def stddev(self) -> Tensor:
        """(*batch, *grid), the root of the variance; 0 where that is, and its gradient there as well."""
        variance = self.variance
        known = variance == 0
        return variance.masked_fill(known, 1).sqrt().masked_fill(known, 0)

    def null_space(self) -> None:
        """None: the distribution is proper."""
        return None

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid)."""
        with torch.no_grad():
            return self.rsample(sample_shape)
