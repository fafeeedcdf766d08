"""Triton backend: kernels for GPUs. Shapes are those of `reference`; kernels/README.md says how each kernel works.

Triton's interpreter (``TRITON_INTERPRET=1`` in the environment of the process) runs the same kernels on CPU tensors, slowly.
"""

import triton

from ..reference import combinations, inner_products
from .gather import matvec, nll
from .outer import nll_factor_grad, outer
from .solve import solve

__all__ = ["INTERPRETED", "combinations", "inner_products", "matvec", "nll", "nll_factor_grad", "outer", "solve"]

# Triton decides when a kernel is defined whether it is compiled or interpreted.
INTERPRETED: bool = triton.knobs.runtime.interpret
