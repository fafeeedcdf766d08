"""Triton backend: kernels for GPUs. Shapes are those of `reference`; kernels/README.md says how each kernel works.

Triton's interpreter (``TRITON_INTERPRET=1`` in the environment of the process) runs the same kernels on CPU tensors, slowly.
"""

from functools import partial

import triton

from .. import reference
from .gather import matvec, nll
from .outer import nll_factor_grad, outer
from .solve import solve

__all__ = [
    "INTERPRETED",
    "low_rank_gradients",
    "low_rank_log_density",
    "matvec",
    "nll",
    "nll_factor_grad",
    "outer",
    "solve",
]

low_rank_log_density = partial(reference.low_rank_log_density, matvec=matvec)
low_rank_gradients = partial(reference.low_rank_gradients, matvec=matvec, outer=outer)

# Triton decides when a kernel is defined whether it is compiled or interpreted.
INTERPRETED: bool = triton.knobs.runtime.interpret
