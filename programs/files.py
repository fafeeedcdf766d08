"""The folder of a run, and files that are written whole or not at all."""

import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def new_folder(name: str, out: Path | None) -> Path:
    """Make the folder for one run: ``out``, or by default results/NAME-DATE-TIME.

    Raises:
        ValueError: ``out`` is a file or a folder with anything in it, or cannot be made.
    """
    folder = out or Path("results") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; nothing was changed there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}") from None
    return folder


def printable(text: object) -> str:
    r"""A path, or a text with one, as UTF-8 can hold it: bytes of names that are not UTF-8 become \xe9 and the like."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whatever names are in it: nobody's results are lost for them."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which then replaces it in one step: ``path`` is never there in part."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with written_whole(path) as partial:
        write_text(partial, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
