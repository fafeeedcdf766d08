"""How close whitened residuals are to white noise."""

from collections.abc import Sequence

import scipy.stats
import torch
from torch import Tensor


def lag_one_autocorrelation(residuals: Tensor) -> float:
    """Correlation of neighbouring sites of residuals (B, *grid), the mean over the axes of the grid."""
    centred = residuals - residuals.mean()
    lagged = [
        (centred.narrow(axis, 1, size - 1) * centred.narrow(axis, 0, size - 1)).mean()
        for axis, size in enumerate(residuals.shape[1:], start=1)
    ]
    return (torch.stack(lagged).mean() / centred.square().mean()).item()


def chi_square_coverage(residuals: Tensor, levels: Sequence[float]) -> list[float]:
    """The share of residuals (B, *grid) whose sum of squares lies below each quantile of χ² with n degrees of freedom.

    Of white Gaussian residuals it is the level itself; a model too sure of itself has less, one too careful has more.
    """
    squares = residuals.flatten(1).square().sum(1).cpu()
    quantiles = torch.as_tensor(scipy.stats.chi2.ppf(levels, residuals[0].numel()), dtype=squares.dtype)
    return (squares[:, None] <= quantiles).double().mean(0).tolist()
