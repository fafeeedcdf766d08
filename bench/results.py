"""What every run of the bench leaves: results.json, a report, and a table on the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import programs.environment
import programs.progress
from programs.environment import machine_text
from programs.files import write_json, write_text

from .peers import PEERS

Results = dict[str, Any]

RESULTS = "results.json"

_PACKAGES = ("banded-gmrf", "torch", "numpy", "numba")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Machine, versions, also those of the peers, commit and command, as JSON holds them."""
    about = programs.environment.environment("bench", _PACKAGES, device)
    about["versions"] |= {peer.module: peer.version() for peer in PEERS.values()}
    return about


def write_results(folder: Path, results: Results, report: str, name: str = "results.md") -> None:
    """Write ``report`` under its name, and results.json, into ``folder``."""
    write_json(folder / RESULTS, results, indent=1)
    write_text(folder / name, report)


def read_results(path: Path) -> Results:
    """A results.json, or the one in a folder.

    Raises:
        ValueError: there is none, or it is not one of this program's.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or not {"rows", "machine"} <= results.keys():
        raise ValueError(f"{path} was not written by this program")
    return results


def about(results: Results) -> str:
    """The paragraphs below a report's title: whether it is complete, the machine, the versions, and the command."""
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items() if version)
    interrupted = "**Interrupted: not everything was measured.**\n\n" if results["interrupted"] else ""
    return (
        f"{interrupted}{machine_text(results)}; Python {results['python']}; {versions}; commit {results['commit']}.\n\n"
        f"`{results['command']}`, {results['seconds']:.0f} s.\n"
    )


def table(results: Results, header: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int, **options: Any) -> Table:
    """A table for the terminal under the machine's name, its first ``text_columns`` columns to the left."""
    shown = Table(title=machine_text(results), box=rich.box.SIMPLE_HEAD, **options)
    for number, name in enumerate(header):
        shown.add_column(name, justify="left" if number < text_columns else "right")
    for line in lines:
        shown.add_row(*line)
    return shown


def progress_bar(console: Console) -> Progress:
    """How much is done, in what time, and what is being done; it vanishes at the end."""
    return programs.progress.progress_bar(console, TimeElapsedColumn(), TextColumn("{task.description}"), transient=True)
