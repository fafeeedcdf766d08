"""Raw-tensor operations on sparse, stencil-shaped Cholesky factors; `banded_gmrf` is the library built on them."""

from .backends import use_backend
from .ops import matvec, negative_log_likelihood, outer, solve

__all__ = ["matvec", "negative_log_likelihood", "outer", "solve", "use_backend"]
