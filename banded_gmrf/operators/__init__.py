"""Linear observation operators: what an instrument sees of a field, y = A x.

Each maps fields (*batch, *grid) to observations (*batch, *output_shape), and has its adjoint Aᵀ. ``A @ B`` applies B first. All
are differentiable in the field and in their own tensors, and work under torch's transformations.

An operator that does not know its grid (a convolution, say) is applied to whatever grid it is given. `LinearOperator.bind`
fixes one, which `GMRF.posterior` does with the distribution's.
"""

from .base import LinearOperator
from .convolution import Convolution
from .matrix import Matrix
from .selection import Downsample, Mask

__all__ = ["Convolution", "Downsample", "LinearOperator", "Mask", "Matrix"]
