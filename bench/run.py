"""One run: every row with a progress bar, then the report; Ctrl-C ends the measuring and keeps what there is."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import plots
from .cases import fits
from .implementations import default_backend
from .presets import Work
from .quality import Photographs, held_out_quality
from .report import identity, markdown_report, quality_table, terminal_table
from .results import Results, environment, progress_bar, write_results
from .rows import Limits, measure_work


def run_works(
    works: Sequence[Work], limits: Limits, device: str, preset: str, photographs: Photographs, folder: Path, console: Console
) -> Results:
    """Measure ``works``, write results.json, report.md and the plots into ``folder``, and show the tables.

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
                for row in measure_work(work, limits, lambda text: progress.update(task, description=text)):
                    rows.setdefault(identity(row), row)  # copying is measured with every operation of a case
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
    write_results(folder, results, markdown_report(results, plots.draw(folder, results)), "report.md")
    console.print(terminal_table(results))
    if (judged := quality_table(results)) is not None:
        console.print(judged)
    return results
