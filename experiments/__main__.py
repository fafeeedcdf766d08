"""``python -m experiments NAME``: one command for each experiment."""

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
        Path | None, typer.Option(help="Folder for the results, new or empty.  [default: results/demo-DATE-TIME]")
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


@app.command()
def gallery(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.  [default: results/gallery-DATE-TIME]")
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
