"""Patches of the photographs that ship inside scikit-image: for trying an experiment with nothing to download."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .. import photographs
from ..training import seeded_generator
from .images import ArrayImages, ImageData
from .levels import Levels, refuse_levels

_TRAIN_PATCHES = 24_000
_TRAIN_SHRINKS = (1, 2, 3)
_TEST_SHRINKS = (1,)


def load(size: int, levels: Levels | None = None) -> ImageData:
    """Patches of size x size pixels: random ones of `photographs.TRAIN`, all of a tiling of `photographs.TEST`.

    They are the same in every run. Training photographs come at several resolutions, unless smaller than a patch.

    Raises:
        DataError: ``size`` is larger than every photograph, or ``levels`` are given.
    """
    refuse_levels("builtin", levels)
    generator = seeded_generator(0, "patches")
    sources = _photographs(photographs.TRAIN, _TRAIN_SHRINKS, size)
    count = -(-_TRAIN_PATCHES // max(1, len(sources)))
    train = (photographs.random_patches(source, size, count, generator) for source in sources)
    test = (photographs.tile_patches(source, size) for source in _photographs(photographs.TEST, _TEST_SHRINKS, size))
    note = (
        f"patches of scikit-image's photographs, the training ones of {', '.join(photographs.TRAIN)}, the test ones of "
        f"{', '.join(photographs.TEST)}; no faces, and few photographs"
    )
    return ImageData("photographs", *(ArrayImages(_gray_levels(patches, size)) for patches in (train, test)), note)


def _photographs(names: tuple[str, ...], shrinks: tuple[int, ...], size: int) -> list[Tensor]:
    loaded = (photographs.load_photograph(name, shrink) for shrink in shrinks for name in names)
    return [photograph for photograph in loaded if min(photograph.shape) >= size]


def _gray_levels(patches: Iterable[Tensor], size: int) -> np.ndarray:
    """Patches (count, 1, size, size) in [0, 1] as one array (count, size, size) of uint8, the form of all other data."""
    levels = [(255 * part[:, 0]).round().to(torch.uint8) for part in patches]
    return torch.cat([torch.empty(0, size, size, dtype=torch.uint8), *levels]).numpy()
