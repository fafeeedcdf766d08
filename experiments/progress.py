"""Progress bars with examples per second and the time left."""

from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from programs.progress import progress_bar

Batch = TypeVar("Batch")


def batches_bar(console: Console | None, *columns: ProgressColumn) -> Progress:
    """A bar of batches, with ``columns`` behind their number; each task has a field ``batch``, the examples in a batch.

    Args:
        console: where it is shown; None for nowhere.
        columns: others to show.
    """
    behind = (*columns, _ExamplesPerSecond(), TimeRemainingColumn(elapsed_when_finished=True))
    return progress_bar(console, *behind, before=(TextColumn("{task.description:28}"),))


def tracked(batches: Collection[Batch], examples: int, title: str, console: Console | None) -> Iterator[Batch]:
    """``batches`` one by one, with a bar.

    Args:
        batches: anything that can be counted.
        examples: in a batch, all processes together.
        title: shown beside the bar.
        console: where it is shown; None for nowhere.
    """
    with batches_bar(console) as progress:
        task = progress.add_task(title, total=len(batches), batch=examples)
        for batch in batches:
            yield batch
            progress.advance(task)


class _ExamplesPerSecond(ProgressColumn):
    """How many examples all processes together take per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * task.fields['batch']:,.0f}/s")
