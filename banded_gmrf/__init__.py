"""Gaussian Markov random fields on grids, with precision Λ = L Lᵀ and L a sparse, stencil-shaped Cholesky factor."""

from gmrf_kernels import use_backend

from . import diagnostics
from .cholesky import StencilCholesky, negative_log_likelihood
from .conditioning import ConditionalGMRF
from .divergence import kl_divergence
from .gmrf import GMRF
from .precisions import StencilPrecision, car_precision, matern_precision, thin_plate_precision
from .stencil import Stencil

__version__ = "0.1.0"

__all__ = [
    "GMRF",
    "ConditionalGMRF",
    "Stencil",
    "StencilCholesky",
    "StencilPrecision",
    "car_precision",
    "diagnostics",
    "kl_divergence",
    "matern_precision",
    "negative_log_likelihood",
    "thin_plate_precision",
    "use_backend",
]
