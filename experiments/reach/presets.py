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
from .earlier import MEASURED, check_same_networks, load_measured

BASE = "VAE"
OFFSETS = ("dense", "dilated", "greedy")
TRAININGS = ("frozen", "fine-tuned", "scratch")


@dataclass(frozen=True)
class Row:
    """A covariance network from the code, of a VAE that is frozen or trained with it.

    Args:
        offsets: of `OFFSETS`, the same number of them in all.
        rank: R, the number of factors.
        training: of `TRAININGS`, what of the VAE: frozen as it is, or trained on with the network, or both from the beginning.
    """

    offsets: str = "dense"
    rank: int = 0
    training: str = "frozen"

    @property
    def name(self) -> str:
        """In tables."""
        factors = f" + {self.rank} factors" if self.rank else ""
        joint = {"frozen": "", "fine-tuned": ", fine-tuned with the mean", "scratch": ", from scratch with the mean"}
        return f"{self.offsets}{factors}{joint[self.training]}"


ROWS = {
    "dense": Row(),
    "r8": Row(rank=8),
    "r32": Row(rank=32),
    "dilated": Row("dilated"),
    "greedy": Row("greedy"),
    "fine-tuned": Row(training="fine-tuned"),
    "scratch": Row(training="scratch"),
}


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine, the versions of the libraries, and the VAE that is given.

    Args:
        faces: how the VAE was trained.
        checkpoint: SHA-256 of the file that holds it.
        rows: the first one is what all others are compared with, or that of the earlier run.
        seeds: networks of each of these rows.
        stencil_size: f of the f x f patch, the number of whose offsets all stencils have.
        reach: the furthest offset, in pixels along an axis, that the greedy choice may take.
        epochs: passes over the images, of networks behind a frozen VAE and of those that are fine-tuned with it.
        scratch_epochs: passes of a VAE and a network that begin together.
        measured: test images, the first ones, for coverage, conformal scales and the correlation of both eyes.
        earlier: SHA-256 of what an earlier run has measured, to whose table this one adds networks; None without one.
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
        """As values that JSON can hold; without ``earlier`` if there is none."""
        values = {"experiment": self.experiment, **asdict(self), "faces": self.faces.as_dict()}
        return {name: value for name, value in values.items() if name != "earlier" or value is not None}

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
    earlier: Path | None = None,
) -> Config:
    """The configuration for the VAE of a run of faces.

    Args:
        data: its images.
        file: of its base models.
        rows: names of `ROWS`, of which the first is compared with all others; None for all.
        seeds: networks of each row; None for 3.
        epochs: of all networks; None for 8, and 30 from scratch.
        measured: test images for what takes long; None for 128.
        earlier: the folder of a finished run of the same VAE, to whose table networks are added.

    Raises:
        ValueError: no such file, or one of other images or without a VAE; rows that there are not, or twice; fine-tuning
            without the row that it begins with; an earlier run of networks that are trained or measured otherwise, or that
            has all of these.
    """
    bases, about = load_bases(file)
    faces = Faces.from_dict(about["config"])
    check_same_data(faces, data)
    if BASE not in bases:
        raise ValueError(f"{file} has no {BASE}, only {', '.join(bases)}")
    names = list(ROWS) if rows is None else list(rows)
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"rows is {','.join(names)}, expected some of {', '.join(ROWS)}, each once")
    if "fine-tuned" in names and "dense" not in names[: names.index("fine-tuned")]:
        raise ValueError("rows has fine-tuned without dense before it, with whose network it begins")
    config = Config(faces, hashlib.sha256(file.read_bytes()).hexdigest(), tuple(ROWS[name] for name in names))
    given = {"seeds": seeds, "epochs": epochs, "scratch_epochs": epochs, "measured": measured}
    config = replace(config, **{key: value for key, value in given.items() if value is not None})
    config = replace(config, measured=min(config.measured, faces.test), reach=min(config.reach, faces.size // 2 - 1))
    if earlier is None:
        return config
    check_same_networks(earlier, json.loads(json.dumps(config.as_dict())))
    known = load_measured(earlier)
    if all(len(known.get(row.name, ())) >= config.seeds for row in config.rows):
        raise ValueError(f"rows is {','.join(names)}, seeds is {config.seeds}: {earlier} has all of these networks already")
    return replace(config, earlier=hashlib.sha256((earlier / MEASURED).read_bytes()).hexdigest())
