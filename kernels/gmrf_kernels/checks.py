"""Checks that tensors given to the operations must pass, with errors that name the argument; and the dtypes they take."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)


# Results kept of each function of shapes.
MOST_REMEMBERED = 1024

_Parameters, _Result = ParamSpec("_Parameters"), TypeVar("_Result")


def remembered(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorator of a function of shapes that keeps its results: small calls meet the same shapes again and again.

    Arguments are positional. The sizes of a graph that is traced are symbols, of which nothing is kept.
    """
    kept = functools.lru_cache(MOST_REMEMBERED)(function)

    @functools.wraps(function)
    def call(*args):
        if not torch.compiler.is_compiling():
            try:
                return kept(*args)
            except TypeError:  # symbols cannot be hashed
                pass
        return function(*args)

    return call


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which coefficients of ``dtype`` are computed with: float32 for float16 and bfloat16, else their own."""
    return torch.float32 if dtype in _HALF else dtype


def check_factor(diag: Tensor, off_diag: Tensor, num_offsets: int, ndim: int, diag_name: str = "diag") -> torch.Size:
    """Check the two tensors of a factor against each other and the stencil; return their broadcast batch shape.

    Raises:
        TypeError: not a tensor, not of a supported floating dtype, or not of one dtype (a float32 diagonal is accepted beside
            float16 and bfloat16 off-diagonals).
        ValueError: another number of offsets than the stencil's, an empty grid, or grids, batches or devices that differ.
    """
    for name, tensor in ((diag_name, diag), ("off_diag", off_diag)):
        check_tensor(name, tensor)
    batch = _factor_batch(diag.shape, off_diag.shape, num_offsets, ndim, diag_name)
    if diag.dtype != accumulate_dtype(off_diag.dtype):
        check_dtype("off_diag", off_diag, diag_name, diag)
    check_device("off_diag", off_diag, diag_name, diag)
    return batch


@remembered
def _factor_batch(diag: torch.Size, off_diag: torch.Size, num_offsets: int, ndim: int, diag_name: str) -> torch.Size:
    """Check the shapes of a factor's tensors; the broadcast of their batches."""
    if len(diag) < ndim:
        raise ValueError(f"{diag_name} has shape {tuple(diag)}, the stencil needs a grid of {ndim} axes")
    grid = diag[len(diag) - ndim :]
    if 0 in grid:
        raise ValueError(f"{diag_name} has the empty grid {tuple(grid)}, every axis needs at least one site")
    if len(off_diag) < ndim + 1:
        raise ValueError(f"off_diag has shape {tuple(off_diag)}, expected (*batch, {num_offsets}, {', '.join(map(str, grid))})")
    if off_diag[-ndim:] != grid:
        raise ValueError(f"off_diag has grid {tuple(off_diag[-ndim:])}, {diag_name} has grid {tuple(grid)}")
    if off_diag[-ndim - 1] != num_offsets:
        raise ValueError(f"off_diag has {off_diag[-ndim - 1]} offsets, the stencil has {num_offsets}")
    return broadcast_batch("off_diag", off_diag[: -ndim - 1], diag_name, diag[: len(diag) - ndim])


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}, expected float16, bfloat16, float32 or float64")


def check_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise TypeError unless two tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, {other_name} is {other.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} is on {other.device}")


def broadcast_batch(name: str, batch: Sequence[int], other_name: str, other: Sequence[int]) -> torch.Size:
    """The broadcast of two batch shapes, or a ValueError that names both arguments."""
    if tuple(batch) == tuple(other):
        return torch.Size(batch)
    return _broadcast(name, tuple(batch), other_name, tuple(other))


@remembered
def _broadcast(name: str, batch: tuple[int, ...], other_name: str, other: tuple[int, ...]) -> torch.Size:
    try:
        return torch.broadcast_shapes(batch, other)
    except RuntimeError:
        raise ValueError(
            f"{name} has batch shape {tuple(batch)}, which does not broadcast with {tuple(other)} of {other_name}"
        ) from None


def check_vector(name: str, vector: Tensor, coefficient_name: str, coefficient: Tensor, grid: torch.Size) -> None:
    """Check a vector (*sample, *batch, *grid) against the factor that it meets.

    Raises:
        TypeError: its dtype is not the factor's (float32 is accepted beside float16 and bfloat16 coefficients).
        ValueError: its grid or its device is not the factor's.
    """
    check_tensor(name, vector)
    if vector.ndim < len(grid) or vector.shape[vector.ndim - len(grid) :] != grid:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected (..., {', '.join(map(str, grid))})")
    if vector.dtype != accumulate_dtype(coefficient.dtype):
        check_dtype(name, vector, coefficient_name, coefficient)
    check_device(name, vector, coefficient_name, coefficient)
