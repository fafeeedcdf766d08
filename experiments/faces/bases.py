"""Base models apart from the run that trained them: a small file, from which other runs take them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints import load_checkpoint, save_checkpoint
from .presets import Config

# The file of a run that holds its base models, small enough for a repository.
BASES = "bases.safetensors"

# What says which images the base models have seen, and what they are.
_SAME = ("size", "latent_size", "channels", "data", "levels", "train", "held_out", "validation", "seed")


def save_bases(path: Path, config: Config, bases: dict[str, nn.Module], curves: dict[str, dict[str, Any]]) -> None:
    """Write the base models of a run, their weights in half precision.

    Args:
        path: the file.
        config: the run's.
        bases: by name.
        curves: their learning curves, of `networks.Networks`.
    """
    save_checkpoint(path, bases, {"config": config.as_dict(), "curves": curves}, half=True)


def bases_file(path: Path) -> Path:
    """The file of a run's base models, given its folder or the file itself.

    Raises:
        ValueError: there is none.
    """
    file = path / BASES if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: a run of faces or cifar10 leaves it, once its base models are trained")
    return file


def load_bases(path: Path) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """What `save_bases` wrote: the networks in float32, in evaluation mode; and a dictionary of "config" and "curves".

    Raises:
        ValueError: another file.
    """
    bases, about = load_checkpoint(path)
    if not {"config", "curves"} <= about.keys():
        raise ValueError(f"{path} holds no base models that a run of faces left")
    return bases, about


def with_bases(config: Config, path: Path) -> Config:
    """The configuration of a run that takes its base models from a file.

    Raises:
        ValueError: a file that `save_bases` did not write, or with base models of other images or sizes, or without one that
            the run needs.
    """
    bases, about = load_bases(path)
    there = Config.from_dict(about["config"])
    differing = [
        f"{name} {getattr(there, name)!r}, the run has {getattr(config, name)!r}"
        for name in _SAME
        if getattr(there, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(f"the base models in {path} have {'; '.join(differing)}")
    missing = [name for name in config.bases if name not in bases]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}, expected some of {', '.join(bases)}")
    return replace(
        config,
        given_bases=hashlib.sha256(path.read_bytes()).hexdigest(),
        base_epochs=there.base_epochs,
        patience=there.patience,
    )
