"""The folder in which an experiment leaves its results."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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


def environment() -> dict[str, Any]:
    """Versions, machine and command line: what is needed to judge a number or to get it again."""
    packages = ("banded-gmrf", "torch", "numpy", "numba", "scikit-image")
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "torch_threads": torch.get_num_threads()},
    }


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
