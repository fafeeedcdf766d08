"""The experiment with real images made tiny, for tests; run by torchrun it writes what the processes together found.

torchrun --nproc-per-node 2 -m tests.experiments.tiny_faces FILE
"""

import sys

import numpy as np
import torch
from rich.console import Console

from experiments import distributed
from experiments.datasets import ImageData
from experiments.datasets.images import ArrayImages
from experiments.faces.images import images_for_testing, images_for_training
from experiments.faces.networks import build_base, build_covariance, residual_stddev, train_base, train_covariance
from experiments.faces.presets import Config, Covariance, config_for
from experiments.faces.scores import score
from supn_models import StructuredLikelihood

PRESET = Config(
    "faces",
    "quick",
    size=8,
    latent_size=3,
    channels=(4, 8),
    features=4,
    covariances=(
        Covariance("AE", 1),
        Covariance("AE", 3),
        Covariance("VAE", 1),
        *(Covariance("VAE", 3, source) for source in ("z", "μ", "both")),
        Covariance("β-VAE", 3),
    ),
    base_epochs=1,
    covariance_epochs=1,
    samples=3,
    bound_images=5,
    pairs_at_once=8,
    batch_size=8,
)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of blocks of 2 x 2 pixels."""
    blocks = np.random.default_rng(0).integers(0, 256, (46, 4, 4), dtype=np.uint8)
    images = blocks.repeat(2, 1).repeat(2, 2)
    return images[:16], images[16:]


def image_data() -> ImageData:
    """The same images as a data set."""
    return ImageData("blocks", *map(ArrayImages, arrays()), "drawn at random")


def train_and_score(workers: int = 0, dtype: torch.dtype = torch.float32, **replaced) -> dict[str, torch.Tensor]:
    """Losses of a VAE and of a covariance network, and their scores of test images; ``replaced`` are fields of the preset.

    Another ``dtype`` than float32 is for images in memory, without workers.
    """
    data, console, cpu = image_data(), Console(quiet=True), torch.device("cpu")
    config = config_for("faces", "quick", data, **replaced)
    images = images_for_training(config, data, cpu, workers).base
    if not workers:
        images = (images[0].to(dtype),)
    base, covariance = build_base(config, "VAE").to(dtype), config.covariances[3]
    losses = {"VAE": train_base(config, "VAE", base, images, console=console, workers=workers)}
    base.requires_grad_(False)
    likelihood = StructuredLikelihood(base, build_covariance(config, covariance, residual_stddev(base, images)).to(dtype))
    losses["covariance"] = train_covariance(config, covariance, likelihood, images, console=console, workers=workers)
    scores = score(config, base, likelihood, images_for_testing(config, data, cpu, workers).to(dtype))
    found = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in losses.items()}
    return {**found, "nats": scores.nats, "whitened": scores.whitened, "bound": scores.bound}


if __name__ == "__main__":
    from experiments.faces.presets import PRESETS

    PRESETS["faces"]["quick"] = PRESET
    with distributed.processes(torch.device("cpu")):
        found = {str(dtype): train_and_score(dtype=dtype) for dtype in (torch.float32, torch.float64)}
        if distributed.rank() == 0:
            torch.save(found, sys.argv[1])
