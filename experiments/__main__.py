"""``python -m experiments NAME``: one command for each experiment."""

import typer

from programs.commands import interruptible

from .commands.images import denoising, factors, image_experiment, reach, seeds
from .commands.showcases import demo, gallery
from .commands.synthetic import calibrate, known_covariance, report

app = typer.Typer(
    help="One command for each experiment.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main() -> None:
    """Experiments with structured uncertainty."""


app.command("demo")(interruptible(demo))
app.command(
    "splines",
    help="Recover the known covariance of splines with correlated noise: Table 1, Figures 3 and 4 of the SUPN paper.",
)(interruptible(known_covariance("splines")))
app.command(
    "ellipses",
    help="Recover the known covariance of images of ellipses: Table 2, Figures 5 and 6 of the SUPN paper.",
)(interruptible(known_covariance("ellipses")))
app.command(
    "faces",
    help="Structured residuals of autoencoders of faces: Table 3, Figures 1 and 7 to 10 of the SUPN paper. "
    "With N GPUs, or N processes: torchrun --nproc-per-node N -m experiments faces ...",
)(interruptible(image_experiment("faces")))
app.command("cifar10", help="The same as faces for gray images of 32 x 32 pixels.")(interruptible(image_experiment("cifar10")))
app.command("denoising")(interruptible(denoising))
app.command("reach")(interruptible(reach))
app.command("seeds")(interruptible(seeds))
app.command("factors")(interruptible(factors))
app.command("report")(interruptible(report))
app.command("calibrate")(interruptible(calibrate))
app.command("gallery")(interruptible(gallery))

if __name__ == "__main__":
    app(prog_name="python -m experiments")
