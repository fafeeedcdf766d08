"""How close whitened residuals are to white noise, and to a normal one, in one number each."""

from torch import Tensor

from banded_gmrf import diagnostics


def lag_autocorrelation(residuals: Tensor, lag: int = 1) -> float:
    """Correlation of sites of residuals (B, *grid) that are ``lag`` apart along an axis, the mean over the axes of the grid."""
    ndim = residuals.ndim - 1
    around = diagnostics.autocorrelation(residuals, max_lag=lag, ndim=ndim)
    centre = (lag,) * ndim
    along = [around[*centre[:axis], 2 * lag, *centre[axis + 1 :]].item() for axis in range(ndim)]
    return sum(along) / ndim


def excess_kurtosis(residuals: Tensor) -> float:
    """The fourth moment of all sites over the square of their variance, less 3: 0 if they are normal."""
    centred = residuals.double() - residuals.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square() - 3).item()
