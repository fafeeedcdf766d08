"""What a run of the experiment depends on."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints import CHECKPOINT
from ..datasets import ImageData
from ..faces.presets import Config as Faces
from ..faces.presets import Covariance, check_same_data, finished_run
from ..faces.presets import config_for as faces_config_for
from .noise import Noise

BASE = "VAE"
DIAGONAL, STRUCTURED = Covariance(BASE, 1), Covariance(BASE, 7)


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine, the versions of the libraries, and a VAE that is given.

    Args:
        faces: how the VAE and its covariance networks were or are trained; the denoising autoencoders are trained alike
            but for ``denoiser_epochs``.
        checkpoint: SHA-256 of the finished run's networks; None if they are trained in this run.
        noises: what is removed; none to inpaint alone.
        images: test images, the first ones.
        eigenvectors: leading ones of Σ that the projection keeps.
        degree: of the polynomial that projects.
        slow_images: test images for BM3D and for inferred codes, the first ones: they take long.
        inpainted: test images to be inpainted, the first ones.
        rounds: how often what fills the unknown pixels is encoded.
        denoiser_epochs: passes of the denoising autoencoders, at a rate that falls by a cosine; None for as many
            as the VAE, ended as it was.
    """

    faces: Faces
    checkpoint: str | None
    noises: tuple[Noise, ...] = (Noise(15), Noise(25), Noise(50), Noise(25, correlation_length=2))
    images: int = 2_000
    eigenvectors: int = 1_000
    degree: int = 2_000
    slow_images: int = 200
    inpainted: int = 200
    rounds: int = 5
    denoiser_epochs: int | None = None

    experiment = "denoising"

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"experiment": self.experiment, **asdict(self), "faces": self.faces.as_dict()}


def trained_faces(folder: Path) -> Faces:
    """The configuration of a finished run of faces.

    Raises:
        ValueError: no such run in ``folder``, or one without the covariances that are needed.
    """
    faces = finished_run(folder)
    missing = [covariance.name for covariance in (DIAGONAL, STRUCTURED) if covariance not in faces.covariances]
    if missing:
        raise ValueError(f"the run in {folder} has no covariance network {' and no '.join(missing)}")
    return faces


def config_for(
    data: ImageData,
    preset: str,
    folder: Path | None,
    images: int | None = None,
    inpainting_only: bool = False,
    denoiser_epochs: int | None = None,
) -> Config:
    """The configuration for a data set.

    Args:
        data: the images.
        preset: of faces, for networks that are to be trained.
        folder: instead, that of a finished run of faces.
        images: test images; None for 2,000, or as many as are inpainted if nothing else is done.
        inpainting_only: whether nothing is denoised, so that no denoising autoencoder is trained.
        denoiser_epochs: as of `Config`.

    Raises:
        ValueError: the finished run is not what `trained_faces` takes, or one of other images; passes of denoising
            autoencoders where none is trained.
    """
    if inpainting_only and denoiser_epochs is not None:
        raise ValueError(f"denoiser_epochs is {denoiser_epochs}, expected none where no denoising autoencoder is trained")
    if folder is None:
        config = Config(replace(faces_config_for("faces", preset, data), covariances=(DIAGONAL, STRUCTURED)), checkpoint=None)
    else:
        faces = trained_faces(folder)
        check_same_data(faces, data)
        config = Config(faces, hashlib.sha256((folder / CHECKPOINT).read_bytes()).hexdigest())
    most = config.inpainted if inpainting_only else config.images
    count = min(most if images is None else images, len(data.test))
    pixels = config.faces.size**2
    return replace(
        config,
        noises=() if inpainting_only else config.noises,
        images=count,
        eigenvectors=min(config.eigenvectors, pixels // 4),
        slow_images=min(config.slow_images, count),
        inpainted=count if inpainting_only else min(config.inpainted, count),
        denoiser_epochs=denoiser_epochs,
    )
