"""Convolutions with three kinds of boundaries, by fast Fourier transforms."""

from collections.abc import Sequence

import scipy.fft
import torch
from torch import Tensor

from gmrf_kernels.checks import check_tensor

from ..stencil import as_grid, as_integer
from ..validation import check_finite
from .base import GridOperator

_BOUNDARIES = ("zero", "reflect", "periodic")


class Convolution(GridOperator):
    """The convolution of a field with a kernel: a blur, a point spread function.

    y[i] = Σ_j kernel[j] x[i + c - j] along each axis, as in `scipy.ndimage.convolve`: a kernel that is not symmetric is
    mirrored, which torch's ``conv2d`` does not do. Its centre is c = s // 2 of s entries, for an even s the second of the two
    in the middle. Computed with fast Fourier transforms.

    Args:
        kernel: (*batch, *sizes), floating-point; its sizes may be odd or even, and larger than the grid.
        boundary: what the field is outside the grid, for all axes or one for each: "zero"; "reflect", mirrored about the
            outer edge of the last site (d c b a | a b c d | d c b a, as SciPy's "reflect"; torch's leaves out the repeated
            a and d); or "periodic". The grid may be smaller than the kernel: it is mirrored or repeated as often as needed.
        ndim: how many of the kernel's last axes belong to the grid; None is all of them.
        grid: the grid, if it is to be fixed at once.

    Raises:
        TypeError: ``kernel`` is not a floating-point tensor, or ``ndim`` not an integer.
        ValueError: a kernel without entries or with NaN or infinity, another boundary, or a number of axes that does not fit.
    """

    def __init__(
        self,
        kernel: Tensor,
        boundary: str | Sequence[str] = "zero",
        *,
        ndim: int | None = None,
        grid: Sequence[int] | None = None,
    ):
        check_tensor("kernel", kernel)
        self.ndim = kernel.ndim if ndim is None else as_integer("ndim", ndim)
        if not 1 <= self.ndim <= min(3, kernel.ndim):
            raise ValueError(
                f"kernel has shape {tuple(kernel.shape)}, expected one of 1 to 3 axes, or ndim for one with a batch"
            )
        self._sizes = kernel.shape[kernel.ndim - self.ndim :]
        if 0 in self._sizes:
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}, expected at least one entry along each axis")
        check_finite("kernel", kernel)
        self.boundary = (boundary,) * self.ndim if isinstance(boundary, str) else tuple(boundary)
        if len(self.boundary) != self.ndim or any(one not in _BOUNDARIES for one in self.boundary):
            raise ValueError(f"boundary is {boundary!r}, expected 'zero', 'reflect' or 'periodic', or one for each axis")
        self.kernel = kernel
        self.batch_shape = kernel.shape[: kernel.ndim - self.ndim]
        if grid is not None:
            self.grid = as_grid(grid)
            self.output_shape = self._output_shape(self.grid)

    def _output_shape(self, grid: torch.Size) -> torch.Size:
        self._check_axes(grid)
        return grid

    _grid_of_observation = GridOperator._grid_of

    def _device(self) -> torch.device:
        return self.kernel.device

    def periodic_axes(self) -> set[int]:
        return {axis for axis, boundary in enumerate(self.boundary) if boundary == "periodic"}

    def _forward(self, x: Tensor) -> Tensor:
        for axis in self._reflected():
            x = x.index_select(axis, self._mirror(axis, x.device))
        return self._crop(self._circular(x, adjoint=False), self._starts(), self.grid)

    def _adjoint(self, y: Tensor) -> Tensor:
        padding = [side for start in reversed(self._starts()) for side in (start, 0)]
        y = self._circular(torch.nn.functional.pad(y, padding), adjoint=True)
        extended = [n + s - 1 if b == "reflect" else n for n, s, b in zip(self.grid, self._sizes, self.boundary, strict=True)]
        y = self._crop(y, [0] * self.ndim, extended)
        for axis in self._reflected():
            shape = list(y.shape)
            shape[axis] = self.grid[axis]
            y = y.new_zeros(shape).index_add(axis, self._mirror(axis, y.device), y)
        return y

    def _reflected(self) -> list[int]:
        """The axes with mirrors, as negative numbers."""
        return [axis - self.ndim for axis, boundary in enumerate(self.boundary) if boundary == "reflect"]

    def _mirror(self, axis: int, device: torch.device) -> Tensor:
        """Which site each place of the field extended along an axis shows: mirrors on both sides, as many as it takes."""
        n, size = self.grid[axis], self._sizes[axis]
        before = size - 1 - size // 2
        place = torch.arange(-before, n + size - 1 - before, device=device) % (2 * n)
        return torch.where(place < n, place, 2 * n - 1 - place)

    def _starts(self) -> list[int]:
        """Where the grid begins in the extended field."""
        return [s - 1 - s // 2 if b == "reflect" else 0 for s, b in zip(self._sizes, self.boundary, strict=True)]

    def _torus(self) -> list[int]:
        """Sizes of a torus on which nothing that wraps around is read."""
        sizes = []
        for n, s, boundary in zip(self.grid, self._sizes, self.boundary, strict=True):
            extended = {"periodic": n, "zero": n + max(s // 2, s - 1 - s // 2), "reflect": n + s - 1}[boundary]
            sizes.append(n if boundary == "periodic" else scipy.fft.next_fast_len(extended, real=True))
        return sizes

    def _spectrum(self, dtype: torch.dtype) -> Tensor:
        """The kernel's transform on the torus, its centre at the origin."""
        return kernel_spectrum(self.kernel.to(dtype), self._torus())

    def _circular(self, x: Tensor, adjoint: bool) -> Tensor:
        sizes, axes = self._torus(), tuple(range(-self.ndim, 0))
        if x.numel() == 0:  # which MKL's transforms do not take
            return x.new_zeros(*x.shape[: -self.ndim], *sizes)
        spectrum = self._spectrum(x.dtype)
        product = torch.fft.rfftn(x, s=sizes, dim=axes) * (spectrum.conj() if adjoint else spectrum)
        return torch.fft.irfftn(product, s=sizes, dim=axes)

    def _crop(self, x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            x = x.narrow(axis - self.ndim, start, size)
        return x


def kernel_spectrum(kernel: Tensor, sizes: Sequence[int]) -> Tensor:
    """The real Fourier transform of a kernel (*batch, *sizes of it) laid around the origin of a torus, as often as it takes."""
    axes = tuple(range(-len(sizes), 0))
    for axis, size in zip(axes, sizes, strict=True):
        length = kernel.shape[axis]
        place = (torch.arange(length, device=kernel.device) - length // 2) % size
        shape = list(kernel.shape)
        shape[axis] = size
        kernel = kernel.new_zeros(shape).index_add(axis, place, kernel)
    return torch.fft.rfftn(kernel, dim=axes)
