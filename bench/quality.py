"""How well each stencil models real photographs: held-out nats per pixel of the maximum-likelihood factor, in closed form.

One stationary factor is fitted to the training photographs. With S the covariance of a pixel and its forward neighbours,
estimated wherever all of them exist, the column c of L that minimises the negative log likelihood ½ cᵀS c - log c₀ is

    c = S⁻¹e₀ / √(e₀ᵀS⁻¹e₀).

At the border of an image neighbours are missing. A pixel there has the column that is best for the neighbours it has: the same
formula for their part of S.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import banded_gmrf as bg

from .cases import parse_stencil

TRAIN = ("astronaut", "coffee", "rocket", "stereo_motorcycle", "coins", "moon", "brick", "grass", "gravel")
TEST = ("camera", "chelsea")

PATCH = 64


@dataclass(frozen=True)
class Photographs:
    """Gray images (height, width) in levels from 0 to 255, float64, and what they are."""

    source: str
    train: list[Tensor]
    test: list[Tensor]


def held_out_quality(stencils: Iterable[str], photographs: Photographs) -> dict[str, Any]:
    """Nats per pixel of the test photographs under the factor that fits the training photographs best.

    Args:
        stencils: names as on the command line, of stencils of two axes.
        photographs: see `scikit_image_photographs` and `load_photographs`.

    Returns:
        For each stencil the mean over patches and, patch by patch, the gain over the smallest one, with standard errors; and
        what they are of.
    """
    loc = torch.cat([image.flatten() for image in photographs.train]).mean()
    train = [image - loc for image in photographs.train]
    patches = torch.cat([tiles(image - loc) for image in photographs.test])
    scores, smallest = [], None
    for name in sorted(stencils, key=lambda name: (len(parse_stencil(name)), name)):
        stencil = parse_stencil(name)
        factor = fit(neighbour_covariance(train, stencil), stencil, (PATCH, PATCH))
        nats = bg.negative_log_likelihood(patches, factor.log_diag, factor.off_diag, stencil) / PATCH**2
        smallest = nats if smallest is None else smallest
        scores.append({"stencil": name} | _mean("nats_per_pixel", nats) | _mean("gain_over_smallest", smallest - nats))
    return {
        "photographs": photographs.source,
        "patches": len(patches),
        "patch_size": PATCH,
        "definition": "-log p / n in gray levels (0 to 255), ½ and constant included",
        "scores": scores,
    }


def _mean(name: str, values: Tensor) -> dict[str, float]:
    return {name: values.mean().item(), f"{name}_standard_error": (values.std() / math.sqrt(len(values))).item()}


def fit(covariance: Tensor, stencil: bg.Stencil, grid: tuple[int, int]) -> bg.StencilCholesky:
    """The factor (*grid) that is most likely for the covariance (K, K) of a pixel and its forward neighbours."""
    exists = torch.cat([torch.ones(1, *grid, dtype=torch.bool), stencil.mask(grid)]).flatten(1)
    kinds, kind_of_site = exists.unique(dim=1, return_inverse=True)
    columns = torch.zeros(kinds.shape, dtype=covariance.dtype)
    for kind, present in enumerate(kinds.T):
        first = torch.zeros(int(present.sum()), dtype=covariance.dtype)
        first[0] = 1
        solved = torch.linalg.solve(covariance[present][:, present], first)
        columns[present, kind] = solved / solved[0].sqrt()
    coefficients = columns[:, kind_of_site].reshape(-1, *grid)
    return bg.StencilCholesky(coefficients[0].log(), coefficients[1:], stencil)


def neighbour_covariance(images: Iterable[Tensor], stencil: bg.Stencil) -> Tensor:
    """Second moments (K, K) of a pixel and its forward neighbours over centred images, where all of them exist."""
    offsets = ((0, 0), *stencil.offsets)
    lows = [-min(offset[axis] for offset in offsets) for axis in range(2)]
    highs = [max(offset[axis] for offset in offsets) for axis in range(2)]
    total, count = 0, 0
    for image in images:
        spans = [(low, size - high) for low, high, size in zip(lows, highs, image.shape, strict=True)]
        moved = [image[tuple(slice(a + o, b + o) for (a, b), o in zip(spans, offset, strict=True))] for offset in offsets]
        values = torch.stack(moved).flatten(1)
        total = total + values @ values.T
        count += values.shape[1]
    return total / count


def scikit_image_photographs() -> Photographs:
    """`TRAIN` and `TEST` of `skimage.data`."""
    import skimage.color
    import skimage.data

    def load(name: str) -> np.ndarray:
        image = getattr(skimage.data, name)()
        image = image[0] if isinstance(image, tuple) else image  # of a stereo pair the left one
        return skimage.color.rgb2gray(image) * 255 if image.ndim == 3 else image

    train, test = (_dequantised([load(name) for name in names]) for names in (TRAIN, TEST))
    return Photographs(f"skimage.data: fitted to {', '.join(TRAIN)}; tested on {', '.join(TEST)}", train, test)


def load_photographs(path: Path) -> Photographs:
    """Those of an .npz file with arrays ``train`` and ``test`` (count, height, width) of gray levels.

    Raises:
        ValueError: it cannot be read, has no such arrays, or they hold no image of at least `PATCH` pixels along each side.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("train", "test") if name in file.files}
            names = ", ".join(file.files)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from None
    if len(arrays) < 2:
        raise ValueError(f"{path} has the arrays {names}, expected train and test")
    for name, array in arrays.items():
        if array.ndim != 3 or len(array) == 0 or min(array.shape[1:]) < PATCH:
            raise ValueError(
                f"{path}: {name} has shape {array.shape}, expected (count, height, width) of at least {PATCH} pixels"
            )
    train, test = (_dequantised(array) for array in arrays.values())
    return Photographs(f"{path.name}: fitted to {len(train)} images of train; tested on {len(test)} of test", train, test)


def tiles(image: Tensor) -> Tensor:
    """Patches that do not overlap, (count, PATCH, PATCH)."""
    return image.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(-1, PATCH, PATCH)


def _dequantised(images: Iterable[np.ndarray]) -> list[Tensor]:
    """Float64 gray levels plus noise uniform over one level: flat regions of 8-bit images have no finite density otherwise."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.from_numpy(np.asarray(image, dtype=np.float64)) for image in images]
    return [image + torch.rand(image.shape, generator=generator, dtype=torch.float64) - 0.5 for image in images]
