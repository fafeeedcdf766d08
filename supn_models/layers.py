"""What the networks share: layers for 1 to 3 grid axes, and checks of their arguments."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from banded_gmrf import Stencil
from banded_gmrf.transformations import without_autocast
from gmrf_kernels.checks import check_tensor

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# exp(±10) around an initial standard deviation: far beyond what residuals in one image span, and far within float32.
MAX_LOG_RATIO = 10.0
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv(ndim: int, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution over ``ndim`` axes, padded so that stride 1 keeps a grid's size n and stride 2 makes it ceil(n / 2)."""
    return _CONV[ndim](in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)


def in_own_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` in the precision of the layer's weights, whatever that of ``x``, and under autocast, too.

    For parameters of a distribution: a likelihood feels errors of its factor that no feature shows.
    """
    with without_autocast(x):
        return layer(x.to(layer.weight.dtype))


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation that is the same in training and evaluation: at most 8 groups, of at least 4 channels where it can be.

    Of several channels, so that a group has something to normalise even where the coarsest grid is a single site.
    """
    return nn.GroupNorm(max(g for g in range(1, max(1, min(8, channels // 4)) + 1) if channels % g == 0), channels)


def normalization(norm: str, ndim: int, channels: int) -> nn.Module:
    """`group_norm`, or batch normalisation, which in training needs more than one value of each channel: images times sites.

    Raises:
        ValueError: ``norm`` is neither "group" nor "batch".
    """
    if norm == "group":
        return group_norm(channels)
    if norm == "batch":
        return _BATCH_NORM[ndim](channels)
    raise ValueError(f"norm is {norm!r}, expected 'group' or 'batch'")


def soft_bound(x: Tensor, limit: float) -> Tensor:
    """``x`` bent smoothly into (-limit, limit), the identity near 0: exp of the result cannot overflow, whatever ``x`` is."""
    return limit * torch.tanh(x / limit)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B, C, *grid) to the same shape."""

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            conv(ndim, channels, channels),
            group_norm(channels),
            nn.SiLU(),
            conv(ndim, channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to (B, C, *grid)."""
        return x + self.body(x)


def check_int(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer, and no truth value, from ``least`` to ``most``; None: however large."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected an integer {expected}")


def check_positive_int(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    check_int(name, value, 1)


def check_positive_ints(name: str, values: Sequence[int], fewest: int = 0) -> None:
    """Raise ValueError unless ``values`` is a sequence of integers of at least 1, of ``fewest`` or more."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) < fewest:
        raise ValueError(f"{name} is {values!r}, expected a sequence of integers{f', at least {fewest}' if fewest else ''}")
    for value in values:
        check_positive_int(name, value)


def check_stencil(stencil: Stencil) -> None:
    """Raise ValueError unless ``stencil`` is a Stencil."""
    if not isinstance(stencil, Stencil):
        raise ValueError(f"stencil is a {type(stencil).__name__}, expected a banded_gmrf.Stencil")


def check_stddev(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a positive finite number, or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")


def check_evaluation(name: str, module: nn.Module) -> None:
    """Raise ValueError where a layer depends in training on the rest of its batch, or on chance, and is in training mode."""
    for place, layer in module.named_modules():
        if layer.training and isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            kind = type(layer).__name__
            raise ValueError(f"{name} is in training mode, expected evaluation mode ({name}.eval()): its {place} is a {kind}")


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of what `torch.compile` or training in several processes has put around it."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif (compiled := module._modules.get("_orig_mod")) is not None:
            module = compiled
        else:
            return module


def check_features(name: str, x: Tensor, channels: int, ndim: int, why: str = "") -> None:
    """Raise TypeError unless ``x`` is a tensor of floats, ValueError unless it is (B, channels, *grid), no axis empty.

    ``why`` ends the message of the latter.
    """
    check_tensor(name, x)
    if x.ndim != ndim + 2 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (batch, {channels}, *grid) with {ndim} grid axes{why}")
