"""Separable fields, whose covariance is a product of one along some axes and one along the others."""

from gmrf_kernels.checks import broadcast_batch, check_device

from ..precision_matrix import StencilPrecision
from .stencil_matrix import StencilMatrix


def separable_precision(first: StencilPrecision, second: StencilPrecision) -> StencilPrecision:
    """Λ₁ ⊗ Λ₂, the field whose covariance is Σ₁ ⊗ Σ₂: for space and time, or channels and space::

        prior = separable_precision(ar1_precision(T, 0.9), matern_precision((H, W), 8.0, 1))    # on the grid (T, H, W)

    The variances multiply, so that one of the two fields carries the scale. Cressie and Wikle, Statistics for Spatio-Temporal
    Data, 2011. Of K₁ and K₂ offsets come 2 K₁ K₂ + K₁ + K₂. An exact factor fills in over whole frames of H W sites.

    Args:
        first: Λ₁, (*batch) on the grid of the first axes.
        second: Λ₂, of the same dtype and device, on the grid of the last axes. The batches are broadcast.

    Returns:
        Λ on the grid (*first.grid, *second.grid), differentiable in both.

    Raises:
        TypeError: an argument that is not a `StencilPrecision`, or two dtypes.
        ValueError: more than three axes together, two devices, or batches that do not broadcast.
    """
    for name, precision in (("first", first), ("second", second)):
        if not isinstance(precision, StencilPrecision):
            raise TypeError(f"{name} is a {type(precision).__name__}, expected a StencilPrecision")
    ndim = first.stencil.ndim, second.stencil.ndim
    if sum(ndim) > 3:
        raise ValueError(f"first has {ndim[0]} axes and second {ndim[1]}, expected 3 together at most")
    if first.diag.dtype != second.diag.dtype:
        raise TypeError(f"second is {second.diag.dtype}, first is {first.diag.dtype}")
    check_device("second", second.diag, "first", first.diag)
    broadcast_batch("second", second.batch_shape, "first", first.batch_shape)
    return StencilMatrix.from_precision(first).kron(StencilMatrix.from_precision(second)).to_precision()
