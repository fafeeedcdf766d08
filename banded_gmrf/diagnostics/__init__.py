"""How well a GMRF fits data: is the whitened residual white, are its norms those that the model expects, how far are samples.

The residual map itself is `GMRF.whiten`: y = Lᵀ(x - loc) is standard normal, independent from site to site, if x follows the
model. `whitened_moments`, `autocorrelation` and `quantiles` say where and how y departs from that, `chi_squared_coverage` looks
at its norm, and the energy and the variogram score compare x with samples of the model (both proper, lower is better).
`sample_growth` needs no data: it tells a factor whose samples explode. `marginal_coverage` looks at the intervals of single
sites and `block_coverage` at those of means over blocks, `leave_one_out` at sites given all others, and `conditional_score` at
a region given the rest. `conformal_scale` says how much wider regions must be to hold a level, even if the model is wrong.
"""

from .conformal import conformal_scale
from .coverage import ChiSquared, block_coverage, conditional_score, leave_one_out, marginal_coverage
from .scores import energy_score, variogram_score
from .stability import sample_growth
from .whiteness import Moments, Quantiles, autocorrelation, chi_squared_coverage, quantiles, whitened_moments

__all__ = [
    "ChiSquared",
    "Moments",
    "Quantiles",
    "autocorrelation",
    "block_coverage",
    "chi_squared_coverage",
    "conditional_score",
    "conformal_scale",
    "energy_score",
    "leave_one_out",
    "marginal_coverage",
    "quantiles",
    "sample_growth",
    "variogram_score",
    "whitened_moments",
]
