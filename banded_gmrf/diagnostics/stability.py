"""Does a factor stay stable from one edge of the grid to the other: do its own samples grow."""

import torch
from torch import Tensor

from ..gmrf import GMRF


def sample_growth(q: GMRF, num_samples: int = 16) -> Tensor:
    """How much samples of a model grow across the grid: of the lines along each axis, the largest over the smallest.

    A factor may draw each site larger than the sites after it: one that was fitted to data, such as
    ``StencilCholesky.from_samples(..., stationary=True)``, or one that a network predicts. Then samples grow from line to line,
    to infinity on a large grid, while the likelihood is finite. A line is all sites that share an index on one axis; root mean
    squares of samples, without the mean ``loc``, over lines are compared.

    Args:
        q: the model.
        num_samples: drawn from the model, at least 1; in float64.

    Returns:
        (*batch) in float64, at least 1: a few for a field whose variance is about the same everywhere, as for a stationary one;
        infinite where samples overflow. Above 100, say, a model should vary by that much for a reason.

    Raises:
        ValueError: fewer than one sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    factor, ndim = q.precision_cholesky.detach().to(torch.float64), len(q.event_shape)
    u = torch.randn(num_samples, *q.batch_shape, *q.event_shape, dtype=torch.float64, device=q.loc.device)
    magnitudes = factor.solve(u, transpose=True).abs()
    largest = magnitudes.amax(tuple(range(-ndim, 0)), keepdim=True)
    scaled = (magnitudes / largest).square().mean(0)  # squares of large numbers overflow
    growth = torch.ones(q.batch_shape, dtype=torch.float64, device=q.loc.device)
    for axis in range(-ndim, 0):
        others = [other for other in range(-ndim, 0) if other != axis]
        lines = scaled.mean(others).sqrt() if others else scaled.sqrt()
        growth = torch.maximum(growth, lines.amax(-1) / lines.amin(-1))
    return growth.where(magnitudes.isfinite().flatten(-ndim).all(-1).all(0), torch.inf)
