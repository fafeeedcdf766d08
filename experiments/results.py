"""The folder in which an experiment leaves its results, and from which an interrupted one goes on."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

CONFIG = "config.json"
RESULTS = "results.json"
# The states of the trainings of an unfinished run.
STATES = "training"


class Config(Protocol):
    """What a run depends on."""

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""


def new_results_folder(experiment: str, out: Path | None) -> Path:
    """Make the folder for one run: ``out``, or by default results/EXPERIMENT-DATE-TIME.

    Raises:
        ValueError: ``out`` exists and is a file or a folder with anything in it.
    """
    folder = out or Path("results") / f"{experiment}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; nothing was changed there")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start(config: Config, folder: Path) -> None:
    """Note in the empty ``folder`` what is about to be run there."""
    write_json(folder / CONFIG, config.as_dict())
    (folder / STATES).mkdir()


def check_resumable(config: Config, folder: Path) -> None:
    """Raise ValueError unless ``folder`` holds an unfinished run of ``config``."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: no run of this experiment was begun there")
    if (folder / RESULTS).exists():
        raise ValueError(f"the run in {folder} is finished; nothing was changed there")
    begun = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(config.as_dict()))
    differing = [key for key in asked if begun.get(key) != asked[key]]
    if differing:
        raise ValueError(
            f"the run in {folder} has another configuration: "
            + "; ".join(f"{key} is {begun.get(key)!r} there, {asked[key]!r} here" for key in differing)
        )


def environment() -> dict[str, Any]:
    """Versions, machine and command line: what is needed to judge a number or to get it again."""
    packages = ("banded-gmrf", "torch", "numpy", "numba", "scikit-image")
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "torch_threads": torch.get_num_threads()},
    }


def device_name(device: torch.device) -> str:
    """A name to be put beside numbers."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
