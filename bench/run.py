"""One run: every row with a progress bar, then the report; Ctrl-C ends the measuring and keeps what there is."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plots, report
from .cases import fits
from .environment import environment
from .implementations import default_backend
from .presets import Work
from .quality import Photographs, held_out_quality
from .rows import Limits, measure


def run(
    works: Sequence[Work], limits: Limits, device: str, preset: str, photographs: Photographs, folder: Path, console: Console
) -> report.Results:
    """Measure ``works``, write results.json, report.md and the plots into ``folder``, and show the table.

    Args:
        works: what to measure.
        limits: see `Limits`.
        device: as torch names it.
        preset: its name, for the report.
        photographs: on which stencils are judged.
        folder: an empty folder.
        console: for the progress bar and the table.

    Returns:
        What results.json holds; ``interrupted`` says whether Ctrl-C ended the measuring.
    """
    start = time.perf_counter()
    rows, quality, interrupted = {}, None, False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(works) + 1)
        try:
            for work in works:
                for row in measure(work, limits, lambda text: progress.update(task, description=text)):
                    rows.setdefault(report.identity(row), row)  # copying is measured with every operation of a case
                progress.advance(task)
            progress.update(task, description="how well each stencil models photographs")
            quality = held_out_quality({work.case.stencil for work in works if fits(work.case.stencil, 2)}, photographs)
        except KeyboardInterrupt:
            interrupted = True
    results = {
        "preset": preset,
        "backend": default_backend(device),
        **environment(device),
        "interrupted": interrupted,
        "seconds": time.perf_counter() - start,
        "rows": list(rows.values()),
        "quality": quality,
    }
    report.write_results(folder, results)
    (folder / "report.md").write_text(report.markdown_report(results, plots.draw(folder, results)), encoding="utf-8")
    console.print(report.terminal_table(results))
    return results


def progress_bar(console: Console) -> Progress:
    """How much is done, in what time, and what is being done; it vanishes at the end."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


def new_folder(folder: Path) -> Path:
    """Make the folder for a run.

    Raises:
        ValueError: it is a file, or has anything in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; nothing was changed there")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_device(device: str) -> None:
    """Raise ValueError unless tensors can be made on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
