"""Gaussian Markov random fields on grids, with precision Λ = L Lᵀ and L a sparse, stencil-shaped Cholesky factor."""

from gmrf_kernels import use_backend

from .cholesky import StencilCholesky, negative_log_likelihood
from .conditioning import ConditionalGMRF
from .divergence import kl_divergence
from .gmrf import GMRF
from .stencil import Stencil

__all__ = ["GMRF", "ConditionalGMRF", "Stencil", "StencilCholesky", "kl_divergence", "negative_log_likelihood", "use_backend"]
