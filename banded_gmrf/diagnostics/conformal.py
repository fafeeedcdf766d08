"""How much wider a model's regions must be to hold a level on new fields: split conformal prediction."""

import math

import scipy.special
import torch
from torch import Tensor

from ..gmrf import GMRF
from ..inference.posterior import ConditionalGMRF
from ..validation import check_level
from .coverage import deviations

_REGIONS = ("ellipsoid", "intervals")
_ROUNDING = 1e-9  # of (m + 1) · level, which may be whole


def conformal_scale(q: "GMRF | ConditionalGMRF", x: Tensor, level: float = 0.9, region: str = "intervals") -> Tensor:
    """The factor by which a model's regions of a probability must be widened to hold it on new fields, whatever the model.

    Calibration fields and the new one must be exchangeable, and none of them may have served to fit the model. Then, over the
    draw of all of them, with m calibration fields:

    * "ellipsoid": a new field lies in {‖Lᵀ(x - mean)‖ ≤ scale · r} with a probability of at least ``level``, and at most
      ``level`` + 1 / (m + 1) if no two scores are equal; r² is the quantile of χ² at the level. The scale is the score at rank
      ⌈(m + 1) · level⌉ of m (Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005; Lei et al., JASA 2018).
    * "intervals": the expected fraction of sites of a new field in mean ± scale · z · stddev is at least ``level``; z is the
      normal quantile. Sites of one field may depend on each other, so that it counts as one: the scale is the smallest with
      Σ fractions ≥ (m + 1) · level (conformal risk control: Angelopoulos, Bates, Fisch, Lei & Schuster, ICLR 2024).

    A scale of 1 is that of a model which is right; below 1 its regions are wider than they need be.

    Args:
        q: the model, of one distribution, or of one for each field; any with ``mean`` and ``stddev``, or with ``mean`` and
            ``log_prob`` for "ellipsoid".
        x: the calibration fields (*sample, *batch, *grid), broadcast against the model's batch; all leading axes count fields.
        level: a probability.
        region: "ellipsoid" or "intervals".

    Returns:
        () in float64.

    Raises:
        TypeError: ``level`` is not a number, or ``x`` not a floating-point tensor.
        ValueError: another region, a level that is not between 0 and 1, another grid, NaN or infinity, a model without a site
            of positive variance, or fewer than level / (1 - level) fields, for which no finite scale has the guarantee.
    """
    if region not in _REGIONS:
        raise ValueError(f"region is {region!r}, expected 'ellipsoid' or 'intervals'")
    if not 0 < check_level(level) < 1:
        raise ValueError(f"level is {level}, expected more than 0 and less than 1")
    ndim = len(q.event_shape)
    count = torch.broadcast_shapes(x.shape[: max(0, x.ndim - ndim)], q.batch_shape).numel()
    rank = (count + 1) * level - _ROUNDING
    if rank > count:
        needed = math.ceil(level / (1 - level) - _ROUNDING)
        raise ValueError(f"x has {count} fields, expected at least {needed} for a level of {level}")
    z, exists = deviations(q, x)
    if region == "intervals":
        shares = exists.double() / exists.flatten(-ndim).sum(-1).clamp(min=1)[(..., *[None] * ndim)]
        ranked, order = z.flatten().sort()
        reached = shares.flatten()[order].cumsum(0) >= rank
        radius = scipy.special.ndtri(0.5 * (1 + level))
        return ranked[reached.double().argmax()] / radius
    squares = 2 * (q.log_prob(q.mean) - q.log_prob(x)).double().expand(z.shape[:-ndim])
    sites = exists.flatten(-ndim).sum(-1).double()
    radius = 2 * torch.from_numpy(scipy.special.gammaincinv(0.5 * sites.cpu().numpy(), level)).to(squares)
    scores = (squares / radius).clamp(min=0).sqrt().flatten()
    return scores.sort().values[math.ceil(rank) - 1]
