"""Checks of what a distribution is given: constraints in the sense of `torch.distributions`, kinds of models, and sites."""

import math
import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from gmrf_kernels.checks import broadcast_batch
from gmrf_kernels.registration import nothing_intervenes

from .stencil import Stencil
from .transformations import inspect, require

_MOST_CHANNELS = 4
# Along each side. What is smaller may well be many samples of a small grid.
_SMALLEST_IMAGE = 16


class Finite(constraints.Constraint):
    """Tensors (*batch, *grid) without NaN or infinity."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim
        super().__init__()

    def __repr__(self) -> str:
        return "finite numbers"  # in errors of torch, which takes the first letter off the name of a class

    def check(self, value: Tensor) -> Tensor:
        once = _without_repetitions(value, self.event_dim)
        if _sum_is_finite(once):
            return torch.ones((), dtype=torch.bool, device=value.device).expand(value.shape[: -self.event_dim])
        return self._looked_into(once).expand(value.shape[: -self.event_dim])

    def _looked_into(self, value: Tensor) -> Tensor:
        return value.isfinite().flatten(-self.event_dim).all(-1)


class FiniteWhereItExists(Finite):
    """Off-diagonals (*batch, K-1, *grid) whose existing entries are finite; the others are ignored."""

    def __init__(self, stencil: Stencil):
        self._stencil = stencil
        super().__init__(stencil.ndim + 1)

    def _looked_into(self, value: Tensor) -> Tensor:
        exists = self._stencil.mask(value.shape[-self._stencil.ndim :], device=value.device)
        return (value.isfinite() | ~exists).flatten(-self.event_dim).all(-1)


def _without_repetitions(value: Tensor, event_dim: int) -> Tensor:
    """One of the tensors that are shared along a batch axis."""
    for axis, stride in enumerate(value.stride()[: value.ndim - event_dim]):
        if stride == 0 and value.shape[axis] > 1:
            value = value.narrow(axis, 0, 1)
    return value


def all_finite(*tensors: Tensor) -> bool:
    """True only where all numbers are finite, by the sums of plain tensors that repeat nothing; sums may also overflow."""
    if not nothing_intervenes(tensors) or any(0 in t.stride() for t in tensors):
        return False
    with torch.no_grad():
        return all(math.isfinite(t.sum().item()) for t in tensors)


def _sum_is_finite(value: Tensor) -> bool:
    """True only where all numbers are finite, in one pass that writes nothing; sums of such numbers may still overflow."""
    return bool(torch._is_all_true(value.detach().sum().isfinite()))  # of all that vmap maps over, as torch's own checks


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError where a tensor has NaN or infinity, also under `torch.func`'s transformations."""
    require(value.isfinite().all(), f"{name} has NaN or infinite entries, expected finite ones")


def check_not_boolean(name: str, value: object) -> None:
    """Raise TypeError for truth values in place of numbers: a mask as variances would be 0, exact, where it is False."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("torch.bool", "bool"):
        raise TypeError(f"{name} is boolean, expected numbers")


def check_levels(levels: Sequence[float]) -> list[float]:
    """Probabilities as numbers, or an error where they are none, or no sequence."""
    if not isinstance(levels, Iterable) or isinstance(levels, str):
        raise TypeError(f"levels is {levels!r}, expected a sequence of probabilities")
    levels = [check_level(level, f"levels[{i}]") for i, level in enumerate(levels)]
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels is {tuple(levels)}, expected probabilities")
    return levels


def check_level(level: float, name: str = "level") -> float:
    """One probability as a number, or a TypeError where it is none; its range is for the caller to check."""
    try:
        return float(level)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {level!r}, expected a number") from None


def as_sample_shape(sample_shape: Sequence[int]) -> torch.Size:
    """What torch's distributions take, or a TypeError that says how a number of samples is written."""
    if isinstance(sample_shape, int):
        raise TypeError(f"sample_shape is {sample_shape}, expected a sequence of integers, as in sample(({sample_shape},))")
    return torch.Size(sample_shape)


def broadcast_fields(name: str, batch: Sequence[int], other_name: str, other: Sequence[int]) -> torch.Size:
    """`broadcast_batch` of fields that a user gives, with a warning of an axis of channels that was left in their batch."""
    if tuple(batch) == tuple(other):
        return torch.Size(batch)
    warn_of_pairs(name, batch, other_name, other)
    return broadcast_batch(name, batch, other_name, other)


def warn_of_pairs(name: str, batch: Sequence[int], other_name: str, other: Sequence[int]) -> None:
    """Warn where a batch (B, 1) meets one of B, as torch's losses do: that broadcasts to all B² pairs."""
    if len(other) and other[-1] > 1 and tuple(batch) == (*other, 1):
        _warn(
            f"{name} has batch shape {tuple(batch)}, {other_name} {tuple(other)}: they broadcast to all pairs of the two. If "
            "the last axis is one channel, leave it out, as in images[:, 0]"
        )


def warn_of_missing_rank(factors: Sequence[int], batch: Sequence[int]) -> None:
    """Warn where factors (R, *grid), which all of a batch share, are as many as the batch has distributions."""
    if len(batch) and batch[-1] == factors[0] > 1:
        _warn(
            f"factors has shape {tuple(factors)}, of which each of the batch {tuple(batch)} has all {factors[0]}. If each has "
            "one of them, say so as in factors[:, None]; if each has all, as in factors[None]"
        )


def warn_of_channels(name: str, shape: Sequence[int], ndim: int) -> None:
    """Warn where images with their channels last, or one, are taken for fields on a grid of which the channels are an axis."""
    if ndim > 2 or len(shape) < ndim + 1 or shape[-1] > _MOST_CHANNELS:
        return
    shortest, is_one = min(shape[-ndim - 1 : -1]), len(shape) == ndim + 1
    if (ndim == 2 and shortest >= _SMALLEST_IMAGE) if is_one else shortest > _MOST_CHANNELS:
        grid, image = tuple(shape[-ndim:]), tuple(shape[-ndim - 1 :])
        _warn(
            f"{name} has shape {tuple(shape)}, of which {grid} is taken for the grid. If its last axis is one of channels, "
            f"either move it in front of the grid, as in {name}.movedim(-1, {-ndim - 1}): independent fields. "
            f"Or take the grid {image}, with a stencil of {ndim + 1} axes: channels that belong together"
        )


def warn_of_short_range(name: str, squares: Sequence[Tensor], mask: Tensor | None) -> None:
    """Warn where a range, given by its squares along axes, is shorter inside a mask than the distance of two sites.

    Not where it is differentiated: a search or a sampler passes by such ranges, and goes on.
    """
    if torch.compiler.is_compiling() or any(square.requires_grad for square in squares):
        return

    def look(*squares: Tensor) -> None:
        shortest = min((float(square.min()) for square in squares if square.numel()), default=1.0)
        if shortest < 1:
            _warn(
                f"{name} is {shortest**0.5:.3g} at its shortest, less than the distance 1 of two sites: a field on the grid "
                "has less variance than asked for, and hardly any correlation. A finer grid has the field"
            )

    inspect(look, *(squares if mask is None else (square.where(mask, 1.0) for square in squares)))


def _warn(message: str) -> None:
    """Warn at the line that called the library, so that what is noticed twice in one call is shown once."""
    if torch.compiler.is_compiling():
        return
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "banded_gmrf":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def check_model(name: str, model: object, *kinds: type) -> None:
    """Raise TypeError unless a model is a distribution of one of these kinds."""
    if not isinstance(model, kinds):
        raise TypeError(f"{name} is a {type(model).__name__}, expected a {' or a '.join(kind.__name__ for kind in kinds)}")


def as_sites(sites, grid: torch.Size, device: torch.device) -> Tensor:
    """Sites as integers (ndim,) or (m, ndim), or an error that says what is wrong with them."""
    sites = torch.as_tensor(sites, device=device)
    if sites.is_floating_point() or sites.is_complex() or sites.dtype == torch.bool:
        raise TypeError(f"sites is {sites.dtype}, expected integers")
    if sites.ndim == 0 and len(grid) == 1:
        sites = sites.reshape(1)
    if sites.ndim not in (1, 2) or sites.shape[-1] != len(grid):
        raise ValueError(f"sites has shape {tuple(sites.shape)}, expected ({len(grid)},) or (m, {len(grid)})")
    outside = ((sites < 0) | (sites >= torch.tensor(grid, device=sites.device))).any(-1)
    if outside.any():
        raise ValueError(f"sites has {sites[outside].reshape(-1, len(grid))[0].tolist()}, which is not on {tuple(grid)}")
    return sites


def unit_vectors(sites: Tensor, grid: torch.Size, batch_ndim: int, dtype: torch.dtype) -> Tensor:
    """1 at each of the sites (m, ndim), on their device: (m, *1, *grid), with ``batch_ndim`` axes of size 1."""
    m = len(sites)
    units = torch.zeros((m, *grid), dtype=dtype, device=sites.device)
    units[(torch.arange(m, device=sites.device), *sites.unbind(-1))] = 1
    return units.reshape(m, *[1] * batch_ndim, *grid)
