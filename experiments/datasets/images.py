"""What every data set of this package is made of: training and test images, and where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..progress import tracked
from ..training import seeded_generator
from .levels import DataError, Levels

_READ_AT_ONCE = 256


@dataclass(frozen=True)
class ImageData:
    """Training and test images: float32 tensors (1, size, size), 8-bit gray levels spread over [-1, 1].

    Args:
        name: what a table calls the data.
        train: the training images.
        test: the test images.
        note: where the images come from and what was done to them, to be read beside any number from them.
        left_out: the files, and frames of files, that could not be used, each with the reason.
        warnings: what must be known of the values that became gray levels, as that all images are dark.
        levels: the values that became black and white; None for all that 8 or 16 bits can hold.

    Raises:
        DataError: no training image or no test image.
    """

    name: str
    train: Dataset[Tensor]
    test: Dataset[Tensor]
    note: str
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    levels: Levels | None = None

    def __post_init__(self):
        if len(self.train) == 0 or len(self.test) == 0:
            raise DataError(
                f"{self.name} has {len(self.train)} training and {len(self.test)} test images, expected at least one of each"
            )

    def dequantised(self, seed: int) -> Self:
        """The same images with the noise of `Dequantised`."""
        return replace(
            self,
            train=Dequantised(self.train, seed, "training image"),
            test=Dequantised(self.test, seed, "test image"),
        )

    def summary(self, most: int = 10) -> str:
        """What there is and what is missing, in lines for people; at most ``most`` of the files left out are named."""
        lines = [f"{self.name}: {len(self.train):,} training and {len(self.test):,} test images; {self.note}"]
        if self.left_out:
            lines.append(f"left out, {len(self.left_out):,} files:")
            lines += [f"  {reason}" for reason in self.left_out[:most]]
        if len(self.left_out) > most:
            lines.append(f"  and {len(self.left_out) - most:,} more")
        return "\n".join(lines)


class ArrayImages(Dataset[Tensor]):
    """Images held in memory: an array (count, size, size) of uint8."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(self.images[index])


class Dequantised(Dataset[Tensor]):
    """Images with noise uniform over one of 256 gray levels, ±1/255 in [-1, 1].

    A density of images stored in 8 bits could grow without bound where one value repeats exactly, as in flat or saturated
    regions. With the noise, the mean log density is at most log (P / v), P being the probability of the 8-bit image under the
    density and v = (2/255)^pixels the volume of a level (Theis, van den Oord and Bethge, A note on the evaluation of generative
    models, ICLR 2016).

    Each image has a generator of its own, made from ``seed``, ``purpose`` and the image's index, so that its noise is the same
    in every epoch, whatever the order, the batch size, and the number of workers and processes.

    Args:
        images: the images.
        seed: the same seed gives the same noise.
        purpose: sets the noise apart from that of other images of one seed.
    """

    def __init__(self, images: Dataset[Tensor], seed: int, purpose: str):
        self.images, self.seed, self.purpose = images, seed, purpose

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        noise = torch.rand(image.shape, generator=seeded_generator(self.seed, f"dequantise {self.purpose} {index}"))
        return image + (2 * noise - 1) / 255


def to_tensor(image: np.ndarray) -> Tensor:
    """A gray image (size, size) of uint8 as float32 (1, size, size) in [-1, 1]."""
    return torch.from_numpy(image)[None].to(torch.float32) / 127.5 - 1


def stack(
    images: Dataset[Tensor], num_workers: int = 0, title: str = "reading images", console: Console | None = None
) -> Tensor:
    """All images of a data set that fits in memory: (count, 1, size, size).

    Args:
        images: the data set.
        num_workers: processes that read; 0 reads in this one.
        title, console: what is shown as progress, and where; None for nowhere.
    """
    batches = DataLoader(images, batch_size=_READ_AT_ONCE, num_workers=num_workers)
    return torch.cat(list(tracked(batches, min(_READ_AT_ONCE, len(images)), title, console)))


def gray(images: np.ndarray) -> np.ndarray:
    """Gray levels (...) of colours (..., 3), both uint8: the luma of ITU-R BT.601, with the rounding of Pillow."""
    red, green, blue = np.moveaxis(images.astype(np.uint32), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def listed(names: Sequence[str], most: int = 3) -> str:
    """How many ``names`` there are, and some of them, for a message: ``12 (a, b, c, ...)``."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names):,} ({shown})" if names else "none"
