"""The report of ``python -m bench`` in Markdown and as a table on the terminal: which stencil, the peers, all rows."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
from rich.table import Table

from programs.environment import machine_text
from programs.tables import markdown_table

from .cases import parse_stencil
from .measure import GIB
from .operations import OPERATIONS
from .results import Results, about
from .rows import Row

# What a user would ask first: a batch of 16 images of 256 x 256.
_ASKED = {"grid": [256, 256], "batch": 16}

_NOTES = """\
* Every result was compared with the reference (plain torch) before it was timed; a wrong one would be under "Not measured".
* Time is the median and its quartiles. On a CPU the library, its peers, and reading (`sum`) and copying (`copy_`) the
  coefficients take turns within one process. A turn is a loop of a millisecond, after a call that does not count, so all are
  hot; `python -m bench calls` tells what cold calls cost. On a GPU `triton.testing.do_bench` times one after the other.
* Bytes are the fewest that must move: the coefficients once for a likelihood or a sample, once more for each gradient of them
  that is written and each further triangular solve, and every vector once. *Of copy* is the bandwidth that these bytes and
  the time make, as a fraction of that of `copy_`, which reads and writes, on the same coefficients. A few MiB of coefficients
  stay in the cache, for the copy too: there the fraction says little, and the time of a call that does nothing counts.
* White noise is drawn before a sample is timed. Gradients are with respect to the factor.
* Peak memory is what one call in a fresh process takes beyond what the process had before: its inputs (a peer's in the peer's
  own format) and results included, to within a few MiB, or tens where a kernel is compiled at its first use. It is resident
  memory; on a GPU what torch allocated.
* Conversion to a peer's format is not in its time. For cholespy it holds a factorisation.
"""


def measured(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with a time whose entries have these values."""
    return [row for row in rows if row["status"] == "measured" and all(row[key] == value for key, value in values.items())]


def headline_case(results: Results) -> dict[str, Any] | None:
    """Grid and batch of the images nearest in size to those asked for, of several stencils if there are such.

    Among the 2-axis float32 cases with one sample for each image; None if there are none.
    """
    rows = measured(results["rows"], implementation=results["backend"], samples=1, dtype="float32")
    stencils: dict[tuple[tuple[int, ...], int], set[str]] = {}
    for row in rows:
        if len(row["grid"]) == 2:
            stencils.setdefault((tuple(row["grid"]), row["batch"]), set()).add(row["stencil"])
    if not stencils:
        return None
    grid, batch = min(stencils, key=lambda shape: (len(stencils[shape]) == 1, _distance(*shape)))
    return {"grid": list(grid), "batch": batch}


def _distance(grid: tuple[int, ...], batch: int) -> float:
    """How far the images are from those asked for, in size and in number."""
    sizes, numbers = math.prod(grid) / math.prod(_ASKED["grid"]), batch / _ASKED["batch"]
    return abs(math.log(sizes)) + abs(math.log(numbers))


def case_text(row: Row) -> str:
    """The images of a case, its dtype and its samples; not its stencil."""
    text = " × ".join(map(str, (row["batch"], *row["grid"])))
    text += f", {row['samples']} samples each" if row["samples"] > 1 else ""
    return text + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def terminal_table(results: Results) -> Table:
    """All rows, case by case, without what the report alone has room for."""
    table = Table(title=machine_text(results), box=rich.box.SIMPLE_HEAD)
    table.add_column("operation", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for name in _SHOWN:
        table.add_column(name, justify="right", no_wrap=True)
    rows = _by_case(results["rows"])
    for case in dict.fromkeys(map(_case, rows)):
        own = [row for row in rows if _case(row) == case]
        table.add_section()
        table.add_row(f"[bold]{own[0]['stencil']}, {case_text(own[0])}[/bold]")
        for row in own:
            done = row["status"] == "measured"
            by = row["title"] if done else f"{row['title']}: {row['reason']}"
            table.add_row(f"  {row['operation']}", by, *(_FIGURES[name](row) for name in _SHOWN if done))
    return table


def quality_table(results: Results) -> Table | None:
    """Nats per pixel of each stencil beside the milliseconds of what was timed, or None where none was judged."""
    quality, case = results["quality"], headline_case(results)
    if not quality or not quality["scores"]:
        return None
    title = f"{quality['patches']} held-out patches of photographs; nats per pixel, lower is better"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    rows = [] if case is None else _headline_rows(results, case)
    operations = [name for name in OPERATIONS if any(row["operation"] == name for row in rows)]
    table.add_column("stencil", no_wrap=True)
    for name in ("K", "nats\nper pixel", "gain over\nsmallest", *(f"{name}\nms" for name in operations)):
        table.add_column(name, justify="right", no_wrap=True)
    for score in quality["scores"]:
        own = {row["operation"]: row for row in rows if row["stencil"] == score["stencil"]}
        milliseconds = (_milliseconds(own[name]) if name in own else "" for name in operations)
        size = 1 + len(parse_stencil(score["stencil"]))
        table.add_row(score["stencil"], str(size), *_quality_cells(score), *milliseconds)
    return table


def _headline_rows(results: Results, case: dict[str, Any]) -> list[Row]:
    """The library's own rows of the case by which stencils are compared."""
    return measured(results["rows"], implementation=results["backend"], samples=1, dtype="float32", **case)


def markdown_report(results: Results, plots: Sequence[str]) -> str:
    """The report: which stencil to use, the plots, the peers, every row, and how it was measured.

    Args:
        results: as in results.json.
        plots: names of the plots that stand beside it.
    """
    parts = [f"# Speed of banded-gmrf: {results['preset']}\n\n{about(results)}"]
    if stencils := _stencil_table(results):
        parts.append(f"## Which stencil?\n\n{stencils}")
    parts += [f"![{_PLOTS[name]}]({name})\n\n*{_PLOTS[name]}.*\n" for name in plots]
    if peers := _peer_table(results):
        parts.append(f"## Against other software\n\n{peers}")
    parts.append(f"## All measurements\n\n{_row_table(results)}")
    if others := _not_measured(results):
        parts.append(f"## Not measured\n\n{others}")
    parts.append(f"## How it was measured\n\n{_NOTES}")
    return "\n".join(parts)


_PLOTS = {
    "quality.png": "How well each stencil models photographs, against what it costs; bars: standard error of the gain over the "
    "smallest stencil",
    "time.png": "Time per pixel (solid) against copying the coefficients (dotted)",
    "bandwidth.png": "Bandwidth as a fraction of that of a copy; 1 is as fast as memory allows",
    "peers.png": "How many times as long other software takes for the same work",
}


def _stencil_table(results: Results) -> str | None:
    case = headline_case(results)
    if case is None:
        return None
    rows = _headline_rows(results, case)
    operations = [name for name in OPERATIONS if any(row["operation"] == name for row in rows)]
    scores = {score["stencil"]: score for score in (results["quality"] or {"scores": []})["scores"]}
    header = ["stencil", "K", *(f"{OPERATIONS[name].title}, ms" for name in operations), "peak memory, MiB"]
    header += ["nats per pixel", "gain over smallest"] if scores else []
    lines = []
    for stencil, size in sorted(
        {(row["stencil"], row["num_coefficients"]) for row in rows}, key=lambda pair: (pair[1], pair[0])
    ):
        own = {row["operation"]: row for row in rows if row["stencil"] == stencil}
        line = [stencil, str(size), *(_milliseconds(own[name]) if name in own else "" for name in operations)]
        line.append(_mebibytes(max(row.get("peak_bytes") or 0 for row in own.values())))
        if scores:
            score = scores.get(stencil)
            line += _quality_cells(score) if score else ["", ""]
        lines.append(line)
    text = f"{case['batch']} images of {' × '.join(map(str, case['grid']))} pixels, on the {results['backend']} backend:\n\n"
    text += markdown_table(header, lines)
    text += "\nPeak memory is the largest of these operations'.\n"
    if scores:
        quality = results["quality"]
        patches = f"{quality['patches']} held-out patches of {quality['patch_size']} × {quality['patch_size']} pixels"
        text += (
            f"\nNats per pixel are {quality['definition']}; lower is better. They are the mean over {patches} under a "
            "stationary factor, fitted in closed form to other patches; pixels at the border have the columns that are best "
            "for the neighbours they have, and factors whose own samples grow more than fourfold across a patch are damped. "
            f"The gain is patch by patch. Photographs: {quality['photographs']}.\n"
        )
    return text


def _quality_cells(score: dict[str, Any]) -> list[str]:
    return [
        f"{score['nats_per_pixel']:.3f} ± {score['nats_per_pixel_standard_error']:.3f}",
        f"{score['gain_over_smallest']:.3f} ± {score['gain_over_smallest_standard_error']:.3f}",
    ]


def _peer_table(results: Results) -> str | None:
    lines = []
    for row in _by_case(measured(results["rows"], peer=False)):
        for name, ratio in row.get("peers", {}).items():
            peer = next(other for other in results["rows"] if _work(other) == _work(row) and other["implementation"] == name)
            conversion, why = _milliseconds_of(peer["conversion_seconds"]), why_slower(row, peer)
            about = [f"{row['stencil']}, {case_text(row)}", OPERATIONS[row["operation"]].title, peer["title"]]
            lines.append([*about, _milliseconds(row), _milliseconds(peer), f"{ratio:.3g}", conversion, why])
    if not lines:
        return None
    header = ["case", "operation", "peer", "banded-gmrf, ms", "peer, ms", "times as long", "conversion, ms", "why not faster"]
    slower = sum(bool(line[-1]) for line in lines)
    text = f"{len(lines)} rows; other software is faster in {slower or 'none'} of them.\n\n"
    return text + markdown_table(header, lines, text_columns=3) + (f"\n{_TRIED}" if slower else "")


_TRIED = """\
*The call* is what the same operation takes on an image of one pixel, in the same turns: checks in Python, memory for the
result, autograd where gradients are asked for. Tried against it: a call passes torch's dispatcher by while nothing intervenes,
the checks of shapes and the kernels' plans are remembered, canonical tensors go to the kernel as they are. Of what is left each
part takes about a microsecond: [what a call costs](../calls/results.md).
"""


def why_slower(row: Row, peer: Row) -> str:
    """Why the peer is faster, from what was measured; empty if it is not."""
    if peer["seconds"] >= row["seconds"]:
        return ""
    call, pixels = row["call_seconds"], max(0.0, row["seconds"] - row["call_seconds"])
    text = f"the call takes {_milliseconds_of(call)} ms, the pixels {_milliseconds_of(pixels)}"
    if pixels < peer["seconds"]:
        return text
    return f"{text}: more than all of the peer"


def _row_table(results: Results) -> str:
    lines = []
    for row in _by_case(measured(results["rows"])):
        about = [f"{row['stencil']}, {case_text(row)}", str(row["num_coefficients"]), row["operation"], row["title"]]
        lines.append([*about, *(figure(row) for figure in _FIGURES.values())])
    return markdown_table(["stencil, images", "K", "operation", "by", *_FIGURES], lines, text_columns=4)


def _not_measured(results: Results) -> str | None:
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in results["rows"]:
        if row["status"] != "measured":
            reasons.setdefault((row["title"], row["reason"]), []).append(row)
    lines = []
    for (title, reason), rows in reasons.items():
        works = sorted({f"{row['operation']} of {row['stencil']}, {case_text(row)}" for row in rows})
        lines.append(f"* {title}: {reason}" + (f" ({'; '.join(works)})" if rows[0]["status"] == "failed" else "") + "\n")
    return "".join(lines) or None


def _by_case(rows: Iterable[Row]) -> list[Row]:
    """Rows of one case together, what reads and copies first; otherwise as measured."""
    rows = list(rows)
    order = {case: number for number, case in enumerate(dict.fromkeys(_case(row) for row in rows))}
    return sorted(rows, key=lambda row: (order[_case(row)], row["implementation"] != "torch"))


def _case(row: Row) -> tuple[Any, ...]:
    return row["stencil"], tuple(row["grid"]), row["batch"], row["samples"], row["dtype"], row["device"]


def _work(row: Row) -> tuple[Any, ...]:
    return *_case(row), row["operation"]


def identity(row: Row) -> tuple[Any, ...]:
    """What makes it the same row in another run."""
    return *_work(row), row["implementation"]


def _milliseconds_of(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _milliseconds(row: Row) -> str:
    return _milliseconds_of(row["seconds"])


def _mebibytes(size: int | None) -> str:
    return "" if not size else f"{size * 1024 / GIB:.3g}" if size < GIB else f"{size * 1024 / GIB:.0f}"


_FIGURES = {
    "ms": _milliseconds,
    "quartiles": lambda row: f"{_milliseconds_of(row['seconds_low'])}–{_milliseconds_of(row['seconds_high'])}",
    "MiB moved": lambda row: _mebibytes(row["bytes"]),
    "GB/s": lambda row: f"{row['bandwidth'] / 1e9:.3g}",
    "of copy": lambda row: f"{row['fraction_of_copy']:.2f}",
    "/ sum": lambda row: f"{row['times_sum']:.3g}",
    "/ copy_": lambda row: f"{row['times_copy']:.3g}",
    "ns/pixel": lambda row: f"{row['seconds_per_pixel'] * 1e9:.3g}",
    "peak MiB": lambda row: _mebibytes(row.get("peak_bytes")),
    "× library": lambda row: f"{row['times_library']:.3g}" if row["peer"] and "times_library" in row else "",
}

_SHOWN = ("ms", "GB/s", "of copy", "ns/pixel", "peak MiB", "× library")
