"""``python -m bench calls``: the fixed cost of a call at each layer, and what a sample costs beside its solve.

Small images show what stands around a kernel. Operations are called at the layers at which users can call them:

* backend: the function of the backend's module, which allocates the result and runs the kernel;
* operator: the operator that is registered with torch, which dispatches to the backend;
* function: the public function, or the method of a factor, which checks its arguments;
* distribution: the method of `banded_gmrf.GMRF`.

*Hot* calls follow others of their kind in a loop. *Cold* ones come after a pause, as in a program that does other things in
between. All calls of a group take turns, so that a change in the machine's speed meets all of them.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gmrf_kernels import backends
from programs.tables import markdown_table

from .call_groups import (
    Call,
    Group,
    constructions,
    fixed_costs,
    low_rank_densities,
    samples_beside_solves,
    samples_of_one_factor,
)
from .cases import DTYPES, Case, Problem
from .measure import BURST, Timing, describe, synchronize, turns_by_the_clock
from .operations import Tensors, difference, tolerance
from .presets import Sweep, override, plan
from .report import case_text
from .results import Results, about, environment, progress_bar, table, write_results
from .rows import Row

# Of the hot calls' number and time, for cold ones: each costs a pause.
_COLD_SHARE = 0.1


@dataclass(frozen=True)
class Sizes:
    """What is called, and how often.

    Attributes:
        small: one image or a few, for fixed costs and constructions.
        samples: few coefficients and many, for samples beside solves.
        shared: one factor that several samples share.
        low_rank: fields with and without whole-grid factors.
        pause: seconds before a cold call.
        seconds: for which each call is timed hot; a tenth of them cold, without the pauses.
        most: hot calls of each, at most.
    """

    small: tuple[Case, ...]
    samples: tuple[Case, ...]
    shared: tuple[Case, ...]
    low_rank: tuple[Case, ...]
    pause: float = 2e-3
    seconds: float = 1.0
    most: int = 1000


def default_sizes(device: str) -> Sizes:
    """The cases on which the project's aims for calls and samples are stated."""
    small = (Case("3", (64, 64), 1), Case("7", (64, 64), 1), Case("5", (32, 32), 16))
    many = (Case("7", (64, 64), 64), Case("7", (1024, 1024), 8))
    samples = (Case("7", (64, 64), 1), *many, *(replace(case, dtype="float64") for case in many))
    shared = (Case("7", (1024, 1024), 1, samples=16),)
    low_rank = tuple(Case(stencil, (64, 64), batch) for stencil in ("3", "7") for batch in (1, 32))
    return Sizes(*(tuple(replace(case, device=device) for case in cases) for cases in (small, samples, shared, low_rank)))


def chosen_sizes(given: dict[str, str | None], device: str) -> Sizes:
    """All calls on each case that the command line describes, with 16 samples where they share a factor.

    Raises:
        ValueError: a value that does not exist, or no case at all.
    """
    cases = tuple(dict.fromkeys(work.case for work in plan([override(Sweep(operations=("sample",)), given)], device)))
    return Sizes(cases, cases, tuple(replace(case, samples=16) for case in cases), cases)


def groups(problem: Problem, sizes: Sizes) -> Iterator[Group]:
    """All groups of a case."""
    for cases, make in (
        (sizes.small, fixed_costs),
        (sizes.small, constructions),
        (sizes.samples, samples_beside_solves),
        (sizes.shared, samples_of_one_factor),
        (sizes.low_rank, low_rank_densities),
    ):
        if problem.case in cases:
            yield from make(problem)


def run_calls(sizes: Sizes, device: str, folder: Path, console: Console) -> Results:
    """Time all calls, write results.json and results.md into ``folder``, and show the table.

    Args:
        sizes: see `Sizes`.
        device: as torch names it.
        folder: an empty folder.
        console: for the progress bar and the table.

    Returns:
        What results.json holds; ``interrupted`` says whether Ctrl-C ended the measuring.
    """
    start = time.perf_counter()
    rows, interrupted = [], False
    cases = list(dict.fromkeys((*sizes.small, *sizes.samples, *sizes.shared, *sizes.low_rank)))
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases))
        try:
            for case in cases:
                problem = Problem(case)
                for group in groups(problem, sizes):
                    progress.update(task, description=f"{case}: {group.title}")
                    rows += measure_group(group, case, sizes)
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    results = {
        "backend": backends.default_backend(torch.device(device)),
        "pause": sizes.pause,
        **environment(device),
        "interrupted": interrupted,
        "seconds": time.perf_counter() - start,
        "calls": rows,
    }
    write_results(folder, results, markdown_report(results))
    console.print(terminal_table(results))
    return results


def measure_group(group: Group, case: Case, sizes: Sizes) -> list[Row]:
    """A row for each call of a group: its time hot and cold, and both as multiples of the unit's.

    A call that fails, or whose result is another than that of the unit, has a row that says why, and no time.
    """
    about = case.to_json() | {"group": group.title, "unit": group.unit}
    rows = {name: about | {"call": name, "aim": group.aims.get(name, "")} for name in group.calls}
    runs, expected = {}, None
    for name, call in group.calls.items():
        try:
            result = call()  # compiles, or loads what an earlier run compiled
            if group.alike:
                expected = result if expected is None else expected
                off = difference(_tensors(result), _tensors(expected))
                if off > tolerance(DTYPES[case.dtype]):
                    raise ArithmeticError(f"off by {off:.1e} of the largest value of {group.unit}")
        except Exception as error:
            rows[name] |= {"status": "failed", "reason": describe(error)}
        else:
            runs[name] = _finished(call, case.device)
            rows[name]["status"] = "measured"
    most, least = sizes.most, 5
    hot = turns_by_the_clock(runs, sizes.seconds, least, most, burst=BURST)
    seconds, most = sizes.seconds * _COLD_SHARE, max(least, round(most * _COLD_SHARE))
    cold = turns_by_the_clock(runs, seconds, least, most, sizes.pause)
    for kind, times in (("hot", hot), ("cold", cold)):
        timings = {name: Timing.of(of_call) for name, of_call in times.items()}
        for name, timing in timings.items():
            rows[name][kind] = asdict(timing)
            if group.unit in timings:
                rows[name][kind]["ratio"] = timing.median / timings[group.unit].median
    return list(rows.values())


def _tensors(result: object) -> Tensors:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _finished(call: Call, device: str) -> Call:
    """The same call, which a GPU has done when it returns."""

    def run() -> None:
        call()
        synchronize(device)

    return run


_HEADER = ("stencil, images", "what", "call", "hot, µs", "cold, µs", "ratio, hot", "ratio, cold", "to", "aim")

_NOTES = """\
* Medians of turns, which all calls of a group take. Hot: a turn is a loop of a millisecond, after a call that does not count.
  Cold: it is one call, after the program has slept for {pause:g} ms.
* *Backend* allocates the result and runs the kernel; *operator* is what torch dispatches to the backend; *function* is the
  public function or method, which checks its arguments; *distribution* is the method of `banded_gmrf.GMRF`. Gradients are with
  respect to the factor: *backend* is both kernels, one after the other; *torch alone* is what autograd takes for a function of
  two tensors whose value and gradients are there already; *backend in torch* is such a function around the two kernels, without
  checks or protection of what it keeps. No call can be faster. It takes longer than the two others together: a kernel pushes
  Python's and torch's code out of the caches.
* Results of all layers were compared with each other before they were timed.
* *R* is the number of factors of a `banded_gmrf.LowRankGMRF`; gradients are with respect to L and the factors.
* *Numbers, then a solve* does what a sample does, but draws its normal numbers before, not inside of, the solve.
* Ratios are to the call that is named behind them, on the same images. Aims are the project's, for hot calls on a CPU.
"""


def markdown_report(results: Results) -> str:
    """The table, and how it was measured."""
    rows = markdown_table(_HEADER, [_cells(row) for row in results["calls"]], text_columns=3)
    notes = _NOTES.format(pause=results["pause"] * 1e3)
    return f"# What a call costs\n\n{about(results)}\n{rows}\n## How it was measured\n\n{notes}"


def terminal_table(results: Results) -> Table:
    """The same table."""
    return table(results, _HEADER, [_cells(row) for row in results["calls"]], text_columns=3)


def _cells(row: Row) -> list[str]:
    names = [f"{row['stencil']}, {case_text(row)}", row["group"], row["call"]]
    if row["status"] != "measured":
        return [*names, "", "", "", "", row["unit"], row["reason"]]
    times = [f"{row[kind]['median'] * 1e6:.3g}" for kind in ("hot", "cold")]
    ratios = [f"{row[kind]['ratio']:.2f}" if "ratio" in row[kind] else "" for kind in ("hot", "cold")]
    return [*names, *times, *ratios, row["unit"], row["aim"]]
