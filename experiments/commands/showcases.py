"""What runs without data and without options: the demo and the gallery."""

from pathlib import Path
from typing import Annotated

import typer

from programs.commands import errors_of, finish

_Seed = Annotated[int, typer.Option(help="The same seed gives the same numbers.")]


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.", show_default="results/demo-DATE-TIME")
    ] = None,
    seed: _Seed = 0,
    patches: Annotated[int, typer.Option(min=1, help="Number of training patches.")] = 24_000,
    autoencoder_steps: Annotated[int, typer.Option(min=1, help="Training steps of the autoencoder.")] = 700,
    covariance_steps: Annotated[int, typer.Option(min=1, help="Training steps of each covariance network.")] = 700,
) -> None:
    """Train on photographs of scikit-image and show what the structured covariance has learned."""
    from rich.console import Console

    from programs.files import new_folder

    from ..demo import DemoConfig, run_demo
    from ..page import PAGE

    with errors_of("--out"):
        folder = new_folder("demo", out)
    config = DemoConfig(seed=seed, patches=patches, autoencoder_steps=autoencoder_steps, covariance_steps=covariance_steps)
    run_demo(config, folder, Console())
    finish(folder / PAGE)


def gallery(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.", show_default="results/gallery-DATE-TIME")
    ] = None,
    seed: _Seed = 0,
    size: Annotated[int, typer.Option(min=16, max=256, help="Height and width of the images in pixels.")] = 256,
) -> None:
    """Samples of factors constructed from precisions, a covariance function, and photographs."""
    from rich.console import Console

    from programs.files import new_folder

    from ..gallery import GalleryConfig, run_gallery

    with errors_of("--out"):
        folder = new_folder("gallery", out)
    run_gallery(GalleryConfig(seed=seed, size=size), folder, Console())
    finish(folder)
