"""Does a factor stay stable from one edge of the grid to the other: do its own samples grow."""

import torch
from torch import Tensor

from gmrf_kernels import standard_normal

from ..construction.stability import growth_of_samples
from ..gmrf import GMRF
from ..validation import check_model


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
        TypeError: ``q`` is another distribution.
        ValueError: fewer than one sample.
    """
    check_model("q", q, GMRF)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    factor = q.precision_cholesky.detach().to(torch.float64)
    white = standard_normal((num_samples, *q.batch_shape, *q.event_shape), torch.float64, q.loc.device)
    return growth_of_samples(*factor.coefficients, white)
