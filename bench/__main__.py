"""``python -m bench``: measure a preset, or what the options say. ``compare`` two such runs; ``calls``; ``toolbox``;
``training-step``; ``gpu``, the first hour on one."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from programs.commands import errors_of, finish, interruptible

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
@interruptible
def main(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help="quick, full, peers or gpu; the options below replace its values.")] = "quick",
    stencils: Annotated[
        str | None, typer.Option(help="7: 7 pixels along every axis; 3x7x7: a size for each axis; cross2. Separated by commas.")
    ] = None,
    resolutions: Annotated[str | None, typer.Option(help="64: 64 x 64 pixels; 3x64: three bands of them; 8x64x48.")] = None,
    batch: Annotated[str | None, typer.Option(help="Numbers of images.")] = None,
    samples: Annotated[str | None, typer.Option(help="Numbers of vectors for each image.")] = None,
    ops: Annotated[
        str | None, typer.Option(help="log_prob, log_prob_grad, sample, rsample_grad, solve, precision_solve, or all.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16, float16: of the coefficients.")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it: cpu, cuda.")] = None,
    backends: Annotated[str | None, typer.Option(help="The library's backends; default is the one that it chooses.")] = None,
    peers: Annotated[str | None, typer.Option(help="Other software, by the names in bench/peers.py; all; none.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and the library.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="For which each implementation is timed on each operation of a case.")
    ] = None,
    memory_limit: Annotated[float, typer.Option(min=0.0, help="GiB that one call may use, on a CPU.")] = 8.0,
    time_limit: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a conversion and a first call may take, on a CPU.")
    ] = 30.0,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="BANDED_GMRF_DATA",
            help="Photographs to judge stencils on, an .npz file of gray levels from 0 to 255: either arrays train and test, "
            "both (count, height, width) of 64 x 64 pixels or more; or an array (height, width) for each photograph, of 128 x "
            "128 or more, one half of which is fitted and the other judged.  [default: photographs of scikit-image]",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, new or empty.  [default: results/bench-PRESET-DATE-TIME]")
    ] = None,
) -> None:
    """Which stencil can I afford at which resolution, and is this as fast as it can be?

    Shows a table of times, and one of how well each stencil models photographs: held-out nats per pixel. Both are in the
    results' folder, with plots.
    """
    if context.invoked_subcommand is not None:
        return
    # Imported here: torch takes seconds, and processes for trials import this file too.
    from programs.devices import usable_device
    from programs.files import new_folder

    from .presets import PRESETS, override, plan
    from .quality import load_photographs, scikit_image_photographs
    from .rows import GIB, Limits
    from .run import run_works

    with errors_of("--preset"):
        if preset not in PRESETS:
            raise ValueError(f"{preset!r}, expected one of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    device = device or chosen.device
    given = {
        "stencils": stencils,
        "resolutions": resolutions,
        "batches": batch,
        "samples": samples,
        "operations": ops,
        "dtypes": dtype,
        "backends": backends,
        "peers": peers,
    }
    with errors_of():
        usable_device(device)
        works = plan([override(sweep, given) for sweep in chosen.sweeps], device)
        photographs = scikit_image_photographs() if data is None else load_photographs(data)
        folder = new_folder(f"bench-{preset}", out)
    _set_threads(threads)
    limits = Limits(chosen.seconds if seconds is None else seconds, memory_limit * GIB, time_limit)
    results = run_works(works, limits, device, preset, photographs, folder, _console())
    finish(folder, results["interrupted"])


@app.command()
@interruptible
def compare(
    before: Annotated[Path, typer.Argument(help="results.json of the first run, or its folder.")],
    after: Annotated[Path, typer.Argument(help="The same of the second run.")],
    threshold: Annotated[float, typer.Option(min=0.0, help="What counts as a change, as a fraction of the time.")] = 0.1,
) -> None:
    """Show what got slower from one run to another; the exit status is 1 if anything did."""
    from .compare import comparison_table, differences, faster_rows, lost_rows, slower_rows
    from .report import case_text
    from .results import read_results

    with errors_of():
        first, second = read_results(before), read_results(after)
    console = _console()
    for sentence in differences(first, second):
        console.print(sentence)
    slower, faster = slower_rows(first, second, threshold), faster_rows(first, second, threshold)
    for title, pairs in (("Slower", slower), ("Faster", faster)):
        if pairs:
            console.print(comparison_table(title, pairs))
    lost = lost_rows(first, second)
    for row in lost:
        console.print(f"Failed: {row['title']}, {row['operation']} of {row['stencil']}, {case_text(row)}: {row['reason']}")
    console.print(f"{len(slower)} slower, {len(faster)} faster, {len(lost)} failed.")
    if slower or lost:
        raise typer.Exit(1)


Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for torch and the library.")]
Minutes = Annotated[
    float | None, typer.Option(min=1.0, help="After which this start ends; another goes on.  [default: when all is done]")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the results, new or empty.  [default: results/bench-COMMAND-DATE-TIME]")
]


@app.command("toolbox")
@interruptible
def measure_toolbox(
    device: Device = "cpu",
    threads: Threads = None,
    factors: Annotated[
        Path | None,
        typer.Option(
            help="An .npz file with factors of a trained network: log_diag (B, H, W), off_diag (B, K-1, H, W), stencil_size f, "
            "and, to be observed in place of a sample of each, residual (B, H, W), gray levels in [-1, 1]. `python -m "
            "experiments factors` writes one.  [default: a factor fitted to photographs of scikit-image]"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For which each tool is timed after its first call.")] = 2.0,
    memory_limit: Annotated[float, typer.Option(min=0.0, help="GiB that one tool may use, on a CPU.")] = 16.0,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds that one tool may take, on a CPU.")] = 3600.0,
    minutes: Minutes = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results, new, or of a start that goes on.  [default: results/bench-toolbox-DATE-TIME]"
        ),
    ] = None,
) -> None:
    """What do marginals, conditioning, divergences, spectra and estimation cost?"""
    from programs.devices import usable_device
    from programs.files import new_folder

    from .fields import load_fields, photograph_residuals
    from .journal import STEPS
    from .rows import GIB, Limits
    from .toolbox import run_toolbox
    from .tools import Sizes

    with errors_of():
        usable_device(device)
        fields = photograph_residuals() if factors is None else load_fields(factors)
        folder = out if out is not None and (out / STEPS).exists() else new_folder("bench-toolbox", out)
    _set_threads(threads)
    limits = Limits(seconds, memory_limit * GIB, time_limit)
    with errors_of():
        end = None if minutes is None else 60 * minutes
        results = run_toolbox(fields, Sizes(), limits, device, folder, _console(), end)
    finish(folder, results["interrupted"])


@app.command("calls")
@interruptible
def measure_calls(
    device: Device = "cpu",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For which each call is timed.")] = 1.0,
    pause: Annotated[float, typer.Option(min=0.0, help="Milliseconds before a cold call.")] = 2.0,
    stencils: Annotated[str | None, typer.Option(help="Of the images of --resolutions, in place of the default cases.")] = None,
    resolutions: Annotated[str | None, typer.Option(help="With --stencils: as 64, 3x64 or 8x64x48.")] = None,
    batch: Annotated[str | None, typer.Option(help="With --stencils: numbers of images.")] = None,
    out: Out = None,
) -> None:
    """What does a call cost at each layer, and a sample beside its solve?"""
    from programs.devices import usable_device
    from programs.files import new_folder

    from .calls import chosen_sizes, default_sizes, run_calls

    with errors_of():
        usable_device(device)
        given = {"stencils": stencils, "resolutions": resolutions, "batches": batch}
        sizes = default_sizes(device) if not any(given.values()) else chosen_sizes(given, device)
        folder = new_folder("bench-calls", out)
    _set_threads(threads)
    results = run_calls(replace(sizes, seconds=seconds, pause=pause / 1e3), device, folder, _console())
    finish(folder, results["interrupted"])


@app.command("training-step")
@interruptible
def profile_training_step(
    device: Device = "cpu",
    threads: Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Run the network under autocast to bfloat16.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, and to profile.")] = 10,
    out: Out = None,
) -> None:
    """What share of training a covariance network do the library's operators take?"""
    from programs.devices import usable_device
    from programs.files import new_folder

    from .training_step import Setting, profile_training

    with errors_of():
        usable_device(device)
        folder = new_folder("bench-training-step", out)
    _set_threads(threads)
    setting = Setting(batch=batch, compiled=compiled, bfloat16=bfloat16)
    profile_training(setting, steps, device, folder, _console())
    finish(folder)


@app.command("gpu")
@interruptible
def first_hour_on_a_gpu(
    model: Annotated[
        Path | None, typer.Option(envvar="GPU_COST", help="gpu_cost.py, whose predictions stand beside the measurements.")
    ] = None,
    minutes: Minutes = None,
    out: Annotated[Path, typer.Option(help="Folder for the steps, new or of an earlier start.")] = Path("results/gpu"),
) -> None:
    """Are the kernels right on this GPU, and how fast? Checks, tests and bench in steps; what is done is not done again."""
    from .first_hour import about_this_run, predict, require_gpu, run_stages
    from .journal import Journal

    with errors_of():
        require_gpu()
        out.mkdir(parents=True, exist_ok=True)
        seconds = None if minutes is None else 60 * minutes
        predict(out, model)
        complete = run_stages(out, about_this_run(), seconds)
    bad = Journal(out).bad()
    for line in bad:
        typer.echo(f"{line['status']}: {line['stage']}: {line['done']}")
    typer.echo(f"{len(Journal(out).done())} steps done, {len(bad)} bad, {'all' if complete else 'not all'} stages complete.")
    finish(out)
    if bad or not complete:
        raise typer.Exit(1)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


if __name__ == "__main__":
    app(prog_name="python -m bench")
