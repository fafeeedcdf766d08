"""How every command of the programs ends: on Ctrl-C, on bad input, and when it is done.

Nothing here imports torch: Ctrl-C has its meaning while a command imports it, and ``--help`` does not wait for it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

import typer

from .files import printable

INTERRUPTED = 130  # the exit status that a shell gives a program ended by Ctrl-C

Arguments = ParamSpec("Arguments")


class InterruptedRunError(Exception):
    """A run was interrupted. The message says what is left of it, or how to go on."""


def interruptible(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The same command, which Ctrl-C ends with status 130 and without a traceback."""

    @functools.wraps(command)
    def ended(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            return command(*args, **kwargs)
        except InterruptedRunError as interrupted:
            typer.echo(printable(f"Interrupted: {interrupted}"), err=True)
        except KeyboardInterrupt:
            pass
        raise typer.Exit(INTERRUPTED)

    return ended


@contextmanager
def errors_of(option: str | None = None, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Within it an error of this kind is the user's: the command ends with status 2 and the error's message.

    Args:
        option: what was wrong, as ``--out``; None where the message says it.
        kind: the errors that are meant; all others pass.
    """
    try:
        yield
    except kind as error:
        raise typer.BadParameter(printable(error), param_hint=option) from None


def finish(place: Path, interrupted: bool = False, what: str = "Results") -> None:
    """Say where the results are; with status 130 if Ctrl-C ended the run before it was complete."""
    typer.echo(printable(f"{what}: {place}"))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
