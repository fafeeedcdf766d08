"""Raw-tensor operations on sparse, stencil-shaped Cholesky factors; `banded_gmrf` is the library built on them."""

from .backends import use_backend
from .normals import standard_normal
from .ops import matvec, negative_log_likelihood, outer, solve

__all__ = ["matvec", "negative_log_likelihood", "outer", "solve", "standard_normal", "use_backend"]
