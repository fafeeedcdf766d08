"""The classical random fields that are defined by a sparse precision matrix. One file for each.

Each builder gives a `StencilPrecision`, and ``StencilCholesky.from_precision`` its factor. Parameters are numbers or tensors
(*batch), broadcast with each other, and gradients flow back to them.
"""

from ..precision_matrix import StencilPrecision
from .car import car_precision
from .matern import matern_precision
from .thin_plate import thin_plate_precision

__all__ = ["StencilPrecision", "car_precision", "matern_precision", "thin_plate_precision"]
