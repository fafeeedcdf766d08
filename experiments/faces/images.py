"""The images of a run: those of a data set that the configuration asks for, with dequantisation noise and mirrored."""

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..datasets import ImageData, stack
from ..training import seeded_generator
from .presets import Config


class Mirrored(Dataset[Tensor]):
    """Images (channels, height, width), then the mirror image, left for right, of each."""

    def __init__(self, images: Dataset[Tensor]):
        self.images = images

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        mirrored, own = divmod(index, len(self.images))
        image = self.images[own]
        return image.flip(-1) if mirrored else image


Images = tuple[Tensor] | Dataset[Tensor]


def images_for_training(
    config: Config, data: ImageData, device: torch.device, workers: int, console: Console | None = None
) -> tuple[Images, Images]:
    """Images and their mirror images for the base models, and those for the covariance networks.

    In memory on the device, or with ``workers`` read during training; ``console`` shows the progress of reading.
    """
    images = _chosen(data.dequantised(config.seed).train, config.train, config.seed)
    if not config.held_out:
        both = _mirrored(images, device, workers, console)
        return both, both
    order = torch.randperm(config.train, generator=seeded_generator(config.seed, "held-out images")).tolist()
    parts = order[: config.base_images], order[config.base_images :]
    for_base, for_covariance = (_mirrored(Subset(images, part), device, workers, console) for part in parts)
    return for_base, for_covariance


def _mirrored(images: Dataset[Tensor], device: torch.device, workers: int, console: Console | None) -> Images:
    if workers:
        return Mirrored(images)
    in_memory = stack(images, title="reading training images", console=console).to(device)
    return (torch.cat((in_memory, in_memory.flip(-1))),)


def images_for_testing(
    config: Config, data: ImageData, device: torch.device, workers: int, console: Console | None = None
) -> Tensor:
    """(test, 1, size, size), in memory on the device; ``console`` shows the progress of reading."""
    images = _chosen(data.dequantised(config.seed).test, config.test, config.seed)
    return stack(images, workers, "reading test images", console).to(device)


def _chosen(images: Dataset[Tensor], count: int, seed: int) -> Dataset[Tensor]:
    """All images, or ``count`` of them by lot: those that follow each other may show the same person."""
    if count == len(images):
        return images
    order = torch.randperm(len(images), generator=seeded_generator(seed, "chosen images"))
    return Subset(images, order[:count].tolist())
