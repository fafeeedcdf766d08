"""`Stencil`: which neighbours a site's column of the Cholesky factor reaches."""

import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gmrf_kernels.stencils import overlap, wavefront_slopes


class Stencil:
    """A set of forward offsets on a grid of 1 to 3 axes.

    An offset is forward if its first non-zero component is positive: the neighbour comes later in raster (C) order. The
    offsets are kept in raster order, whatever order they are given in; that is the order of ``off_diag``.

    Args:
        offsets: the offsets, each a sequence of ``ndim`` integers, in pixels; for one axis plain integers will do.
        ndim: number of grid axes; needed only where there are no offsets (a diagonal factor).

    Raises:
        TypeError: an offset is not made of integers.
        ValueError: an offset is not forward, occurs twice, or has another number of axes.
    """

    def __init__(self, offsets: Iterable[Sequence[int] | int], ndim: int | None = None):
        if not isinstance(offsets, Iterable):
            raise TypeError(f"offsets is {offsets!r}, expected a sequence of offsets")
        parsed = [_parse_offset(offset) for offset in offsets]
        if ndim is None:
            if not parsed:
                raise ValueError("ndim is needed for a stencil without offsets")
            ndim = len(parsed[0])
        ndim = as_integer("ndim", ndim)
        if not 1 <= ndim <= 3:
            raise ValueError(f"ndim is {ndim}, expected a grid of 1 to 3 axes")
        for offset in parsed:
            if len(offset) != ndim:
                raise ValueError(f"offset {offset} has {len(offset)} axes, the stencil has {ndim}")
            if offset <= (0,) * ndim:
                raise ValueError(f"offset {offset} is not forward: its first non-zero component must be positive")
            if parsed.count(offset) > 1:
                raise ValueError(f"offset {offset} occurs {parsed.count(offset)} times, expected once")
        self._offsets = tuple(sorted(parsed))
        self._ndim = ndim

    @classmethod
    def from_json(cls, value: dict) -> "Stencil":
        """The stencil that `to_json` turned into ``value``."""
        return cls(value["offsets"], value["ndim"])

    def to_json(self) -> dict:
        """What JSON can hold of the stencil: its offsets and its number of axes."""
        return {"offsets": [list(offset) for offset in self._offsets], "ndim": self._ndim}

    @classmethod
    def square(cls, size: int) -> "Stencil":
        """The forward half of a ``size`` x ``size`` patch of pixels, ``size`` odd: (size² - 1) / 2 offsets.

        The neighbourhood of Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018.
        """
        size = as_integer("size", size)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size is {size}, expected an odd number of pixels")
        return cls.box((size // 2, size // 2))

    @classmethod
    def box(cls, radii: Sequence[int]) -> "Stencil":
        """The forward half of the box that reaches ``radii[a]`` pixels to both sides along each axis a."""
        if not isinstance(radii, Iterable):
            raise TypeError(f"radii is {radii!r}, expected one radius per axis")
        radii = tuple(as_integer(f"radii[{axis}]", radius) for axis, radius in enumerate(radii))
        if any(radius < 0 for radius in radii):
            raise ValueError(f"radii is {radii}, expected no negative radius")
        origin = (0,) * len(radii)
        box = itertools.product(*(range(-radius, radius + 1) for radius in radii))
        return cls([offset for offset in box if offset > origin], ndim=len(radii))

    @classmethod
    def cross(cls, radius: int, ndim: int = 2) -> "Stencil":
        """Neighbours along the axes only, up to ``radius`` pixels away: ndim * radius offsets."""
        radius = as_integer("radius", radius)
        if radius < 0:
            raise ValueError(f"radius is {radius}, expected at least 0")
        axes = range(as_integer("ndim", ndim))
        steps = range(1, radius + 1)
        return cls([tuple(step * (a == axis) for a in axes) for axis in axes for step in steps], ndim=ndim)

    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """The offsets in raster order."""
        return self._offsets

    @property
    def ndim(self) -> int:
        """Number of grid axes."""
        return self._ndim

    @property
    def row_reach(self) -> int:
        """How many rows (sites that share an index on the first axis) lie between a site and its furthest neighbour's."""
        return self._offsets[-1][0] if self._offsets else 0

    def __len__(self) -> int:
        """Number of offsets, K - 1."""
        return len(self._offsets)

    def mask(self, grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """(K-1, *grid) bool: entry (k, j) of ``off_diag`` exists, that is, j + offsets[k] lies on the grid."""
        self.check_grid(grid)
        mask = torch.zeros((len(self), *grid), dtype=torch.bool, device=device)
        for k, offset in enumerate(self._offsets):
            here, _ = overlap(offset, grid)
            mask[k][here] = True
        return mask

    def entries(self, grid: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Where the entries below the diagonal that exist are: ``off_diag.flatten(-ndim)[..., k, column]`` is L[row, column].

        Returns:
            k, row and column, int64 (m,); sites are numbered in raster order, the entries sorted by k, then by column.
        """
        existing = self.mask(grid, device).nonzero()
        k, sites = existing[:, 0], existing[:, 1:]
        offsets = torch.tensor(self._offsets, dtype=torch.int64, device=device).reshape(-1, self._ndim)
        return k, flat_index(sites + offsets[k], grid), flat_index(sites, grid)

    @property
    def slopes(self) -> tuple[int, ...]:
        """Wavefront slopes: the smallest integers, the last one 1, with sum(slope * offset) ≥ 1 for every offset."""
        return wavefront_slopes(self._offsets, self._ndim)

    def num_wavefronts(self, grid: Sequence[int]) -> int:
        """Number of sequential steps of a triangular solve on ``grid``, all sites of a step being independent."""
        self.check_grid(grid)
        return 1 + sum(slope * (n - 1) for slope, n in zip(self.slopes, grid, strict=True))

    def check_grid(self, grid: Sequence[int]) -> None:
        """Raise TypeError or ValueError unless ``grid`` has as many axes as the stencil, of at least one site each."""
        if not isinstance(grid, Sequence):
            raise TypeError(f"grid is {grid!r}, expected {self._ndim} axes")
        _integers("grid", grid)
        if len(grid) != self._ndim or any(n < 1 for n in grid):
            raise ValueError(f"grid is {tuple(grid)}, expected {self._ndim} axes of at least one site")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stencil):
            return NotImplemented
        return (self._ndim, self._offsets) == (other._ndim, other._offsets)

    def __hash__(self) -> int:
        return hash((self._ndim, self._offsets))

    def __repr__(self) -> str:
        return f"Stencil({list(self._offsets)}, ndim={self._ndim})"


pytree.register_constant(Stencil)  # torch.export in its strict mode takes nothing else as part of a factor


def flat_index(index: Tensor, sizes: Sequence[int]) -> Tensor:
    """The raster numbers of indices (..., ndim) in a box of these sizes."""
    flat = index[..., 0]
    for axis, size in enumerate(sizes[1:], start=1):
        flat = flat * size + index[..., axis]
    return flat


def check_stencil(stencil: Stencil, name: str = "stencil", ndim: int | None = None) -> None:
    """Raise TypeError unless ``stencil`` is a `Stencil`, ValueError unless it has ``ndim`` axes, if that is given."""
    if not isinstance(stencil, Stencil):
        raise TypeError(f"{name} is a {type(stencil).__name__}, expected a Stencil")
    if ndim not in (None, stencil.ndim):
        raise ValueError(f"{name} has {stencil.ndim} axes, the grid has {ndim}")


def as_integer(name: str, value: int) -> int:
    """``value`` as an int, or a TypeError where it is not an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None


def as_grid(grid: Sequence[int], name: str = "grid") -> torch.Size:
    """Numbers of sites along 1 to 3 axes, or an error that says what is wrong with them."""
    expected = "expected the number of sites along each of 1 to 3 axes"
    if isinstance(grid, str):
        raise TypeError(f"{name} is {grid!r}, {expected}")
    try:
        grid = tuple(grid)
    except TypeError:
        raise TypeError(f"{name} is {grid!r}, {expected}") from None
    grid = _integers(name, grid)
    if not 1 <= len(grid) <= 3 or any(n < 1 for n in grid):
        raise ValueError(f"{name} is {grid}, {expected}, at least one")
    return torch.Size(grid)


def _integers(name: str, grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int | torch.SymInt) else as_integer(f"{name}[{axis}]", n) for axis, n in enumerate(grid))


def _parse_offset(offset: Sequence[int] | int) -> tuple[int, ...]:
    components = offset if isinstance(offset, Iterable) else (offset,)
    try:
        return tuple(operator.index(component) for component in components)
    except TypeError:
        raise TypeError(f"offset {offset!r} is not made of integers") from None
