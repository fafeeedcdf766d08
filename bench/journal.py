"""Steps of a long run, each on the disk as soon as it is done: a second start goes on where the first one ended."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = "steps.jsonl"

BAD = ("failed", "wrong")


class Journal:
    """The lines of steps.jsonl: ``begun`` and ``done`` name a step, ``complete`` a stage; ``about`` has the machine."""

    def __init__(self, folder: Path):
        self.path = folder / STEPS

    def go_on(self, about: dict[str, Any], same: Sequence[str]) -> None:
        """Begin a start of the run, or a further one, in which the entries ``same`` of ``about`` must not have changed.

        Raises:
            ValueError: the folder has steps of a run with others.
        """
        for line in self.lines():
            earlier = line.get("about", about)
            if any(earlier.get(key) != about.get(key) for key in same):
                texts = [", ".join(f"{key} {run.get(key)}" for key in same) for run in (earlier, about)]
                raise ValueError(f"{self.path.parent} holds steps of {texts[0]}; this is {texts[1]}")
        self.write(about=about)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._whole().splitlines()]

    def write(self, **line: Any) -> None:
        """Append a line, on the disk when this returns; what a killed process wrote of one is cut off before."""
        whole = self._whole()
        with open(self.path, "ab") as file:
            file.truncate(len(whole))
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> set[str]:
        return {line["done"] for line in self.lines() if "done" in line}

    def complete(self) -> set[str]:
        return {line["complete"] for line in self.lines() if "complete" in line}

    def under_way(self) -> str | None:
        """The step that was begun last, if it has not ended."""
        begun = [line["begun"] for line in self.lines() if "begun" in line]
        return begun[-1] if begun and begun[-1] not in self.done() else None

    def bad(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("status") in BAD]

    def _whole(self) -> bytes:
        text = self.path.read_bytes() if self.path.exists() else b""
        return text[: text.rfind(b"\n") + 1]
