"""Operators that select sites: observations are the values of some of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..stencil import as_grid, as_integer
from .base import GridOperator


class Downsample(GridOperator):
    """Every ``factor``-th site along each axis, from the first one on. For means of blocks, let it follow a `Convolution`.

    Args:
        factor: for each axis, or one number for all of ``ndim`` axes.
        ndim: number of axes where ``factor`` is one number.
        grid: the grid, if it is to be fixed at once.

    Raises:
        TypeError: a factor that is not an integer.
        ValueError: a factor less than 1, or a number of axes that is not 1 to 3 or does not fit the grid.
    """

    def __init__(self, factor: int | Sequence[int], *, ndim: int = 2, grid: Sequence[int] | None = None):
        if not isinstance(factor, Sequence):
            factor = (factor,) * (len(grid) if grid is not None else as_integer("ndim", ndim))
        self.factor = tuple(as_integer("factor", one) for one in factor)
        self.ndim = len(self.factor)
        if not 1 <= self.ndim <= 3 or any(one < 1 for one in self.factor):
            raise ValueError(f"factor is {factor}, expected at least 1 for each of 1 to 3 axes")
        if grid is not None:
            self.grid = as_grid(grid)
            self.output_shape = self._output_shape(self.grid)

    def _output_shape(self, grid: torch.Size) -> torch.Size:
        self._check_axes(grid)
        return torch.Size(-(-n // factor) for n, factor in zip(grid, self.factor, strict=True))

    def _forward(self, x: Tensor) -> Tensor:
        return x[(..., *(slice(None, None, factor) for factor in self.factor))]

    def _adjoint(self, y: Tensor) -> Tensor:
        for axis, (n, factor) in enumerate(zip(self.grid, self.factor, strict=True), start=-self.ndim):
            shape = list(y.shape)
            shape[axis] = n
            y = y.new_zeros(shape).index_copy(axis, torch.arange(0, n, factor, device=y.device), y)
        return y

    def selected_sites(self) -> Tensor:
        return self._forward(torch.arange(self.grid.numel()).reshape(self.grid)).flatten()


class Mask(GridOperator):
    """The values of some sites: (*batch, *grid) to (*batch, m), the m true sites of the mask in raster order.

    For a mask of each field of a batch, give `GMRF.posterior` an infinite ``noise_variance`` where nothing is observed.

    Args:
        mask: bool (*grid), true where a site is observed.

    Raises:
        TypeError: ``mask`` is not a tensor of bools.
        ValueError: it does not have 1 to 3 axes of at least one site.
    """

    def __init__(self, mask: Tensor):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask is {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}, expected a bool tensor"
            )
        if not 1 <= mask.ndim <= 3 or mask.numel() == 0:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected a grid of 1 to 3 axes of at least one site")
        self.mask = mask
        self.grid = mask.shape
        self._sites = mask.flatten().nonzero()[:, 0]
        self.output_shape = self._sites.shape

    def _device(self) -> torch.device:
        return self.mask.device

    def _forward(self, x: Tensor) -> Tensor:
        return x.flatten(-len(self.grid)).index_select(-1, self._sites)

    def _adjoint(self, y: Tensor) -> Tensor:
        zeros = y.new_zeros(*y.shape[:-1], self.grid.numel())
        return zeros.index_copy(-1, self._sites, y).unflatten(-1, self.grid)

    def selected_sites(self) -> Tensor:
        return self._sites
