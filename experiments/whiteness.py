"""How close whitened residuals are to white noise, in one number."""

from torch import Tensor

from banded_gmrf import diagnostics


def lag_one_autocorrelation(residuals: Tensor) -> float:
    """Correlation of neighbouring sites of residuals (B, *grid), the mean over the axes of the grid."""
    ndim = residuals.ndim - 1
    around = diagnostics.autocorrelation(residuals, max_lag=1, ndim=ndim)
    centre = (1,) * ndim
    next_along = [around[*centre[:axis], 2, *centre[axis + 1 :]].item() for axis in range(ndim)]
    return sum(next_along) / ndim
