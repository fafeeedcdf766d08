"""How close whitened residuals are to white noise."""

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
