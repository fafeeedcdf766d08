"""Gray patches of the photographs that ship inside scikit-image, with nothing to download."""

import skimage.color
import skimage.data
import skimage.transform
import skimage.util
import torch
from torch import Tensor

TRAIN = ("astronaut", "coffee", "rocket", "stereo_motorcycle", "coins", "moon", "brick", "grass", "gravel")
TEST = ("camera", "chelsea")


def load_photograph(name: str, shrink: int = 1) -> Tensor:
    """One photograph of `skimage.data` as gray values in [0, 1], float32 (height, width) in pixels.

    Args:
        name: a function of `skimage.data`; of a stereo pair the left image.
        shrink: average blocks of shrink x shrink pixels; rows and columns that fill no block are dropped.
    """
    image = getattr(skimage.data, name)()
    if isinstance(image, tuple):
        image = image[0]
    image = skimage.util.img_as_float32(image)
    if image.ndim == 3:
        image = skimage.color.rgb2gray(image)
    height, width = (size // shrink * shrink for size in image.shape)
    image = skimage.transform.downscale_local_mean(image[:height, :width], (shrink, shrink))
    return torch.from_numpy(image.astype("float32"))


def tile_patches(photograph: Tensor, size: int) -> Tensor:
    """All patches of a regular tiling, from the upper left corner: (count, 1, size, size)."""
    tiles = photograph.unfold(0, size, size).unfold(1, size, size)
    return tiles.reshape(-1, 1, size, size).contiguous()


def random_patches(photograph: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Patches at random places in one of the eight orientations of a square: (count, 1, size, size)."""
    tops = torch.randint(photograph.shape[0] - size + 1, (count,), generator=generator)
    lefts = torch.randint(photograph.shape[1] - size + 1, (count,), generator=generator)
    orientations = torch.randint(8, (count,), generator=generator)
    patches = photograph.new_empty(count, 1, size, size)
    for patch, top, left, orientation in zip(patches, tops.tolist(), lefts.tolist(), orientations.tolist(), strict=True):
        crop = photograph[top : top + size, left : left + size].rot90(orientation % 4)
        patch[0] = crop.T if orientation >= 4 else crop
    return patches


def dequantise(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise uniform over one of 256 gray levels.

    Photographs are stored in 8 bits, so that flat regions repeat one value exactly, where a density could grow without bound.
    """
    return patches + (torch.rand(patches.shape, generator=generator) - 0.5) / 255
