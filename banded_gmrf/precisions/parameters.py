"""What the builders share: differences of fields as sparse matrices, and checks of their parameters."""

import functools
import math
from collections.abc import Sequence

import scipy.sparse
import torch
from torch import Tensor

from ..transformations import inspect
from ..validation import check_not_boolean


def differences(grid: Sequence[int], axes: Sequence[int]) -> scipy.sparse.csr_array:
    """The first differences along each of these axes in turn, wherever they exist: (places, n)."""
    sizes = list(grid)
    matrix = scipy.sparse.eye_array(math.prod(grid), format="csr")
    for axis in axes:
        parts = sizes[:axis], sizes[axis : axis + 1], sizes[axis + 1 :]
        before, along, after = (scipy.sparse.eye_array(math.prod(part), format="csr") for part in parts)
        matrix = scipy.sparse.kron(scipy.sparse.kron(before, along[1:] - along[:-1]), after, format="csr") @ matrix
        sizes[axis] = max(sizes[axis] - 1, 0)
    return matrix


def positive(name: str, value: float | Tensor, ndim: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A parameter as a tensor (*batch, 1, ..., 1) with as many axes of size 1 as the grid has."""
    check_not_boolean(name, value)
    value = torch.as_tensor(value, dtype=dtype, device=device)
    check(name, value, (value > 0) & value.isfinite(), "finite and positive")
    return value[(..., *[None] * ndim)]


def not_negative(name: str, value: float | Tensor, ndim: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """As `positive`, of a parameter that may also be 0."""
    check_not_boolean(name, value)
    value = torch.as_tensor(value, dtype=dtype, device=device)
    check(name, value, (value >= 0) & value.isfinite(), "finite and not negative")
    return value[(..., *[None] * ndim)]


def check(name: str, value: Tensor, holds: Tensor, expected: str) -> None:
    """Raise ValueError with the value unless ``holds`` is true everywhere, also under `torch.func`'s transformations."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), f"{name}: expected {expected}")
    else:
        inspect(functools.partial(_raise_unless, name, expected), holds, value)


def _raise_unless(name: str, expected: str, holds: Tensor, value: Tensor) -> None:
    if not holds.all():
        raise ValueError(f"{name} is {value.tolist()}, expected {expected}")
