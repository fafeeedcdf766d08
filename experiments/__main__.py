"""``python -m experiments NAME``: one command for each experiment."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Experiments with structured uncertainty."""


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.", show_default="results/demo-DATE-TIME")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    patches: Annotated[int, typer.Option(min=1, help="Number of training patches.")] = 24_000,
    autoencoder_steps: Annotated[int, typer.Option(min=1, help="Training steps of the autoencoder.")] = 800,
    covariance_steps: Annotated[int, typer.Option(min=1, help="Training steps of each covariance network.")] = 800,
) -> None:
    """Train on photographs of scikit-image and show what the structured covariance has learned."""
    try:
        # Imported here: torch and matplotlib take seconds, and Ctrl-C has its meaning then too.
        from rich.console import Console

        from .demo import DemoConfig, InterruptedRunError, run
        from .results import new_results_folder

        try:
            folder = new_results_folder("demo", out)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from None
        config = DemoConfig(seed=seed, patches=patches, autoencoder_steps=autoencoder_steps, covariance_steps=covariance_steps)
        try:
            run(config, folder, Console())
        except InterruptedRunError as interrupted:
            typer.echo(f"Interrupted: {interrupted}", err=True)
            raise typer.Exit(130) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    typer.echo(f"Results: {folder}")


class Preset(StrEnum):
    """Sizes of the synthetic experiments."""

    QUICK = "quick"
    PAPER = "paper"


_PresetOption = Annotated[Preset, typer.Option(help="quick: minutes on two cores; paper: the paper's size.")]
_OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the results, new or empty; with --resume that of the run to go on with.",
        show_default="results/NAME-DATE-TIME",
    ),
]
_ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out, to the same numbers.")]
_DeviceOption = Annotated[str | None, typer.Option(help="Torch's name of the device.", show_default="cuda if there is one")]
_TrainOption = Annotated[int | None, typer.Option(min=1, help="Training signals.", show_default="the preset's")]
_TestOption = Annotated[int | None, typer.Option(min=2, help="Test signals.", show_default="the preset's")]
_EpochsOption = Annotated[int | None, typer.Option(min=1, help="Epochs of every network.", show_default="the preset's")]
_SeedsOption = Annotated[int | None, typer.Option(min=1, help="Networks of each kind.", show_default="the preset's")]
_SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same numbers.", show_default="the preset's")]


@app.command()
def splines(
    preset: _PresetOption = Preset.QUICK,
    out: _OutOption = None,
    resume: _ResumeOption = False,
    device: _DeviceOption = None,
    seed: _SeedOption = None,
    train: _TrainOption = None,
    test: _TestOption = None,
    epochs: _EpochsOption = None,
    seeds: _SeedsOption = None,
) -> None:
    """Recover the known covariance of splines with correlated noise: Table 1, Figures 3 and 4 of the SUPN paper."""
    _known_covariance("splines", preset, out, resume, device, seed=seed, train=train, test=test, epochs=epochs, seeds=seeds)


@app.command()
def ellipses(
    preset: _PresetOption = Preset.QUICK,
    out: _OutOption = None,
    resume: _ResumeOption = False,
    device: _DeviceOption = None,
    seed: _SeedOption = None,
    train: _TrainOption = None,
    test: _TestOption = None,
    epochs: _EpochsOption = None,
    seeds: _SeedsOption = None,
) -> None:
    """Recover the known covariance of images of ellipses: Table 2, Figures 5 and 6 of the SUPN paper."""
    _known_covariance("ellipses", preset, out, resume, device, seed=seed, train=train, test=test, epochs=epochs, seeds=seeds)


def _known_covariance(
    experiment: str, preset: Preset, out: Path | None, resume: bool, device: str | None, **sizes: int | None
) -> None:
    try:
        import torch
        from rich.console import Console

        from .known_covariance.presets import config_for
        from .known_covariance.run import check_resumable, run, start
        from .results import new_results_folder

        try:
            config = config_for(experiment, preset.value, **sizes)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            raise typer.BadParameter(str(error), param_hint="--device") from None
        if resume and out is None:
            raise typer.BadParameter("--resume needs the folder of the run to go on with", param_hint="--out")
        try:
            if resume:
                check_resumable(config, out)
                folder = out
            else:
                folder = new_results_folder(experiment, out)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from None
        if not resume:
            start(config, folder)
        try:
            run(config, folder, where, Console())
        except KeyboardInterrupt:
            typer.echo(f"Interrupted: the same command with --out {folder} --resume goes on from there", err=True)
            raise typer.Exit(130) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    typer.echo(f"Results: {folder}")


@app.command()
def calibrate() -> None:
    """The scalars of both covariances for which the paper's rows of the truth and of the diagonal come out."""
    from .known_covariance.calibration import calibrate, evenly_spread_latents, expected_rows, paper_rows
    from .known_covariance.presets import SIGNALS

    for name, family in SIGNALS.items():
        calibrated = calibrate(name, family(), count=1024)
        typer.echo(f"{calibrated}")
        rows = expected_rows(calibrated, evenly_spread_latents(calibrated, 1024))
        for row, value in paper_rows(name).items():
            typer.echo(f"    {row:14} {rows[row]:9.3f}, in the paper {value:g}")


@app.command()
def gallery(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.", show_default="results/gallery-DATE-TIME")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    size: Annotated[int, typer.Option(min=16, max=256, help="Height and width of the images in pixels.")] = 256,
) -> None:
    """Samples of factors constructed from precisions, a covariance function, and photographs."""
    from rich.console import Console

    from .gallery import GalleryConfig, run
    from .results import new_results_folder

    try:
        folder = new_results_folder("gallery", out)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    run(GalleryConfig(seed=seed, size=size), folder, Console())
    typer.echo(f"Results: {folder}")


if __name__ == "__main__":
    app(prog_name="python -m experiments")
