"""Gaussian Markov random fields on grids, with precision Λ = L Lᵀ and L a sparse, stencil-shaped Cholesky factor."""

from gmrf_kernels import use_backend

from .cholesky import StencilCholesky, negative_log_likelihood
from .gmrf import GMRF
from .precisions import StencilPrecision, car_precision, matern_precision, thin_plate_precision
from .stencil import Stencil

__all__ = [
    "GMRF",
    "Stencil",
    "StencilCholesky",
    "StencilPrecision",
    "car_precision",
    "matern_precision",
    "negative_log_likelihood",
    "thin_plate_precision",
    "use_backend",
]
