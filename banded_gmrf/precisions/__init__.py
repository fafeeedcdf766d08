"""The classical random fields that are defined by a sparse precision matrix. One file for each.

Each builder gives a `StencilPrecision`, and ``StencilCholesky.from_precision`` its factor. Parameters are numbers or tensors
(*batch), broadcast with each other, and gradients flow back to them.
"""

from ..precision_matrix import StencilPrecision
from .ar1 import ar1_precision
from .car import car_precision
from .matern import matern_precision
from .separable import separable_precision
from .thin_plate import thin_plate_precision

__all__ = [
    "StencilPrecision",
    "ar1_precision",
    "car_precision",
    "matern_precision",
    "separable_precision",
    "thin_plate_precision",
]
