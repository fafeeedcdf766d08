"""Gaussian Markov random fields on grids, with precision Λ = L Lᵀ and L a sparse, stencil-shaped Cholesky factor.

Where things are; every file imports only what stands above it, but for analysis/divergence, which takes two distributions:

    stencil, batched, coefficients    which neighbours a site has; what objects that hold tensors share
    errors, transformations           what is raised where numbers are bad, whatever transformation of torch they are under
    validation                        checks of what a distribution is given
    factors                           the few fields of a low-rank part: sums of them, and small systems
    precision_matrix, precisions/     sparse precisions Λ, and the classical fields defined by one, a file each
    recursions/                       dense recursions over rows of the grid, on raw coefficients
    construction/                     how a factor is *built*: from covariances, samples, precisions, other factors
    cholesky                          `StencilCholesky`, the factor
    analysis/                         how a field is *looked at*: marginal variances, spectra, divergences
    operators/                        what an instrument sees of a field: linear observation operators
    inference/                        what is *inferred*: posteriors, one observation model per class, solvers
    low_rank_density                  the log density of a field and a few fields of the whole grid
    gmrf, low_rank, pyro              `GMRF`, the distribution; the same plus a few fields of the whole grid; the same for Pyro
    sparse                            `SparseGMRF`, the distribution of a sparse precision
    deepinv, linear_operator          a field in those libraries: as prior, noise and fidelity; as matrices
    diagnostics/                      how well a model fits data
"""

import torch

from gmrf_kernels import use_backend

from . import diagnostics, operators, precisions
from .analysis.divergence import kl_divergence
from .cholesky import StencilCholesky, negative_log_likelihood
from .gmrf import GMRF
from .inference.constraints import ConstrainedGMRF
from .inference.evidence import EvidenceFit, maximum_evidence
from .inference.laplace import LaplaceGMRF
from .inference.low_rank_posterior import LowRankPosterior
from .inference.posterior import ConditionalGMRF
from .inference.trend import TrendPosterior
from .low_rank import LowRankGMRF
from .precision_matrix import StencilPrecision
from .precisions import ar1_precision, car_precision, matern_precision, separable_precision, thin_plate_precision
from .sparse import SparseGMRF
from .stencil import Stencil

# Nothing but tensors and integers is in their files: torch.load may read them with its default, weights_only=True.
torch.serialization.add_safe_globals([GMRF, LowRankGMRF, SparseGMRF, Stencil, StencilCholesky, StencilPrecision])

__version__ = "0.1.0"

__all__ = [
    "GMRF",
    "ConditionalGMRF",
    "ConstrainedGMRF",
    "EvidenceFit",
    "LaplaceGMRF",
    "LowRankGMRF",
    "LowRankPosterior",
    "SparseGMRF",
    "Stencil",
    "StencilCholesky",
    "StencilPrecision",
    "TrendPosterior",
    "ar1_precision",
    "car_precision",
    "diagnostics",
    "kl_divergence",
    "matern_precision",
    "maximum_evidence",
    "negative_log_likelihood",
    "operators",
    "precisions",
    "separable_precision",
    "thin_plate_precision",
    "use_backend",
]
