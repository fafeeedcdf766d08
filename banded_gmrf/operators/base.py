"""What a linear operator is: the base class, compositions, operators of other libraries, and the test of an adjoint."""

import copy
import math
from collections.abc import Sequence

import scipy.sparse
import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, broadcast_batch, check_tensor


class LinearOperator:
    """A linear map A from fields on a grid to observations.

    To write one of your own, define ``__call__`` and ``adjoint``, and set ``grid`` and ``output_shape`` where they are known.

    Attributes:
        grid: numbers of sites along each axis; None as long as the operator fits many grids.
        output_shape: shape of the observations of one field; None as long as ``grid`` is.
        batch_shape: that of the operator's own tensors, broadcast against the fields' batch.
    """

    grid: torch.Size | None = None
    output_shape: torch.Size | None = None
    batch_shape: torch.Size = torch.Size()
    _dtype = torch.float64  # the most precise one in which it can be applied

    def __call__(self, x: Tensor) -> Tensor:
        """A x: (*batch, *grid) to (*batch, *output_shape)."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀy: (*batch, *output_shape) to (*batch, *grid)."""
        raise NotImplementedError(f"{type(self).__name__} does not define adjoint")

    def bind(self, grid: Sequence[int], device: torch.device | str | None = None) -> "LinearOperator":
        """This operator on a given grid: itself if it knows that grid, else a copy that does.

        Args:
            grid: numbers of sites along each axis.
            device: where an operator that must be tried, because it does not say its ``output_shape``, is tried.

        Raises:
            ValueError: the operator does not fit the grid.
        """
        grid = torch.Size(grid)
        if self.grid is not None and torch.Size(self.grid) != grid:
            raise ValueError(f"operator is on the grid {tuple(self.grid)}, expected {tuple(grid)}")
        if self.grid is None or self.output_shape is None:
            return _Adapted(self, self, self.adjoint).bind(grid, device)
        return self

    def to_dense(self) -> Tensor:
        """A as a matrix (*batch, m, n) in float64, sites and observations in raster order. Meant for small grids: m n entries.

        Raises:
            ValueError: the operator has no grid yet.
        """
        if self.grid is None:
            raise ValueError(f"{self!r} has no grid yet, expected one that is bound to a grid")
        n, device = self.grid.numel(), self._device()
        units = torch.eye(n, dtype=torch.float64, device=device).reshape(n, *[1] * len(self.batch_shape), *self.grid)
        columns = self(units.expand(n, *self.batch_shape, *self.grid))
        return columns.flatten(columns.ndim - len(self.output_shape)).movedim(0, -1)

    def __matmul__(self, other) -> "LinearOperator":
        """The composition x → A (B x)."""
        return _Composition(self, as_operator(other, "the right operand of @"))

    def __rmatmul__(self, other) -> "LinearOperator":
        return _Composition(as_operator(other, "the left operand of @"), self)

    def periodic_axes(self) -> set[int]:
        """The axes of the grid along which the operator wraps around from one end to the other; a solver may ask."""
        return set()

    def selected_sites(self) -> Tensor | None:
        """The raster numbers of the sites that the observations are, (m,) int64, if A merely selects sites; else None."""
        return None

    def _device(self) -> torch.device | None:
        """That of the operator's tensors, None if it has none."""
        return None

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name}={'None' if shape is None else tuple(shape)}"
            for name, shape in (("grid", self.grid), ("output_shape", self.output_shape))
        )
        return f"{type(self).__name__}({shapes})"


class GridOperator(LinearOperator):
    """What the operators of this module share: checks, half precision, and how one learns its grid."""

    def __call__(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        bound = self if self.grid is not None else self.bind(self._grid_of(x))
        return bound._checked("x", x, bound.grid, bound._forward)

    def adjoint(self, y: Tensor) -> Tensor:
        check_tensor("y", y)
        bound = self if self.grid is not None else self.bind(self._grid_of_observation(y))
        return bound._checked("y", y, bound.output_shape, bound._adjoint)

    def bind(self, grid: Sequence[int], device: torch.device | str | None = None) -> "LinearOperator":
        grid = torch.Size(grid)
        if self.grid == grid:
            return self
        if self.grid is not None:
            raise ValueError(f"{type(self).__name__} is on the grid {tuple(self.grid)}, expected {tuple(grid)}")
        bound = copy.copy(self)
        bound.grid, bound.output_shape = grid, bound._output_shape(grid)
        return bound

    def _checked(self, name: str, value: Tensor, shape: torch.Size, apply) -> Tensor:
        if value.ndim < len(shape) or value.shape[value.ndim - len(shape) :] != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (..., {', '.join(map(str, shape))})")
        if (device := self._device()) is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}, {type(self).__name__} is on {device}")
        broadcast_batch(name, value.shape[: value.ndim - len(shape)], type(self).__name__, self.batch_shape)
        return apply(value.to(accumulate_dtype(value.dtype))).to(value.dtype)

    def _grid_of(self, x: Tensor) -> torch.Size:
        """The grid that an operator without one takes ``x`` to be on."""
        if x.ndim < self.ndim:
            raise ValueError(f"x has shape {tuple(x.shape)}, {type(self).__name__} needs a grid of {self.ndim} axes")
        return x.shape[x.ndim - self.ndim :]

    def _grid_of_observation(self, y: Tensor) -> torch.Size:
        raise ValueError(f"{type(self).__name__} has no grid yet: its adjoint needs one, see bind")

    def _check_axes(self, grid: torch.Size) -> None:
        if len(grid) != self.ndim or 0 in grid:
            raise ValueError(f"{type(self).__name__} has {self.ndim} axes, which does not fit the grid {tuple(grid)}")


class _Composition(LinearOperator):
    """x → outer(inner(x))."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        if inner.output_shape is not None:
            try:
                outer = outer.bind(inner.output_shape)
            except ValueError as error:
                raise ValueError(
                    f"{inner!r} gives {tuple(inner.output_shape)}, which {outer!r} does not take: {error}"
                ) from None
        self._outer, self._inner = outer, inner
        self.grid = inner.grid
        self.output_shape = outer.output_shape if inner.output_shape is not None else None
        self.batch_shape = broadcast_batch("the left operator", outer.batch_shape, "the right one", inner.batch_shape)
        self._dtype = min(outer._dtype, inner._dtype, key=lambda dtype: torch.finfo(dtype).bits)

    def __call__(self, x: Tensor) -> Tensor:
        return self._outer(self._inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._inner.adjoint(self._outer.adjoint(y))

    def bind(self, grid: Sequence[int], device: torch.device | str | None = None) -> LinearOperator:
        inner = self._inner.bind(grid, device)
        return self if inner is self._inner else _Composition(self._outer, inner)

    def _device(self) -> torch.device | None:
        device = self._inner._device()
        return self._outer._device() if device is None else device

    def periodic_axes(self) -> set[int]:
        on_one_grid = self._outer.grid == self._inner.grid
        return self._inner.periodic_axes() | (self._outer.periodic_axes() if on_one_grid else set())

    def selected_sites(self) -> Tensor | None:
        inner, outer = self._inner.selected_sites(), self._outer.selected_sites()
        return None if inner is None or outer is None else inner[outer.to(inner.device)]

    def __repr__(self) -> str:
        return f"{self._outer!r} @ {self._inner!r}"


class _Adapted(LinearOperator):
    """Another library's operator, which takes one batch axis: (N, *grid) to (N, *output_shape).

    Args:
        name: what the operator is, for its ``repr``.
        forward, adjoint: the functions.
        channel: images (N, H, W) go in and out as (N, 1, H, W).
    """

    def __init__(self, name: object, forward, adjoint, channel: bool = False):
        self._name, self._apply, self._apply_adjoint, self._channel = name, forward, adjoint, channel

    def bind(self, grid: Sequence[int], device: torch.device | str | None = None) -> LinearOperator:
        grid = torch.Size(grid)
        if self.grid is not None:
            return super().bind(grid, device)
        bound = copy.copy(self)
        bound.grid = grid
        bound._channel = self._channel and len(grid) == 2
        with torch.no_grad():
            zeros = torch.zeros(1, *grid, dtype=torch.float64, device=device)
            try:
                output = bound._call(self._apply, zeros)
            except (RuntimeError, TypeError):  # its own tensors may be in single precision
                bound._dtype = torch.float32
                output = bound._call(self._apply, zeros.float())
        bound.output_shape = output.shape[1:]
        return bound

    def __call__(self, x: Tensor) -> Tensor:
        bound = self if self.grid is not None else self.bind(x.shape[1:], x.device)
        return bound._batched("x", x, bound.grid, bound.output_shape, self._apply)

    def adjoint(self, y: Tensor) -> Tensor:
        if self.grid is None:
            raise ValueError(f"{self!r} has no grid yet: its adjoint needs one, see bind")
        return self._batched("y", y, self.output_shape, self.grid, self._apply_adjoint)

    def _batched(self, name: str, value: Tensor, shape: torch.Size, result: torch.Size, function) -> Tensor:
        if value.ndim < len(shape) or value.shape[value.ndim - len(shape) :] != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (..., {', '.join(map(str, shape))})")
        batch = value.shape[: value.ndim - len(shape)]
        if batch.numel() == 0:
            return value.new_zeros(*batch, *result)
        output = self._call(function, value.reshape(-1, *shape).to(self._dtype)).to(value.dtype)
        if output.shape != (batch.numel(), *result):
            raise ValueError(f"{self!r} gives {tuple(output.shape)}, expected {(batch.numel(), *result)}")
        return output.reshape(*batch, *result)

    def _call(self, function, value: Tensor) -> Tensor:
        output = function(value.unsqueeze(1) if self._channel else value)
        if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != len(value):
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"operator gives {came} for {tuple(value.shape)}, expected a tensor ({len(value)}, ...)")
        return output.squeeze(1) if self._channel and output.ndim == value.ndim + 1 and output.shape[1] == 1 else output

    def __repr__(self) -> str:
        return f"{type(self._name).__name__}(grid={None if self.grid is None else tuple(self.grid)})"


def as_operator(operator, name: str = "operator") -> LinearOperator:
    """``operator`` itself, or another library's as a `LinearOperator`.

    Raises:
        TypeError: an object without a call and an ``adjoint``, and without ``A`` and ``A_adjoint``.
    """
    if isinstance(operator, LinearOperator):
        return operator
    if isinstance(operator, Tensor) or scipy.sparse.issparse(operator):
        raise TypeError(
            f"{name} is a {type(operator).__name__}, expected a LinearOperator: operators.Matrix makes one of a matrix"
        )
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return _Adapted(operator, operator.A, operator.A_adjoint, channel=True)
    if callable(operator) and callable(getattr(operator, "adjoint", None)):
        return _Adapted(operator, operator, operator.adjoint)
    raise TypeError(
        f"{name} is a {type(operator).__name__}, expected a LinearOperator, or an object with a call and .adjoint, "
        "or with A and A_adjoint"
    )


@torch.no_grad()
def check_adjoint(operator: LinearOperator, device: torch.device | str | None = None) -> None:
    """Raise ValueError unless ⟨A u, v⟩ = ⟨u, Aᵀv⟩ for random u and v, up to rounding. The operator knows its grid.

    The random numbers are the same at every call, and not from torch's own generator.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.randn((*operator.batch_shape, *shape), generator=generator, dtype=torch.float64).to(device)
        for shape in (operator.grid, operator.output_shape)
    )
    forward, backward = operator(u), operator.adjoint(v)
    for name, value, shape in (("operator(x)", forward, v.shape), ("operator.adjoint(y)", backward, u.shape)):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    left, right = (forward * v).sum(), (u * backward).sum()
    scale = math.sqrt(float(forward.square().sum() * v.square().sum())) + math.sqrt(
        float(backward.square().sum() * u.square().sum())
    )
    precision = torch.finfo(operator._dtype).eps
    if not (left - right).abs() <= 100 * precision * scale:  # NaN fails as well
        raise ValueError(
            f"operator.adjoint is not the adjoint of operator: for random u and v, ⟨A u, v⟩ is {float(left):.6g}, "
            f"but ⟨u, Aᵀv⟩ is {float(right):.6g}"
        )
