"""The experiments with images: faces, cifar10, denoising, and factors for the bench."""

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from programs.commands import errors_of, finish

from . import options


class Preset(StrEnum):
    """Sizes of the experiments with real images."""

    QUICK = "quick"
    CPU = "cpu"
    LONG = "long"
    PAPER = "paper"


_Preset = Annotated[
    Preset,
    typer.Option(
        help="quick: to see it work; cpu: narrow networks and few steps, for two cores; long: base models trained until images "
        "that they do not see gain no more; paper: the full size, for a GPU."
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(help="A data set: file or folder, or 'builtin' for patches of photographs.", show_default="$BANDED_GMRF_DATA"),
]
_Range = Annotated[
    str | None,
    typer.Option(
        "--range",
        metavar="LOW,HIGH",
        help="The values in image files or arrays that are black and white, as 0,4095 for 12 bits.",
        show_default="0 and the largest of 8 or 16 bits",
    ),
]
_Note = Annotated[str | None, typer.Option(help="What readers of the numbers must know of the data; replaces its own note.")]
_Workers = Annotated[
    int, typer.Option(min=0, help="Processes that read training images from disk during training; 0: all into memory before.")
]
_Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Train networks in bfloat16, with likelihoods in float32.")]
_Compile = Annotated[bool, typer.Option("--compile", help="Compile the training with torch.compile.")]
_Samples = Annotated[
    int | None, typer.Option(min=1, help="Importance samples of each test image.", show_default="the preset's")
]
_HeldOut = Annotated[
    float | None,
    typer.Option(
        help="Share of the training images for covariance networks alone, unseen by base models.", show_default="the preset's"
    ),
]
_Validation = Annotated[
    float | None,
    typer.Option(help="Share of the training images that no network is trained on.", show_default="the preset's"),
]
_Models = Annotated[
    str | None,
    typer.Option(help="The only base models to train, of AE,VAE,β-VAE,AE-L1,AE-gradient.", show_default="the preset's"),
]
_Stencils = Annotated[
    str | None,
    typer.Option(help="Sizes f of f x f stencils, as in 3,9, predicted from z beside a diagonal.", show_default="the preset's"),
]
_Bases = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="bases.safetensors of an earlier run with the same images: its base models, for new covariance networks.",
        show_default="train them",
    ),
]
_DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="One step of each network at its full size, on 32 images (of long 128), then scores of 4: does it run here, in "
        "how much memory? --train, --test, --epochs and --samples still count.",
    ),
]
_Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write logs for TensorBoard beside the results.")]


def image_experiment(experiment: str) -> Callable[..., None]:
    """The command of "faces" or "cifar10"."""

    def command(
        preset: _Preset = Preset.QUICK,
        data: _Data = None,
        levels: _Range = None,
        note: _Note = None,
        out: options.Out = None,
        resume: options.Resume = False,
        device: options.Device = None,
        workers: _Workers = 0,
        tensorboard: _Tensorboard = False,
        bfloat16: _Bfloat16 = False,
        compiled: _Compile = False,
        seed: options.Seed = None,
        train: options.Train = None,
        test: options.Test = None,
        epochs: options.Epochs = None,
        samples: _Samples = None,
        held_out: _HeldOut = None,
        validation: _Validation = None,
        models: _Models = None,
        stencils: _Stencils = None,
        bases: _Bases = None,
        dry_run: _DryRun = False,
    ) -> None:
        if dry_run:
            few = 128 if preset is Preset.LONG else 32  # of which a quarter is for the covariance networks
            train, test, epochs, samples = train or few, test or 4, epochs or 1, samples or 2
        replaced = {"seed": seed, "train": train, "test": test, "epochs": epochs, "samples": samples}
        replaced |= {"held_out": held_out, "validation": validation, "bfloat16": bfloat16, "compiled": compiled}
        replaced |= {"models": None if models is None else models.split(","), "stencils": _sizes(stencils)}

        from rich.console import Console

        from .. import distributed
        from ..faces.bases import with_bases
        from ..faces.presets import PRESETS, config_for
        from ..faces.run import run_faces
        from ..training import summary_writer

        if tensorboard:
            with errors_of("--tensorboard", ImportError):
                summary_writer()
        with distributed.processes(options.device_option(device)) as where:
            first = distributed.rank() == 0
            console = Console(quiet=not first)
            images = _load_images(data, PRESETS[experiment][preset.value].size, levels, note, console)
            with errors_of():
                config = config_for(experiment, preset.value, images, **replaced)
            if bases is not None:
                with errors_of("--bases"):
                    config = with_bases(config, bases)
            folder = distributed.from_first(options.run_folder(config, out, resume, where) if first else None)
            with options.resumable(folder):
                run_faces(config, images, folder, where, console, workers, tensorboard, bases)
            if first:
                finish(folder)

    return command


def denoising(
    faces: Annotated[
        Path | None,
        typer.Option(help="Results of a finished run of faces, for the VAE and its covariances.", show_default="train them"),
    ] = None,
    preset: _Preset = Preset.QUICK,
    data: _Data = None,
    levels: _Range = None,
    note: _Note = None,
    out: options.Out = None,
    resume: options.Resume = False,
    device: options.Device = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Test images.", show_default="2000, 200 with --inpainting-only")
    ] = None,
    inpainting_only: Annotated[
        bool, typer.Option("--inpainting-only", help="Denoise nothing, so that no denoising autoencoder is trained.")
    ] = False,
    denoiser_epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes of the denoising autoencoders.", show_default="as the VAE's")
    ] = None,
) -> None:
    """Denoise and inpaint faces with a structured covariance: Table 4 and Figure 11 of the SUPN paper.

    The images must be those that the run of faces had. The preset is that of networks which are to be trained.
    """
    from rich.console import Console

    from ..denoising.presets import config_for, trained_faces
    from ..denoising.run import run_denoising
    from ..faces.presets import PRESETS

    console = Console()
    with errors_of("--faces"):
        trained = None if faces is None else trained_faces(faces)
    size = PRESETS["faces"][preset.value].size if trained is None else trained.size
    where = options.device_option(device)
    found = _load_images(data, size, levels, note, console)
    with errors_of():
        config = config_for(found, preset.value, faces, images, inpainting_only, denoiser_epochs)
    folder = options.run_folder(config, out, resume, where)
    with options.resumable(folder):
        run_denoising(config, found, faces, folder, where, console)
    finish(folder)


def reach(
    faces: Annotated[
        Path, typer.Argument(help="Results of a run of faces or cifar10, or its bases.safetensors alone, for its VAE.")
    ],
    data: _Data = None,
    levels: _Range = None,
    note: _Note = None,
    out: options.Out = None,
    resume: options.Resume = False,
    device: options.Device = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Of dense,r8,r32,dilated,greedy,dense-all,fine-tuned-unseen,fine-tuned,scratch; all are compared with the "
            "table's first. Two are controls: dense learns from images that the VAE has not seen, fine-tuned from all.",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Networks of each of these rows, earlier ones included.", show_default="3")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes of every network.", show_default="8, and 30 from scratch")
    ] = None,
    measured: Annotated[
        int | None, typer.Option(min=2, help="Test images for coverage and the like.", show_default="128")
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(help="Results of a finished run, to whose table the networks are added that it does not have."),
    ] = None,
) -> None:
    """What reaches further than a dense stencil: factors, offsets apart, a mean trained with its covariance.

    The images must be those that the run of faces had.
    """
    from rich.console import Console

    from ..faces.bases import bases_file, load_bases
    from ..reach.presets import config_for, with_earlier
    from ..reach.run import run_reach

    console = Console()
    with errors_of("FACES"):
        file = bases_file(faces)
        size = load_bases(file)[1]["config"]["size"]
    where = options.device_option(device)
    found = _load_images(data, size, levels, note, console)
    with errors_of():
        config = config_for(found, file, None if rows is None else rows.split(","), seeds, epochs, measured)
    if earlier is not None:
        with errors_of("--earlier"):
            config = with_earlier(config, earlier)
    folder = options.run_folder(config, out, resume, where)
    with options.resumable(folder):
        run_reach(config, found, file, folder, where, console, earlier)
    finish(folder)


def factors(
    faces: Annotated[Path, typer.Argument(help="Results of a finished run of faces or cifar10, with its checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    data: _Data = None,
    levels: _Range = None,
    base: Annotated[str, typer.Option(help="The base model: AE, VAE or β-VAE.")] = "VAE",
    images: Annotated[int, typer.Option(min=1, help="Test images, or as many as there are.")] = 16,
) -> None:
    """Factors and residuals of test images, for `python -m bench toolbox --factors`."""
    from ..faces.factors import save_factors
    from ..faces.presets import check_same_data, finished_run

    with errors_of("FACES"):
        config = finished_run(faces)
    with errors_of("--base"):
        if base not in config.bases:
            raise ValueError(f"{faces} has no {base}, expected one of {', '.join(config.bases)}")
    with errors_of("OUT"):
        if not out.parent.is_dir():
            raise ValueError(f"{out.parent} is no folder")
    found = _load_images(data, config.size, levels)
    with errors_of("--data"):
        check_same_data(config, found)
    save_factors(config, faces, found, base, images, out)
    finish(out, what="Factors")


def seeds(
    runs: Annotated[list[Path], typer.Argument(help="Results of finished runs of faces, of any base models and seeds.")],
    out: options.Out = None,
) -> None:
    """One table of several runs of faces that differ in base models and seeds: means and standard deviations over seeds."""
    from rich.console import Console

    from programs.files import new_folder

    from ..faces.seeds import runs_of, write_table

    with errors_of("RUNS"):
        found = runs_of(runs)
    with errors_of("--out"):
        folder = new_folder("seeds", out)
    write_table(found, folder, Console())
    finish(folder)


def _load_images(data: str | None, size: int, levels: str | None, note: str | None = None, console=None):
    """The data set of ``--data``, with another note if one is given; warns of values that make bad gray levels."""
    from .. import distributed
    from ..datasets import Levels, load_images

    with errors_of("--range"):
        black_and_white = None if levels is None else Levels.parse(levels)
    with errors_of("--data"):
        images = load_images(data, size, console, black_and_white)
    if distributed.rank() == 0:
        for warning in images.warnings:
            typer.echo(f"Warning: {warning}", err=True)
    return images if note is None else replace(images, note=note)


def _sizes(stencils: str | None) -> list[int] | None:
    with errors_of("--stencils"):
        try:
            return None if stencils is None else [int(size) for size in stencils.split(",")]
        except ValueError:
            raise ValueError(f"{stencils!r}, expected sizes as in 3,9") from None
