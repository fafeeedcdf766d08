"""Gaussian Markov random fields on grids, with precision Λ = L Lᵀ and L a sparse, stencil-shaped Cholesky factor."""

from gmrf_kernels import use_backend

from .cholesky import StencilCholesky, negative_log_likelihood
from .gmrf import GMRF
from .stencil import Stencil

__all__ = ["GMRF", "Stencil", "StencilCholesky", "negative_log_likelihood", "use_backend"]
