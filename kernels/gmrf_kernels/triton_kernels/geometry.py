"""What every launch needs to know of its tensors: three grid axes, strides, and the device.

Kernels see all grids as (D, H, W), with leading 1s for fewer axes, and take the stencil as a constant, so that each of its
terms is code of its own and no array of indices exists.
"""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..stencils import Offsets


def grid3(grid: Sequence[int]) -> tuple[int, int, int]:
    """(D, H, W) of a grid of 1 to 3 axes."""
    depth, height, width = (1,) * (3 - len(grid)) + tuple(grid)
    return depth, height, width


@functools.cache
def offsets3(offsets: Offsets) -> Offsets:
    """The offsets with three components, (planes, rows, columns)."""
    return tuple((0,) * (3 - len(offset)) + tuple(offset) for offset in offsets)


def strides3(tensor: Tensor, ndim: int) -> tuple[int, int, int]:
    """Elements from one plane, row and column to the next, for a tensor whose last ``ndim`` axes are the grid."""
    depth, height, width = (0,) * (3 - ndim) + tensor.stride()[tensor.ndim - ndim :]
    return depth, height, width


def spans_32_bits(*tensors: Tensor, ndim: int) -> bool:
    """One of the grids, its last ``ndim`` axes, spans 2³¹ elements of memory or more: offsets inside it need 64 bits."""
    for tensor in tensors:
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape[-ndim:], tensor.stride()[-ndim:], strict=True))
        if extent >= 2**31:
            return True
    return False


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
