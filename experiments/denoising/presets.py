"""What a run of the experiment depends on."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..datasets import ImageData
from ..faces.factors import finished_run
from ..faces.presets import Config as Faces
from ..faces.presets import Covariance
from ..faces.presets import config_for as faces_config_for
from .noise import Noise

BASE = "VAE"
DIAGONAL, STRUCTURED = Covariance(BASE, 1), Covariance(BASE, 7)


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine, the versions of the libraries, and a VAE that is given.

    Args:
        faces: how the VAE and its covariance networks were or are trained; the denoising autoencoders are trained alike.
        given: the VAE and its covariance networks come from a finished run of faces.
        noises: what is removed.
        images: test images, the first ones.
        eigenvectors: leading ones of Σ that the projection keeps.
        degree: of the polynomial that projects.
        bm3d_images: test images for BM3D, the first ones: it takes long.
        inpainted: test images to be inpainted, the first ones.
        rounds: how often what fills the unknown pixels is encoded.
    """

    faces: Faces
    given: bool
    noises: tuple[Noise, ...] = (Noise(15), Noise(25), Noise(50), Noise(25, correlation_length=2))
    images: int = 2_000
    eigenvectors: int = 1_000
    degree: int = 2_000
    bm3d_images: int = 500
    inpainted: int = 200
    rounds: int = 5

    experiment = "denoising"

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"experiment": self.experiment, **asdict(self)}


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


def config_for(data: ImageData, preset: str, trained: Faces | None, images: int | None = None) -> Config:
    """The configuration for a data set.

    Args:
        data: the images.
        preset: of faces, for networks that are to be trained.
        trained: instead, the configuration of a finished run, from `trained_faces`.
        images: test images; None for 2,000.

    Raises:
        ValueError: the finished run was one of other images.
    """
    if trained is not None and trained.data != data.name:
        raise ValueError(f"the networks were trained on {trained.data}, the data is {data.name}")
    faces = trained or replace(faces_config_for("faces", preset, data), covariances=(DIAGONAL, STRUCTURED))
    config = Config(faces, given=trained is not None)
    count = min(config.images if images is None else images, len(data.test))
    pixels = faces.size**2
    return replace(
        config,
        images=count,
        eigenvectors=min(config.eigenvectors, pixels // 4),
        bm3d_images=min(config.bm3d_images, count),
        inpainted=min(config.inpainted, count),
    )
