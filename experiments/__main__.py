"""``python -m experiments NAME``: one command for each experiment."""

from collections.abc import Callable
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
_TrainOption = Annotated[int | None, typer.Option(min=1, help="Training examples.", show_default="the preset's")]
_TestOption = Annotated[int | None, typer.Option(min=2, help="Test examples.", show_default="the preset's")]
_EpochsOption = Annotated[int | None, typer.Option(min=1, help="Epochs of every network.", show_default="the preset's")]
_SeedsOption = Annotated[int | None, typer.Option(min=1, help="Networks of each kind.", show_default="the preset's")]
_SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same numbers.", show_default="the preset's")]


def _add_known_covariance(experiment: str, about: str) -> None:
    @app.command(experiment, help=about)
    def command(
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
        replaced = {"seed": seed, "train": train, "test": test, "epochs": epochs, "seeds": seeds}
        try:
            from rich.console import Console

            from .known_covariance.presets import config_for
            from .known_covariance.run import run

            try:
                config = config_for(experiment, preset.value, **replaced)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            where = _device(device)
            folder = _begin(config, out, resume, where)
            _run(folder, lambda: run(config, folder, where, Console()))
            typer.echo(f"Results: {folder}")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


_add_known_covariance(
    "splines", "Recover the known covariance of splines with correlated noise: Table 1, Figures 3 and 4 of the SUPN paper."
)
_add_known_covariance(
    "ellipses", "Recover the known covariance of images of ellipses: Table 2, Figures 5 and 6 of the SUPN paper."
)


def _device(name: str | None):
    """The torch.device of that name, on which something can be computed."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name} is not a CPU or CUDA device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    return device


def _begin(config, out: Path | None, resume: bool, device) -> Path:
    """The folder of a run that begins, or goes on if it can."""
    from .results import check_resumable, new_results_folder, start

    if resume and out is None:
        raise typer.BadParameter("--resume needs the folder of the run to go on with", param_hint="--out")
    try:
        if resume:
            check_resumable(config, out, device)
            return out
        folder = new_results_folder(config.experiment, out)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    start(config, folder, device)
    return folder


def _run(folder: Path, run: Callable[[], object]) -> None:
    """Run; when interrupted say how to go on."""
    import shlex

    try:
        run()
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: the same command with --out {shlex.quote(str(folder))} --resume goes on from there", err=True)
        raise typer.Exit(130) from None


class ImagePreset(StrEnum):
    """Sizes of the experiments with real images."""

    QUICK = "quick"
    CPU = "cpu"
    PAPER = "paper"


_ImagePresetOption = Annotated[
    ImagePreset,
    typer.Option(
        help="quick: to see it work; cpu: narrow networks and few steps, for two cores; paper: the full size, for a GPU."
    ),
]
_DataOption = Annotated[
    str | None,
    typer.Option(help="A data set: file or folder, or 'builtin' for patches of photographs.", show_default="$BANDED_GMRF_DATA"),
]
_NoteOption = Annotated[
    str | None, typer.Option(help="What readers of the numbers must know of the data; replaces its own note.")
]
_WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that read training images from disk during training; 0: all into memory before.")
]
_Bfloat16Option = Annotated[bool, typer.Option("--bfloat16", help="Train networks in bfloat16, with likelihoods in float32.")]
_CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the training with torch.compile.")]
_SamplesOption = Annotated[
    int | None, typer.Option(min=1, help="Importance samples of each test image.", show_default="the preset's")
]
_HeldOutOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the training images for covariance networks alone, unseen by base models.", show_default="the preset's"
    ),
]
_ModelsOption = Annotated[
    str | None, typer.Option(help="The only base models to train, of AE,VAE,β-VAE.", show_default="the preset's")
]
_StencilsOption = Annotated[
    str | None,
    typer.Option(help="Sizes f of f x f stencils, as in 3,9, predicted from z beside a diagonal.", show_default="the preset's"),
]
_TensorboardOption = Annotated[bool, typer.Option("--tensorboard", help="Write logs for TensorBoard beside the results.")]


def _load_images(data: str | None, size: int, note: str | None, console):
    """The data set, with another note if one is given."""
    from dataclasses import replace

    from .datasets import load_images

    images = load_images(data, size, console)
    return images if note is None else replace(images, note=note)


def _sizes(stencils: str | None) -> list[int] | None:
    try:
        return None if stencils is None else [int(size) for size in stencils.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{stencils!r}, expected sizes as in 3,9", param_hint="--stencils") from None


def _add_image_experiment(experiment: str, about: str) -> None:
    @app.command(experiment, help=about)
    def command(
        preset: _ImagePresetOption = ImagePreset.QUICK,
        data: _DataOption = None,
        note: _NoteOption = None,
        out: _OutOption = None,
        resume: _ResumeOption = False,
        device: _DeviceOption = None,
        workers: _WorkersOption = 0,
        tensorboard: _TensorboardOption = False,
        bfloat16: _Bfloat16Option = False,
        compiled: _CompileOption = False,
        seed: _SeedOption = None,
        train: _TrainOption = None,
        test: _TestOption = None,
        epochs: _EpochsOption = None,
        samples: _SamplesOption = None,
        held_out: _HeldOutOption = None,
        models: _ModelsOption = None,
        stencils: _StencilsOption = None,
    ) -> None:
        replaced = {"seed": seed, "train": train, "test": test, "epochs": epochs, "samples": samples}
        replaced |= {"held_out": held_out, "bfloat16": bfloat16, "compiled": compiled}
        replaced |= {"models": None if models is None else models.split(","), "stencils": _sizes(stencils)}
        try:
            from rich.console import Console

            from . import distributed
            from .datasets import DataError
            from .faces.presets import PRESETS, config_for
            from .faces.run import run
            from .training import summary_writer

            if tensorboard:
                try:
                    summary_writer()
                except ImportError as error:
                    raise typer.BadParameter(str(error), param_hint="--tensorboard") from None
            with distributed.processes(_device(device)) as where:
                first = distributed.number() == 0
                console = Console(quiet=not first)
                try:
                    images = _load_images(data, PRESETS[experiment][preset.value].size, note, console)
                except DataError as error:
                    raise typer.BadParameter(str(error), param_hint="--data") from None
                try:
                    config = config_for(experiment, preset.value, images, **replaced)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from None
                folder = distributed.from_first(_begin(config, out, resume, where) if first else None)
                _run(folder, lambda: run(config, images, folder, where, console, workers, tensorboard))
                if first:
                    typer.echo(f"Results: {folder}")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


_add_image_experiment(
    "faces",
    "Structured residuals of autoencoders of faces: Table 3, Figures 1 and 7 to 10 of the SUPN paper. "
    "With N GPUs, or N processes: torchrun --nproc-per-node N -m experiments faces ...",
)
_add_image_experiment("cifar10", "The same as faces for gray images of 32 x 32 pixels.")


@app.command()
def denoising(
    faces: Annotated[
        Path | None,
        typer.Option(help="Results of a finished run of faces, for the VAE and its covariances.", show_default="train them"),
    ] = None,
    preset: _ImagePresetOption = ImagePreset.QUICK,
    data: _DataOption = None,
    note: _NoteOption = None,
    out: _OutOption = None,
    resume: _ResumeOption = False,
    device: _DeviceOption = None,
    images: Annotated[int | None, typer.Option(min=1, help="Test images.", show_default="2000")] = None,
) -> None:
    """Denoise and inpaint faces with a structured covariance: Table 4 and Figure 11 of the SUPN paper.

    The images must be those that the run of faces had. The preset is that of networks which are to be trained.
    """
    try:
        from rich.console import Console

        from .datasets import DataError
        from .denoising.presets import config_for, trained_faces
        from .denoising.run import run
        from .faces.presets import PRESETS

        console = Console()
        try:
            trained = None if faces is None else trained_faces(faces)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--faces") from None
        size = PRESETS["faces"][preset.value].size if trained is None else trained.size
        where = _device(device)
        try:
            found = _load_images(data, size, note, console)
        except DataError as error:
            raise typer.BadParameter(str(error), param_hint="--data") from None
        try:
            config = config_for(found, preset.value, faces, images)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        folder = _begin(config, out, resume, where)
        _run(folder, lambda: run(config, found, faces, folder, where, console))
        typer.echo(f"Results: {folder}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def factors(
    faces: Annotated[Path, typer.Argument(help="Results of a finished run of faces or cifar10, with its checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    data: _DataOption = None,
    base: Annotated[str, typer.Option(help="The base model: AE, VAE or β-VAE.")] = "VAE",
    images: Annotated[int, typer.Option(min=1, help="Test images, or as many as there are.")] = 16,
) -> None:
    """Factors and residuals of test images, for `python -m bench toolbox --factors`."""
    from .datasets import DataError
    from .faces.factors import save_factors
    from .faces.presets import finished_run

    try:
        config = finished_run(faces)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FACES") from None
    if base not in config.bases:
        raise typer.BadParameter(f"{faces} has no {base}, expected one of {', '.join(config.bases)}", param_hint="--base")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is no folder", param_hint="OUT")
    try:
        found = _load_images(data, config.size, None, None)
        if found.name != config.data:
            raise DataError(f"{faces} was trained on {config.data}, the data is {found.name}")
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None
    save_factors(config, faces, found, base, images, out)
    typer.echo(f"Factors: {out}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The results of a finished run of splines or ellipses.")]) -> None:
    """Write the table and the figures of a finished run again, from its numbers and networks."""
    from .known_covariance.run import report

    try:
        report(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from None


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
