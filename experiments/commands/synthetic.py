"""The experiments with a covariance that is known: splines, ellipses, their report and their calibration."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from programs.commands import errors_of, finish

from . import options


class Preset(StrEnum):
    """Sizes of the synthetic experiments."""

    QUICK = "quick"
    PAPER = "paper"


_Preset = Annotated[Preset, typer.Option(help="quick: minutes on two cores; paper: the paper's size.")]
_Seeds = Annotated[int | None, typer.Option(min=1, help="Networks of each kind.", show_default="the preset's")]


def known_covariance(experiment: str) -> Callable[..., None]:
    """The command of "splines" or "ellipses"."""

    def command(
        preset: _Preset = Preset.QUICK,
        out: options.Out = None,
        resume: options.Resume = False,
        device: options.Device = None,
        seed: options.Seed = None,
        train: options.Train = None,
        test: options.Test = None,
        epochs: options.Epochs = None,
        seeds: _Seeds = None,
    ) -> None:
        from rich.console import Console

        from ..known_covariance.presets import config_for
        from ..known_covariance.run import run_known_covariance

        with errors_of():
            config = config_for(experiment, preset.value, seed=seed, train=train, test=test, epochs=epochs, seeds=seeds)
        where = options.device_option(device)
        folder = options.run_folder(config, out, resume, where)
        with options.resumable(folder):
            run_known_covariance(config, folder, where, Console())
        finish(folder)

    return command


def report(folder: Annotated[Path, typer.Argument(help="The results of a finished run of splines or ellipses.")]) -> None:
    """Write the table and the figures of a finished run again, from its numbers and networks."""
    from ..known_covariance.run import write_report_again

    with errors_of("FOLDER"):
        write_report_again(folder)


def calibrate() -> None:
    """The scalars of both covariances for which the paper's rows of the truth and of the diagonal come out."""
    from ..known_covariance.calibration import calibrate, evenly_spread_latents, expected_rows, paper_rows
    from ..known_covariance.presets import SIGNALS

    for name, family in SIGNALS.items():
        calibrated = calibrate(name, family(), count=1024)
        typer.echo(f"{calibrated}")
        rows = expected_rows(calibrated, evenly_spread_latents(calibrated, 1024))
        for row, value in paper_rows(name).items():
            typer.echo(f"    {row:14} {rows[row]:9.3f}, in the paper {value:g}")
