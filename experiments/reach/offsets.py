"""Stencils of equally many offsets: a dense patch, patches dilated, and those that predict residuals best, one by one."""

import torch
from torch import Tensor

import banded_gmrf as bg

_DILATIONS = (1, 2, 3, 4, 8, 16, 32)


def dilated(count: int) -> bg.Stencil:
    """The four offsets of a 3 x 3 patch, dilated by 1, 2, 3, 4, 8, 16 and 32, as many as ``count`` holds.

    Raises:
        ValueError: ``count`` is not a multiple of 4 from 4 to 28.
    """
    if count % 4 or not 4 <= count <= 4 * len(_DILATIONS):
        raise ValueError(f"count is {count}, expected a multiple of 4 from 4 to {4 * len(_DILATIONS)}")
    patch = bg.Stencil.square(3).offsets
    return bg.Stencil([(by * y, by * x) for by in _DILATIONS[: count // 4] for y, x in patch], ndim=2)


@torch.no_grad()
def greedy(residuals: Tensor, count: int, reach: int) -> bg.Stencil:
    """The offsets from which linear regression predicts a pixel of stationary residuals best, chosen one after the other.

    A whitened residual of a factor is what a pixel's regression on its forward neighbours leaves. Each choice lowers the
    variance of what is left most: with the covariances of pixels given the neighbours chosen before, by c²(o) / c(o, o) for
    the covariance c(o) of a pixel and the neighbour at o (orthogonal matching pursuit).

    Args:
        residuals: (B, H, W), for training.
        count: of offsets.
        reach: the furthest one along each axis, less than half of H and W.

    Raises:
        ValueError: fewer offsets in reach than ``count``, or a reach of less than 1 or of half the image.
    """
    size = min(residuals.shape[1:])
    if not 1 <= reach < size / 2:
        raise ValueError(f"reach is {reach}, expected at least 1 and less than half of {size} pixels")
    candidates = [(y, x) for y in range(reach + 1) for x in range(-reach, reach + 1) if (y, x) > (0, 0)]
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count is {count}, expected 1 to {len(candidates)}, the offsets in reach")
    # Each pixel of one variance: what a network's diagonal explains is not for the offsets to explain.
    scaled = residuals.double() / residuals.double().square().mean(0).sqrt()
    around = _autocovariance(scaled, 2 * reach)
    sites = torch.tensor([(0, 0), *candidates], device=residuals.device)
    lag = sites[:, None] - sites + 2 * reach
    covariance = around[lag[..., 0], lag[..., 1]]
    free = torch.ones(len(sites), dtype=torch.bool, device=residuals.device)
    free[0] = False
    chosen = []
    for _ in range(count):
        # One that those before predict has no variance of its own.
        own = covariance.diagonal().clamp(min=1e-9 * around.max())
        gain = (covariance[0].square() / own).masked_fill(~free, -1)
        best = int(gain.argmax())
        free[best] = False
        chosen.append(tuple(sites[best].tolist()))
        covariance = covariance - covariance[:, best, None] * covariance[best] / own[best]
    return bg.Stencil(sorted(chosen), ndim=2)


def _autocovariance(fields: Tensor, reach: int) -> Tensor:
    """Mean products of pixels at each lag up to ``reach``, (2 reach + 1, 2 reach + 1), lag 0 in the middle.

    Sums over fields of one size, none left out, divided by the number of pixels: a positive definite sequence.
    """
    shape = [n + reach for n in fields.shape[1:]]
    power = torch.fft.rfft2(fields, s=shape).abs().square().mean(0)
    around = torch.fft.irfft2(power, s=shape) / fields[0].numel()
    index = torch.arange(-reach, reach + 1, device=fields.device)
    return around[index[:, None] % shape[0], index % shape[1]]
