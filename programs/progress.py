"""The progress bar that the programs share."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn


def progress_bar(
    console: Console | None, *columns: ProgressColumn, before: Sequence[ProgressColumn] = (), transient: bool = False
) -> Progress:
    """A bar, and how much is done of how much.

    Args:
        console: where it is shown; None for nowhere.
        columns: what stands behind these two.
        before: what stands before them.
        transient: the bar vanishes at its end.
    """
    shown = (*before, BarColumn(), MofNCompleteColumn(), *columns)
    return Progress(*shown, console=console, transient=transient, disable=console is None)
