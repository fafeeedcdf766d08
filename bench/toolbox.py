"""``python -m bench toolbox``: what each tool of `banded_gmrf` costs, beside what is aimed at. On a CPU in fresh processes."""

import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from programs.tables import markdown_table

from .fields import Fields
from .journal import Journal
from .measure import GIB, PeakMemory, Timing, TrialError, describe, in_own_process, synchronize, turns_by_the_clock
from .results import Results, about, environment, progress_bar, table, write_results
from .rows import Limits, Row
from .tools import Given, Sizes, tools


def run_toolbox(
    fields: Fields, sizes: Sizes, limits: Limits, device: str, folder: Path, console: Console, seconds: float | None = None
) -> Results:
    """Measure all tools, write results.json and results.md into ``folder`` after each, and show the table.

    Args:
        fields: see `Fields`.
        sizes: see `Sizes`.
        limits: for each tool; memory and time of a first call, which are those of all calls here, on a CPU only.
        device: as torch names it.
        folder: an empty folder, or one of an earlier start, whose tools are not measured again.
        console: for the progress bar and the table.
        seconds: after which no further tool is begun; None for no such limit.

    Returns:
        What results.json holds; ``interrupted`` says whether Ctrl-C, or the end of the time, left tools out.

    Raises:
        ValueError: the folder is of another commit, machine or factors.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    journal, chosen = Journal(folder), tools(sizes, fields)
    about_run = {"fields": fields.source, **environment(device)}
    journal.go_on(about_run, ("commit", "machine", "fields"))
    lines = {line["done"]: line for line in journal.lines() if "done" in line}

    def written(interrupted: bool) -> Results:
        done = [lines[name] for name in chosen if name in lines]
        took = sum(line["seconds"] for line in done)
        results = {**about_run, "interrupted": interrupted, "seconds": took, "tools": [line["row"] for line in done]}
        write_results(folder, results, markdown_report(results))
        return results

    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        try:
            for name, tool in chosen.items():
                if name not in lines and time.monotonic() < end:
                    progress.update(task, description=f"{tool.title}: {tool.on}")
                    start = time.perf_counter()
                    row = {"tool": name, "title": tool.title, "on": tool.on, "aim": tool.aim}
                    row |= _measured(name, fields, sizes, device, limits)
                    lines[name] = {"done": name, "seconds": time.perf_counter() - start, "row": row}
                    journal.write(**lines[name])
                    written(interrupted=True)
                progress.advance(task)
        except KeyboardInterrupt:
            pass
    results = written(interrupted=len(lines) < len(chosen))
    console.print(terminal_table(results))
    return results


def _measured(name: str, fields: Fields, sizes: Sizes, device: str, limits: Limits) -> Row:
    """The figures of `measure_tool`, or why there are none."""
    arguments = (name, fields, sizes, device, limits.timing)
    try:
        if torch.device(device).type == "cpu":
            return in_own_process(measure_tool, *arguments, memory=limits.memory, seconds=limits.first_call)
        return measure_tool(*arguments)
    except TrialError as error:
        return {"status": "failed", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": describe(error)}


def measure_tool(name: str, fields: Fields, sizes: Sizes, device: str, seconds: float) -> Row:
    """Time and peak memory of one tool, in this process, which on a CPU is to be a fresh one; then beside the same by hand.

    Args:
        name: of `tools`.
        fields, sizes: what the tool works on.
        device: as torch names it.
        seconds: for which calls after the first are timed; one is always.
    """
    tool = tools(sizes, fields)[name]
    peak = PeakMemory(device)
    given = Given(fields, sizes, device)
    call = tool.prepare(given)

    def finished():
        result = call()
        synchronize(device)
        return result

    start = time.perf_counter()
    result = finished()
    first = time.perf_counter() - start
    figures = tool.read(result)
    del result
    peak.start()
    timing = Timing.of(turns_by_the_clock({name: finished}, seconds, least=1, most=100)[name])
    peak_bytes = peak.bytes()
    hand = {}
    if tool.by_hand is not None:
        other = tool.by_hand(given)
        other()
        turns = turns_by_the_clock({"tool": finished, "hand": other}, seconds, least=1, most=100)
        both = {key: Timing.of(times).median for key, times in turns.items()}
        hand = {"hand": tool.hand, "hand_seconds": both["hand"], "hand_times_as_long": both["hand"] / both["tool"]}
    return {
        "status": "measured",
        "first_seconds": first,
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "repeats": timing.repeats,
        "peak_bytes": peak_bytes,
        "figures": figures,
        **hand,
    }


_HEADER = ("tool", "on", "first call", "later call", "peak memory", "aim", "besides", "by hand")

_NOTES = """\
* The first call compiles kernels, or loads those that an earlier run has left on disk. *Later call* is the median of the calls
  after it.
* Peak memory is what the later calls take beyond what a fresh process had before the inputs were made: inputs, results, and
  code that the first call compiled or loaded included. It is resident memory; on a GPU what torch allocated.
* The raster is a Matérn field of range 10 pixels, of which 70 % are not seen and the rest with noise. *By hand* is another way
  to the same, in turns with the tool in the same process, after its memory was read: how many times as long it takes (more
  than 1: longer), its time, and what it is.
* float32, rasters in float64; eigenpairs and the systems of the conditional means are solved in float64 inside. Iterations are
  those of conjugate gradients, until the last of the images has converged.
* Aims are the project's; those of time are for 2 CPU cores. The factor of the large grid is random: no cost there depends on
  its values.
"""


def markdown_report(results: Results) -> str:
    """The table, on what, and how it was measured."""
    rows = markdown_table(_HEADER, [_cells(row) for row in results["tools"]], text_columns=2)
    small = f"Small grids: {results['fields']}."
    return f"# Costs of the toolbox\n\n{about(results)}\n{small}\n\n{rows}\n## How it was measured\n\n{_NOTES}"


def terminal_table(results: Results) -> Table:
    """The same table; of what is done by hand only how many times as long it takes."""
    cells = [_cells(row) for row in results["tools"]]
    return table(results, _HEADER, [[*row[:-1], row[-1].partition(",")[0]] for row in cells], text_columns=2)


def _cells(row: Row) -> list[str]:
    if row["status"] != "measured":
        return [row["title"], row["on"], "", "", "", row["aim"], row["reason"], ""]
    besides = ", ".join(f"{name} {value:.3g}" for name, value in row["figures"].items())
    times = [f"{row[name]:.3g} s" for name in ("first_seconds", "seconds")]
    hand = f"{row['hand_times_as_long']:.2f} ×, {row['hand_seconds']:.3g} s: {row['hand']}" if "hand" in row else ""
    return [row["title"], row["on"], *times, _memory_text(row["peak_bytes"]), row["aim"], besides, hand]


def _memory_text(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size * 1024 / GIB:.0f} MiB"
