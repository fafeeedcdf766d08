"""The folder in which an experiment leaves its results, and from which an interrupted one goes on."""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markdown import Markdown

import programs.environment
from programs.environment import machine_text
from programs.files import write_json, write_text

from . import distributed

CONFIG = "config.json"
RESULTS = "results.json"
# The states of the trainings of an unfinished run.
STATES = "training"

_PACKAGES = ("banded-gmrf", "torch", "numpy", "numba", "scikit-image")


class Config(Protocol):
    """What a run depends on."""

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""


def begin_run(config: Config, folder: Path, device: torch.device) -> None:
    """Note in the empty ``folder`` what is about to be run there, on what kind of device."""
    write_json(folder / CONFIG, {**config.as_dict(), "device": device.type})


def check_resumable(config: Config, folder: Path, device: torch.device) -> None:
    """Raise ValueError unless ``folder`` holds an unfinished run of ``config`` on the same kind of device."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: no run of this experiment was begun there")
    if (folder / RESULTS).exists():
        raise ValueError(f"the run in {folder} is finished; nothing was changed there")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise ValueError(f"{path} is not the configuration of a run; nothing was changed there")
    asked = json.loads(json.dumps({**config.as_dict(), "device": device.type}))
    differing = [f"{name} is {there!r} there, {here!r} here" for name, there, here in differences("", begun, asked)]
    if differing:
        raise ValueError(f"the run in {folder} has another configuration: " + "; ".join(differing[:4]))


def differences(name: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """The places, such as models[0].epochs, at which two values of JSON differ; what one of them lacks is None there."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(f"{name}.{key}" if name else key, there.get(key), here.get(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from differences(f"{name}[{index}]", *pair)
    elif there != here:
        yield name or "it", there, here


def finished_results(folder: Path) -> dict[str, Any]:
    """What results.json of a finished run holds; "config" is among it.

    Raises:
        ValueError: no finished run in ``folder``.
    """
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        results["config"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} holds no finished run: {error}") from None
    return results


def numbered_states(folder: Path) -> Iterator[Path]:
    """Files for the states of one training after the other, in the order in which they are always trained."""
    return (folder / STATES / f"{number}.pt" for number in itertools.count())


class Stopwatch:
    """The seconds of each part of a run, summed over its interruptions.

    An interruption loses the seconds since the last state that was kept, as it loses the work.

    Args:
        folder: of the run. The seconds are kept among its states.
    """

    def __init__(self, folder: Path):
        self._path = folder / STATES / "seconds.json"
        self._seconds: dict[str, float] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self._last = time.perf_counter()

    def add_time(self, part: str) -> None:
        """Add the time since the last call, or since the beginning, to ``part``."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def save_time(self, part: str) -> None:
        """`add_time`, and keep all seconds on disk; called where a state has just been kept. The process of rank 0 writes."""
        self.add_time(part)
        if distributed.rank() == 0:
            write_json(self._path, self._seconds)

    def seconds(self) -> dict[str, float]:
        """By part, rounded for people."""
        return {part: round(value, 1) for part, value in self._seconds.items()}


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process has held so far, in memory and on its GPU; of systems that do not say, nothing."""
    found = {}
    with suppress(ImportError):  # of Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["in memory"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        found["on the GPU"] = torch.cuda.max_memory_allocated(device)
    return found


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, commit, machine and command line: what is needed to judge a number or to get it again."""
    about = programs.environment.environment("experiments", _PACKAGES, device)
    # Under this name in all results of experiments.
    about["machine"]["torch_threads"] = about["machine"].pop("threads")
    return about


def where_text(results: dict[str, Any]) -> str:
    """Machine and release of torch, from the `environment` of results."""
    return f"{machine_text(results)}, torch {results['versions']['torch']}"


def data_text(results: dict[str, Any]) -> str:
    """Sentences, each after a space, on the files of ``left_out`` and on the ``warnings`` in results.

    Nothing if there are none, as in older results.
    """
    text, count = "", len(results.get("left_out", ()))
    if count:
        text = (
            f" Left out {count:,} file{'s' if count > 1 else ''} that could not be used: results.json names them, with reasons."
        )
    return text + "".join(f" Warning: {warning}." for warning in results.get("warnings", ()))


def device_name(device: torch.device) -> str:
    """A name to be put beside numbers."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def write_results(folder: Path, results: dict[str, Any], report: str, console: Console) -> None:
    """End a run: write results.md, then results.json, with which the run is finished; show the report.

    The states of its trainings go last: while the results are not there whole, the run can still be resumed.
    """
    write_text(folder / "results.md", report)
    write_json(folder / RESULTS, results)
    if (folder / STATES).exists():
        shutil.rmtree(folder / STATES)
    console.print(Markdown(report))
