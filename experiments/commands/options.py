"""Options that several commands have, and the folder of a run that can be resumed."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from programs.commands import InterruptedRunError, errors_of

Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the results, new or empty; with --resume that of the run to go on with.",
        show_default="results/NAME-DATE-TIME",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out, to the same numbers.")]
Device = Annotated[str | None, typer.Option(help="Torch's name of the device.", show_default="cuda if there is one")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same numbers.", show_default="the preset's")]
Train = Annotated[int | None, typer.Option(min=1, help="Training examples.", show_default="the preset's")]
Test = Annotated[int | None, typer.Option(min=2, help="Test examples.", show_default="the preset's")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs of every network.", show_default="the preset's")]


def device_option(name: str | None):
    """The torch.device of ``--device``."""
    from programs.devices import usable_device

    with errors_of("--device"):
        return usable_device(name)


def run_folder(config, out: Path | None, resume: bool, device) -> Path:
    """The folder of a run that begins, or of one that can go on."""
    from programs.files import new_folder

    from ..results import begin_run, check_resumable

    with errors_of("--out"):
        if resume and out is None:
            raise ValueError("--resume needs the folder of the run to go on with")
        if resume:
            check_resumable(config, out, device)
            return out
        folder = new_folder(config.experiment, out)
    begin_run(config, folder, device)
    return folder


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Within it Ctrl-C leaves a run that can go on, and says how."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"the same command with --out {shlex.quote(str(folder))} --resume goes on from there"
        ) from None
