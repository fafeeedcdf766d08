"""How well each stencil models real photographs: held-out nats per pixel of the maximum-likelihood factor, in closed form.

A stationary factor is fitted to one half of each photograph's patches, the black squares of a chessboard, and judged on the
other half. With S the covariance of a pixel and its forward neighbours, estimated wherever all of them exist, the column c of L
that minimises the negative log likelihood ½ cᵀS c - log c₀ is

    c = S⁻¹e₀ / √(e₀ᵀS⁻¹e₀).

At the border of a patch neighbours are missing. A pixel there has the column that is best for the neighbours it has: the same
formula for their part of S. A factor whose own samples grow from one edge of the patch to the other is damped until they do
not, as ``StencilCholesky.from_samples(..., stable="project")`` does: stencils are chosen among stable fits.
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
from banded_gmrf.construction.covariance import as_factor
from banded_gmrf.construction.stability import growth_of_factor, stable_columns

from .cases import parse_stencil

SCIKIT_IMAGE = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "rocket",
    "stereo_motorcycle",
)

PATCH = 64


@dataclass(frozen=True)
class Photographs:
    """Gray levels from 0 to 255, float64, and what they are.

    Each set has training images (count, height, width), for one factor, and held-out patches (count, PATCH, PATCH).
    """

    source: str
    sets: list[tuple[Tensor, Tensor]]


def held_out_quality(stencils: Iterable[str], photographs: Photographs) -> dict[str, Any]:
    """Nats per pixel of the held-out patches of each set under the factor that fits its training images best.

    Args:
        stencils: names as on the command line, of stencils of two axes.
        photographs: see `scikit_image_photographs` and `load_photographs`.

    Returns:
        For each stencil the mean over patches and, patch by patch, the gain over the smallest one, with standard errors; and
        what they are of.
    """
    scores, smallest = [], None
    for name in sorted(stencils, key=lambda name: (len(parse_stencil(name)), name)):
        nats = torch.cat([_nats_per_pixel(parse_stencil(name), train, test) for train, test in photographs.sets])
        smallest = nats if smallest is None else smallest
        scores.append({"stencil": name} | _mean("nats_per_pixel", nats) | _mean("gain_over_smallest", smallest - nats))
    return {
        "photographs": photographs.source,
        "patches": sum(len(test) for _, test in photographs.sets),
        "patch_size": PATCH,
        "definition": "-log p / n in gray levels (0 to 255), ½ and constant included",
        "scores": scores,
    }


def _nats_per_pixel(stencil: bg.Stencil, train: Tensor, test: Tensor) -> Tensor:
    loc = train.mean()
    factor = fit(neighbour_covariance(train - loc, stencil), stencil, (PATCH, PATCH))
    return bg.negative_log_likelihood(test - loc, factor.log_diag, factor.off_diag, stencil) / PATCH**2


def _mean(name: str, values: Tensor) -> dict[str, float]:
    return {name: values.mean().item(), f"{name}_standard_error": (values.std() / math.sqrt(len(values))).item()}


def fit(covariance: Tensor, stencil: bg.Stencil, grid: tuple[int, int]) -> bg.StencilCholesky:
    """The stable factor (*grid) that is most likely for the covariance (K, K) of a pixel and its forward neighbours."""
    exists = torch.cat([torch.ones(1, *grid, dtype=torch.bool), stencil.mask(grid)]).flatten(1)
    kinds, kind_of_site = exists.unique(dim=1, return_inverse=True)
    columns = torch.zeros(kinds.shape, dtype=covariance.dtype)
    for kind, present in enumerate(kinds.T):
        first = torch.zeros(int(present.sum()), dtype=covariance.dtype)
        first[0] = 1
        solved = torch.linalg.solve(covariance[present][:, present], first)
        columns[present, kind] = solved / solved[0].sqrt()
    # As the library has them: below the diagonal first, then the logarithm of the diagonal.
    columns, covariance = torch.cat([columns[1:], columns[:1].log()]).T, covariance.roll((-1, -1), (0, 1))
    columns = stable_columns(
        columns,
        covariance.expand(len(columns), *covariance.shape),
        stencil,
        lambda columns: growth_of_factor(*as_factor(columns[kind_of_site], torch.Size(grid)), stencil),
    )
    return bg.StencilCholesky(*as_factor(columns[kind_of_site], torch.Size(grid)), stencil)


def neighbour_covariance(images: Tensor, stencil: bg.Stencil) -> Tensor:
    """Second moments (K, K) of a pixel and its forward neighbours over centred images (count, height, width).

    Pixels without all of the neighbours are left out.
    """
    offsets = ((0, 0), *stencil.offsets)
    spans = [
        (-min(offset[axis] for offset in offsets), size - max(offset[axis] for offset in offsets))
        for axis, size in enumerate(images.shape[1:])
    ]
    moved = [
        images[:, *(slice(start + o, stop + o) for (start, stop), o in zip(spans, offset, strict=True))] for offset in offsets
    ]
    values = torch.stack(moved).flatten(1)
    return values @ values.T / values.shape[1]


def scikit_image_photographs() -> Photographs:
    """Those that ship inside scikit-image, a set for each."""
    import skimage.color
    import skimage.data

    def load(name: str) -> np.ndarray:
        image = getattr(skimage.data, name)()
        image = image[0] if isinstance(image, tuple) else image  # of a stereo pair the left one
        return skimage.color.rgb2gray(image) * 255 if image.ndim == 3 else image

    return Photographs(f"{', '.join(SCIKIT_IMAGE)} of skimage.data", [_halves(load(name)) for name in SCIKIT_IMAGE])


def load_photographs(path: Path) -> Photographs:
    """Those of an .npz file: arrays ``train`` and ``test`` (count, height, width), one set, or an array for each photograph.

    Raises:
        ValueError: it cannot be read, or holds neither; images are too small for `PATCH`, or their values are no gray levels.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from None
    for name, array in arrays.items():
        _check_levels(f"{name} of {path.name}", array)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if {"train", "test"} <= arrays.keys():
        train, test = arrays["train"], arrays["test"]
        if min(train.ndim, test.ndim) == max(train.ndim, test.ndim) == 3 and min(*train.shape[1:], *test.shape[1:]) >= PATCH:
            patches = torch.cat([_patches(image).flatten(0, 1) for image in _dequantised(test)])
            return Photographs(f"{path.name}, fitted to train, tested on test", [(_dequantised(train), patches)])
    elif arrays and all(array.ndim == 2 and min(array.shape) >= 2 * PATCH for array in arrays.values()):
        return Photographs(path.name, [_halves(array) for array in arrays.values()])
    raise ValueError(
        f"{path} has {shapes}; expected train and test (count, height, width) of at least {PATCH} pixels along each side, or "
        f"photographs (height, width) of at least {2 * PATCH}"
    )


def _check_levels(name: str, images: np.ndarray) -> None:
    """Noise of one level is added to the images: to those in [0, 1] it would be all that is left."""
    if images.dtype.kind not in "buif":
        raise ValueError(f"{name} is of {images.dtype}, expected numbers")
    if images.size:
        least, most = float(images.min()), float(images.max())
        if not 0 <= least <= most <= 255 or (images.dtype.kind == "f" and 0 < most <= 1):
            raise ValueError(f"{name} has values from {least:g} to {most:g}, expected gray levels, from 0 to 255")


def _halves(photograph: np.ndarray) -> tuple[Tensor, Tensor]:
    """The black and the white squares of a chessboard of patches."""
    patches = _patches(_dequantised(photograph))
    rows, columns = (torch.arange(count) for count in patches.shape[:2])
    black = (rows[:, None] + columns) % 2 == 0
    return patches[black], patches[~black]


def _patches(image: Tensor) -> Tensor:
    """Patches side by side, (rows, columns, PATCH, PATCH)."""
    return image.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)


def _dequantised(images: np.ndarray) -> Tensor:
    """Gray levels plus noise uniform over one level: flat regions of 8-bit images have no finite density otherwise."""
    levels = torch.from_numpy(np.asarray(images, dtype=np.float64))
    return levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
