"""`TrendPosterior`: what is inferred of a field with a linear trend, x + Σ_k β_k covariates[k], β ~ N(0, V).

With β = R w, V = R Rᵀ, this is a field with a low-rank part, whose weights w are of interest themselves (kriging with a trend:
Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, section 2.7).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from gmrf_kernels.checks import check_device, check_tensor

from ..errors import NotPositiveDefiniteError
from ..validation import check_finite, check_not_boolean
from .low_rank_posterior import LowRankPosterior
from .posterior import ConditionalGMRF


class TrendPosterior(LowRankPosterior):
    """The sum of a field and a trend given observations, made by `posterior` with ``covariates``; see `LowRankPosterior`."""

    _own = (*LowRankPosterior._own, "_coefficients_root")

    def __init__(self, field, local: ConditionalGMRF, covariates: Tensor, root: Tensor, validate_args: bool | None = None):
        self._coefficients_root = root
        ndim = len(local.event_shape)
        factors = (root.mT @ covariates.double().flatten(-ndim)).unflatten(-1, local.event_shape)
        super().__init__(_FieldWithTrend(field, factors), local, validate_args)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "TrendPosterior":
        """The distribution repeated over a larger batch; nothing is computed again."""
        return super().expand(batch_shape, object.__new__(TrendPosterior))

    @property
    def coefficients(self) -> MultivariateNormal:
        """β given the observations, (*batch, m) in float64."""
        mean = (self._coefficients_root @ self._weights.unsqueeze(-1)).squeeze(-1)
        # V = R Rᵀ and w has the precision C Cᵀ: β has the covariance S Sᵀ with S = R C⁻ᵀ.
        S = torch.linalg.solve_triangular(self._weights_root, self._coefficients_root.mT, upper=False).mT
        return MultivariateNormal(mean, S @ S.mT, validate_args=False).expand(self._batch_shape)


class _FieldWithTrend:
    """What a `LowRankPosterior` asks of its prior."""

    def __init__(self, field, factors: Tensor):
        self._field, self.factors, self.loc = field, factors, field.loc
        self.batch_shape = field.batch_shape

    def expand(self, batch_shape: Sequence[int]) -> "_FieldWithTrend":
        return _FieldWithTrend(self._field.expand(batch_shape), self.factors)


def trend_parts(covariates: Tensor, covariate_variance: Tensor | float | None, grid: torch.Size, device: torch.device):
    """The covariates (m, *grid) and the root R of their coefficients' covariance (m, m), both in float64, checked.

    Raises:
        TypeError, ValueError: see `Conditionable.posterior`.
    """
    check_tensor("covariates", covariates)
    if covariates.ndim != len(grid) + 1 or covariates.shape[1:] != grid or len(covariates) == 0:
        raise ValueError(
            f"covariates has shape {tuple(covariates.shape)}, expected (m, {', '.join(map(str, grid))}), m at least 1"
        )
    if covariates.device != device:
        raise ValueError(f"covariates is on {covariates.device}, the distribution is on {device}")
    check_finite("covariates", covariates)
    if covariate_variance is None:
        raise TypeError("covariate_variance is None, expected the prior variance of the covariates' coefficients")
    m = len(covariates)
    check_not_boolean("covariate_variance", covariate_variance)
    variance = torch.as_tensor(covariate_variance, dtype=torch.float64, device=device)
    check_device("covariate_variance", variance, "covariates", covariates)
    if variance.shape not in ((), (m,), (m, m)):
        raise ValueError(f"covariate_variance has shape {tuple(variance.shape)}, expected (), ({m},) or ({m}, {m})")
    if variance.ndim == 2:
        root, failed = torch.linalg.cholesky_ex(variance)
        if failed or not torch.equal(variance, variance.mT):
            raise NotPositiveDefiniteError("covariate_variance is not symmetric and positive definite")
        return covariates.double(), root
    if not (variance.isfinite() & (variance > 0)).all():
        raise ValueError(f"covariate_variance is {variance.tolist()}, expected finite and positive")
    return covariates.double(), variance.sqrt().expand(m).diag()
