"""What got slower between two runs: ``python -m bench compare A.json B.json``."""

from rich.table import Table

from programs.environment import machine_text

from .report import case_text, identity, measured
from .results import Results
from .rows import Row


def slower_rows(before: Results, after: Results, threshold: float) -> list[tuple[Row, Row]]:
    """Rows whose time grew by more than ``threshold`` (0.1 is a tenth) and beyond the quartiles, worst first."""
    return sorted(
        ((a, b) for a, b in _pairs(before, after) if _grew(a, b, threshold)), key=lambda pair: _ratio(*pair), reverse=True
    )


def faster_rows(before: Results, after: Results, threshold: float) -> list[tuple[Row, Row]]:
    """The reverse: `slower_rows` of the runs exchanged."""
    return [(a, b) for b, a in slower_rows(after, before, threshold)]


def lost_rows(before: Results, after: Results) -> list[Row]:
    """Rows of the second run that failed and were measured in the first."""
    had = {identity(row) for row in measured(before["rows"])}
    return [row for row in after["rows"] if row["status"] == "failed" and identity(row) in had]


def comparison_table(title: str, pairs: list[tuple[Row, Row]]) -> Table:
    """Rows side by side; the last column says how the machine's own speed of copying changed meanwhile."""
    table = Table(title=title)
    for name in ("case", "operation", "by"):
        table.add_column(name)
    for name in ("before, ms", "after, ms", "ratio", "ratio of copy_"):
        table.add_column(name, justify="right")
    for a, b in pairs:
        copies = _copy_seconds(b) / _copy_seconds(a)
        times = (f"{a['seconds'] * 1e3:.3g}", f"{b['seconds'] * 1e3:.3g}", f"{_ratio(a, b):.2f}", f"{copies:.2f}")
        table.add_row(f"{a['stencil']}, {case_text(a)}", a["operation"], a["title"], *times)
    return table


def differences(before: Results, after: Results) -> list[str]:
    """What else differs between the runs, in sentences."""
    sentences = []
    if machine_text(before) != machine_text(after):
        sentences.append(f"Different machines: {machine_text(before)}; {machine_text(after)}.")
    changed = [
        f"{package} {old} → {after['versions'].get(package)}"
        for package, old in before["versions"].items()
        if after["versions"].get(package) != old
    ]
    if changed:
        sentences.append(f"Different versions: {', '.join(changed)}.")
    alone = {identity(row) for row in before["rows"]} ^ {identity(row) for row in after["rows"]}
    if alone:
        sentences.append(f"{len(alone)} rows are in one of the runs alone.")
    return sentences


def _pairs(before: Results, after: Results) -> list[tuple[Row, Row]]:
    """The rows that both measured, but reading and copying the coefficients."""
    old = {identity(row): row for row in measured(before["rows"])}
    new = [row for row in measured(after["rows"]) if row["implementation"] != "torch"]
    return [(old[identity(row)], row) for row in new if identity(row) in old]


def _grew(a: Row, b: Row, threshold: float) -> bool:
    return _ratio(a, b) > 1 + threshold and b["seconds_low"] > a["seconds_high"]


def _ratio(a: Row, b: Row) -> float:
    return b["seconds"] / a["seconds"]


def _copy_seconds(row: Row) -> float:
    return row["seconds"] / row["times_copy"]
