"""What a run of the experiment depends on: the rows of its table."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..datasets import ImageData
from ..faces.bases import load_bases
from ..faces.presets import Config as Faces
from ..faces.presets import check_same_data
from .earlier import check_same_networks, digest_of_table, load_measured

BASE = "VAE"
OFFSETS = ("dense", "dilated", "greedy")
TRAININGS = ("frozen", "fine-tuned", "scratch")
IMAGES = ("unseen", "all")


@dataclass(frozen=True)
class Row:
    """A covariance network from the code, of a VAE that is frozen or trained with it.

    Args:
        offsets: of `OFFSETS`, the same number of them in all.
        rank: R, the number of factors.
        training: of `TRAININGS`, what of the VAE: frozen as it is, or trained on with the network, or both from the beginning.
        images: of `IMAGES`, for training: those that the frozen VAE has not seen, or all.
    """

    offsets: str = "dense"
    rank: int = 0
    training: str = "frozen"
    images: str = "unseen"

    @property
    def name(self) -> str:
        """In tables."""
        factors = f" + {self.rank} factors" if self.rank else ""
        joint = {"frozen": "", "fine-tuned": ", fine-tuned with the mean", "scratch": ", from scratch with the mean"}
        return f"{self.offsets}{factors}{joint[self.training]}{f', {self.images} images' if self.is_control else ''}"

    @property
    def is_control(self) -> bool:
        """Whether it differs from another row only in its images: they tell what of a gain is theirs."""
        return (self.images == "all") == (self.training == "frozen")


ROWS = {
    "dense": Row(),
    "r8": Row(rank=8),
    "r32": Row(rank=32),
    "dilated": Row("dilated"),
    "greedy": Row("greedy"),
    "dense-all": Row(images="all"),
    "fine-tuned-unseen": Row(training="fine-tuned"),
    "fine-tuned": Row(training="fine-tuned", images="all"),
    "scratch": Row(training="scratch", images="all"),
}


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine, the versions of the libraries, and the VAE that is given.

    Args:
        faces: how the VAE was trained.
        checkpoint: SHA-256 of the file that holds it.
        rows: the first one is what all others are compared with, or else the first one of the earlier run.
        seeds: networks of each of these rows, those of the earlier run among them.
        stencil_size: f of the f x f patch, the number of whose offsets all stencils have.
        reach: the furthest offset, in pixels along an axis, that the greedy choice may take.
        epochs: passes over the images, of networks behind a frozen VAE and of those that are fine-tuned with it.
        scratch_epochs: passes of a VAE and a network that begin together.
        measured: test images, the first ones, for coverage, conformal scales and the correlation of both eyes.
        earlier: SHA-256 of the table of an earlier run to which this one adds networks; None without one.
    """

    faces: Faces
    checkpoint: str
    rows: tuple[Row, ...]
    seeds: int = 3
    stencil_size: int = 7
    reach: int = 16
    epochs: int = 8
    scratch_epochs: int = 30
    measured: int = 128
    earlier: str | None = None

    experiment = "reach"

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"experiment": self.experiment, **asdict(self), "faces": self.faces.as_dict()}

    def of_seed(self, seed: int) -> Faces:
        """What trains a network of one seed, counted from 0: as the VAE was trained, but for the seed."""
        return replace(self.faces, seed=self.faces.seed + seed, covariance_epochs=self.epochs)


def config_for(
    data: ImageData,
    file: Path,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    measured: int | None = None,
) -> Config:
    """The configuration for the VAE of a run of faces.

    Args:
        data: its images.
        file: of its base models.
        rows: names of `ROWS`, of which the first is compared with all others; None for all that differ.
        seeds: networks of each row; None for 3.
        epochs: of all networks; None for 8, and 30 from scratch.
        measured: test images for what takes long; None for 128.

    Raises:
        ValueError: no such file, or one of other images or without a VAE; rows that there are not, or twice, or that differ
            in images where all networks have the same; fine-tuning without the row that it begins with.
    """
    bases, about = load_bases(file)
    faces = Faces.from_dict(about["config"])
    check_same_data(faces, data)
    if BASE not in bases:
        raise ValueError(f"{file} has no {BASE}, only {', '.join(bases)}")
    names = [name for name, row in ROWS.items() if faces.held_out or not row.is_control] if rows is None else list(rows)
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"rows is {','.join(names)}, expected some of {', '.join(ROWS)}, each once")
    for place, name in enumerate(names):
        if ROWS[name].training == "fine-tuned" and "dense" not in names[:place]:
            raise ValueError(f"rows has {name} without dense before it, with whose network it begins")
        if ROWS[name].is_control and not faces.held_out:
            raise ValueError(f"rows has {name}, but the VAE of {file} has seen all training images: no row differs in them")
    config = Config(faces, hashlib.sha256(file.read_bytes()).hexdigest(), tuple(ROWS[name] for name in names))
    given = {"seeds": seeds, "epochs": epochs, "scratch_epochs": epochs, "measured": measured}
    config = replace(config, **{key: value for key, value in given.items() if value is not None})
    return replace(config, measured=min(config.measured, faces.test), reach=min(config.reach, faces.size // 2 - 1))


def with_earlier(config: Config, folder: Path) -> Config:
    """The configuration of a run that adds its networks to the table of a finished one.

    Raises:
        ValueError: no finished run in ``folder``, one whose networks are trained or measured otherwise, or one that has all
            that this one would train.
    """
    check_same_networks(folder, json.loads(json.dumps(config.as_dict())))
    known = load_measured(folder)
    if all(len(known.get(row.name, ())) >= config.seeds for row in config.rows):
        rows = "; ".join(row.name for row in config.rows)
        raise ValueError(f"{folder} has {config.seeds} networks of each row already: {rows}")
    return replace(config, earlier=digest_of_table(folder))
