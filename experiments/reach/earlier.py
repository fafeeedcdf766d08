"""The table of an earlier run, to which networks can be added without training its own again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from programs.files import write_json

from ..results import RESULTS, differences, finished_results, where_text

# The file of a run that holds what was measured of each network.
MEASURED = "measured.json"

# What all networks of a table have in common, of the configuration.
_SAME = ("experiment", "faces", "checkpoint", "stencil_size", "reach", "epochs", "scratch_epochs", "measured")

# For each row, by name, what `measures.measure` gives for each seed from 0 on.
Measured = dict[str, list[dict[str, Any]]]


def save_measured(folder: Path, measured: Measured) -> None:
    """Write what a run measured into its folder."""
    write_json(folder / MEASURED, measured)


def load_measured(folder: Path) -> Measured:
    """What `save_measured` wrote.

    Raises:
        ValueError: no such file, or a broken one.
    """
    try:
        return json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds nothing that a run of reach measured: {error}") from None


def runs_of_table(folder: Path) -> list[dict[str, Any]]:
    """The finished runs behind the table in ``folder``, the first one first.

    Of each: "trained", the seeds of each row's networks; "command", "seconds" and "where".
    """
    there = finished_results(folder)
    own = {key: there[key] for key in ("trained", "command", "seconds")}
    return [*there["earlier"], {**own, "where": where_text(there)}]


def check_same_networks(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError unless ``folder`` holds a finished run whose networks are trained and measured as those of ``config``.

    Args:
        folder: of the earlier run.
        config: of the one that adds to its table, as JSON holds it.
    """
    there = finished_results(folder)
    differing = [
        f"{name} is {old!r} there, {new!r} here"
        for key in _SAME
        for name, old, new in differences(key, there["config"].get(key), config[key])
    ]
    if differing:
        raise ValueError(f"the networks of the run in {folder} are others: {'; '.join(differing[:4])}")


def digest_of_table(folder: Path) -> str:
    """SHA-256 of the table in ``folder``."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (RESULTS, MEASURED))).hexdigest()
