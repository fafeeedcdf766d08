"""The plots of a report. Each function writes one PNG file, or says that the run has nothing to show in it."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from programs.environment import machine_text

from .operations import OPERATIONS
from .peers import PEERS
from .report import case_text, headline_case, measured
from .results import Results
from .rows import Row

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "savefig.dpi": 150,
}


def draw(folder: Path, results: Results) -> list[str]:
    """Write the plots that the run has data for; return their names, the most telling first."""
    plots = {"quality.png": quality, "time.png": time_per_pixel, "bandwidth.png": bandwidth, "peers.png": peers}
    with mpl.rc_context(_STYLE):
        return [name for name, plot in plots.items() if plot(folder / name, results)]


def time_per_pixel(path: Path, results: Results) -> bool:
    """Nanoseconds per pixel against resolution, a line per stencil, a panel per operation."""
    return _against_resolution(path, results, "seconds_per_pixel", 1e9, "ns per pixel")


def bandwidth(path: Path, results: Results) -> bool:
    """The same for the fraction of the bandwidth of a copy."""
    return _against_resolution(path, results, "fraction_of_copy", 1, "fraction of the bandwidth of a copy")


def quality(path: Path, results: Results) -> bool:
    """Held-out nats per pixel of each stencil, and the standard error of its gain over the smallest, against milliseconds."""
    case = headline_case(results)
    if case is None or not results["quality"]:
        return False
    scores = {score["stencil"]: score for score in results["quality"]["scores"]}
    rows = measured(results["rows"], implementation=results["backend"], samples=1, dtype="float32", **case)
    rows = [row for row in rows if row["stencil"] in scores]
    operations = [name for name in ("log_prob_grad", "sample") if any(row["operation"] == name for row in rows)]
    if not operations or len({row["stencil"] for row in rows}) == 1:
        return False
    styles = _stencil_styles(rows)
    fig = Figure(figsize=(3.4 * len(operations) + 1.2, 3.2), layout="constrained")
    for ax, operation in zip(fig.subplots(1, len(operations), sharey=True, squeeze=False)[0], operations, strict=True):
        for row in sorted(measured(rows, operation=operation), key=lambda row: list(styles).index(row["stencil"])):
            label = f"{row['stencil']} (K = {row['num_coefficients']})"
            score = scores[row["stencil"]]
            nats, error = score["nats_per_pixel"], score["gain_over_smallest_standard_error"]
            ax.errorbar(row["seconds"] * 1e3, nats, error, **styles[row["stencil"]], linestyle="", capsize=3, label=label)
        ax.set_title(OPERATIONS[operation].title)
        ax.set_xlim(0, 1.1 * ax.get_xlim()[1])
        ax.margins(y=0.1)
        ax.set_xlabel(f"ms for {case['batch']} images of {' × '.join(map(str, case['grid']))}")
        ax.grid(alpha=0.3)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), title="stencil", loc="outside right upper")
    fig.axes[0].set_ylabel("held-out nats per pixel (lower is better)")
    _save(fig, path, results)
    return True


def peers(path: Path, results: Results) -> bool:
    """How many times as long each peer takes, a panel per case and a mark per operation."""
    rows = [row for row in measured(results["rows"], peer=False) if row.get("peers")]
    if not rows:
        return False
    cases = list(dict.fromkeys(f"stencil {row['stencil']}, {case_text(row)}" for row in rows))
    names = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    operations = [name for name in OPERATIONS if any(row["operation"] == name for row in rows)]
    marks = dict(zip(operations, itertools.cycle("osD^vP"), strict=False))
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    fig = Figure(figsize=(4.6 + 2.4 * across, 0.8 + down * (0.6 + 0.3 * len(names))), layout="constrained")
    axes = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for ax in axes[len(cases) :]:
        ax.set_axis_off()
    for ax, case in zip(axes, cases, strict=False):
        for row in rows:
            if f"stencil {row['stencil']}, {case_text(row)}" == case:
                shown = [name for name in names if name in row["peers"]]
                ratios = [row["peers"][name] for name in shown]
                color = f"C{operations.index(row['operation'])}"
                ax.plot(ratios, [names.index(name) for name in shown], marks[row["operation"]], color=color, alpha=0.85)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(_plain)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(case)
        ax.grid(alpha=0.3)
        ax.set_yticks(range(len(names)), [PEERS[name].title for name in names])
    low, high = axes[0].get_xlim()
    axes[0].set(xlim=(min(low, 0.5), max(high, 20)), ylim=(len(names) - 0.5, -0.5))
    fig.supxlabel("times as long as banded-gmrf for the same work", fontsize=9)
    handles = [
        Line2D([], [], marker=marks[name], color=f"C{i}", linestyle="", label=OPERATIONS[name].title)
        for i, name in enumerate(operations)
    ]
    fig.legend(handles=handles, loc="outside right upper")
    _save(fig, path, results)
    return True


def _against_resolution(path: Path, results: Results, figure: str, unit: float, label: str) -> bool:
    rows = _square_images(results)
    operations = [name for name in OPERATIONS if any(row["operation"] == name for row in rows)]
    if not operations:
        return False
    styles = _stencil_styles(rows)
    across = len(operations) if len(operations) <= 4 else 3  # more in a row cannot be read on a page
    down = -(-len(operations) // across)
    fig = Figure(figsize=(2.6 * across + 0.6, 3.0 * down + 0.2), layout="constrained")
    axes = fig.subplots(down, across, sharey=True, squeeze=False).ravel()
    for ax in axes[len(operations) :]:
        ax.set_axis_off()
    for ax, operation in zip(axes, operations, strict=False):
        for stencil, style in styles.items():
            line = sorted(measured(rows, operation=operation, stencil=stencil), key=lambda row: row["grid"])
            sides = [row["grid"][0] for row in line]
            ax.plot(sides, [row[figure] * unit for row in line], **style, markersize=4, label=stencil)
            if figure == "seconds_per_pixel":
                copies = [row["seconds_per_pixel"] / row["times_copy"] * unit for row in line]
                ax.plot(sides, copies, ":", color=style["color"], linewidth=1)
        ax.set_title(OPERATIONS[operation].title)
        sides = sorted({row["grid"][0] for row in rows})
        ax.set_xscale("log", base=2)
        ax.set_xticks(sides, [str(side) for side in sides])
        ax.xaxis.set_minor_locator(NullLocator())
        if figure == "seconds_per_pixel":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(_plain)
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    fig.supylabel(label, fontsize=9)
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, title="stencil", loc="outside right upper")
    images = rows[0]["batch"]
    fig.supxlabel(f"pixels along each side, {images} image{'s' * (images > 1)}", fontsize=9)
    _save(fig, path, results)
    return True


def _square_images(results: Results) -> list[Row]:
    """The library's rows on square images of the batch size with most resolutions; none if it has a single one."""
    rows = measured(results["rows"], implementation=results["backend"], samples=1, dtype="float32")
    rows = [row for row in rows if len(row["grid"]) == 2 and row["grid"][0] == row["grid"][1]]
    sides: dict[int, Counter[str]] = {}
    for stencil, batch, _ in {(row["stencil"], row["batch"], row["grid"][0]) for row in rows}:
        sides.setdefault(batch, Counter())[stencil] += 1
    batch = max(sides, key=lambda batch: (max(sides[batch].values()), len(sides[batch])), default=None)
    return measured(rows, batch=batch) if batch is not None and max(sides[batch].values()) > 1 else []


def _stencil_styles(rows: Iterable[Row]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each stencil, from the smallest to the largest: colours alone do not tell everyone."""
    stencils = sorted({(row["num_coefficients"], row["stencil"]) for row in rows})
    return {name: {"color": f"C{i}", "marker": "os^DvP*X"[i % 8]} for i, (_, name) in enumerate(stencils)}


def _plain(value: float, _: int) -> str:
    """Ticks of a logarithmic axis without powers of ten."""
    return f"{value:g}"


def _save(fig: Figure, path: Path, results: Results) -> None:
    fig.suptitle(machine_text(results), fontsize=8, color="0.4")
    fig.savefig(path)
