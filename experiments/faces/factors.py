"""Factors that a trained covariance network predicts for test images, in a file for ``python -m bench toolbox --factors``."""

from pathlib import Path

import numpy as np
import torch

from programs.files import written_whole
from supn_models import StructuredLikelihood

from ..checkpoints import CHECKPOINT, load_checkpoint
from ..datasets import ImageData
from .images import images_for_testing
from .presets import Config


def save_factors(config: Config, folder: Path, data: ImageData, base: str, count: int, path: Path) -> None:
    """Write log_diag, off_diag, stencil_size and residual of the first test images to an .npz file.

    Args:
        config: of the finished run.
        folder: where its checkpoint is.
        data: its images.
        base: the base model, of whose covariance networks that with the largest stencil from z is taken.
        count: how many test images.
        path: the file.
    """
    networks, _ = load_checkpoint(folder / CHECKPOINT)
    covariance = config.shown(base)[1]
    likelihood = StructuredLikelihood(networks[base], networks[covariance.name])
    images = images_for_testing(config, data, torch.device("cpu"), workers=0)[:count]
    with torch.no_grad():
        q = likelihood(networks[base].encode(images))
        residual = images[:, 0] - q.mean
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            log_diag=q.precision_cholesky.log_diag.numpy(),
            off_diag=q.precision_cholesky.off_diag.numpy(),
            stencil_size=covariance.stencil_size,
            residual=residual.numpy(),
            source=f"{covariance.name}, by the network in {folder}, for test images of {data.name},",
        )
