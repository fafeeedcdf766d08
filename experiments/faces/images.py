"""The images of a run: those of a data set that the configuration asks for, with dequantisation noise and mirrored."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class TrainingImages:
    """Images for the networks of a run.

    Args:
        base: and their mirror images, for the base models: in memory on the device, or a data set.
        covariance: likewise for the covariance networks.
        validation: (count, 1, size, size) in memory on the device, which no network is trained on; perhaps none.
    """

    base: Images
    covariance: Images
    validation: Tensor


def images_for_training(
    config: Config, data: ImageData, device: torch.device, workers: int, console: Console | None = None
) -> TrainingImages:
    """The training images of a run in their parts, with ``workers`` read during training; ``console`` shows the reading."""
    images = _chosen(data.dequantised(config.seed).train, config.train, config.seed)
    validation = torch.empty(0, 1, config.size, config.size, device=device)
    if not config.held_out and not config.validation:
        both = _mirrored(images, device, workers, console)
        return TrainingImages(both, both, validation)
    order = torch.randperm(config.train, generator=seeded_generator(config.seed, "held-out images")).tolist()
    apart = config.base_images, config.train - config.validation_images
    if config.validation_images:
        validation = stack(Subset(images, order[apart[1] :]), workers, "reading validation images", console).to(device)
    base = covariance = _mirrored(Subset(images, order[: apart[0]]), device, workers, console)
    if config.held_out:
        covariance = _mirrored(Subset(images, order[slice(*apart)]), device, workers, console)
    return TrainingImages(base, covariance, validation)


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
