"""Times of the CPU backend as ratios to reading and to copying the coefficients: ``python -m bench.cpu_targets``.

All in one process, float32, medians: ``sum`` and ``copy_`` of the coefficient tensor (batch, K, *grid), the log likelihood,
the log likelihood with the factor's gradient, and one sample per image (a transposed solve). The last lines state the peak
memory of an `rsample` of 1 and of 16 samples and its backward on one 1024 x 1024 image, each in a process of its own (Linux).
"""

import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import banded_gmrf as bg

CASES = [
    *((8, (1024, 1024), bg.Stencil.square(f)) for f in (7, 5, 3)),
    *((64, (64, 64), bg.Stencil.square(f)) for f in (7, 5, 3)),
    *((1, (1024, 1024), bg.Stencil.square(f)) for f in (7, 5, 3)),
    *((1, (64, 64), bg.Stencil.square(f)) for f in (7, 5, 3)),
    (8, (3, 256, 256), bg.Stencil.box((1, 1, 1))),
    (1, (3, 256, 256), bg.Stencil.box((1, 1, 1))),
]


def median_times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a change in the machine's speed meets all of them."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def measure(batch: int, grid: tuple[int, ...], stencil: bg.Stencil, repeats: int) -> dict[str, float]:
    """Seconds of each operation on one case."""
    generator = torch.Generator().manual_seed(0)
    # One tensor of K planes, as a network predicts them; the factor's two tensors are views of it.
    coefficients = torch.randn(batch, len(stencil) + 1, *grid, generator=generator) * (0.3 / len(stencil) ** 0.5)
    copy = torch.empty_like(coefficients)
    residual = torch.randn(batch, *grid, generator=generator)
    log_diag, off_diag = coefficients[:, 0], coefficients[:, 1:]
    trained = [log_diag.clone().requires_grad_(), off_diag.clone().requires_grad_()]
    factor = bg.StencilCholesky(log_diag, off_diag, stencil)

    def log_likelihood_and_gradient():
        torch.autograd.grad(bg.negative_log_likelihood(residual, *trained, stencil).sum(), trained)

    return median_times(
        {
            "sum": coefficients.sum,
            "copy_": lambda: copy.copy_(coefficients),
            "log likelihood": lambda: bg.negative_log_likelihood(residual, log_diag, off_diag, stencil),
            "with gradient": log_likelihood_and_gradient,
            "sample": lambda: factor.solve(residual, transpose=True),
        },
        repeats,
    )


def _peak_bytes(reset: bool = False) -> int:
    """Peak resident memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def _rsample_peak(samples: int, queue: multiprocessing.Queue) -> None:
    """Peak memory of one rsample and its backward, in images of 1024 x 1024 float32, coefficients included."""
    stencil, grid = bg.Stencil.square(7), (1024, 1024)

    def run(n):
        log_diag = torch.zeros(1, *n, requires_grad=True)
        off_diag = torch.full((1, len(stencil), *n), 0.01, requires_grad=True)
        q = bg.GMRF(torch.zeros(1, *n), bg.StencilCholesky(log_diag, off_diag, stencil))
        q.rsample((samples,)).square().mean().backward()

    run((64, 64))  # compiles
    before = _peak_bytes(reset=True)
    run(grid)
    queue.put((_peak_bytes() - before) / (4 * math.prod(grid)))


def rsample_peak(samples: int) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_rsample_peak, args=(samples, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model.group(1) if model else platform.processor()}, {os.cpu_count()} cores"


def main(
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each operation.")] = 10,
    threads: Annotated[int, typer.Option(help="Threads for torch and the library.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Text file for the table.")] = None,
) -> None:
    """Measure the CPU backend against reading and copying the coefficients."""
    torch.set_num_threads(threads)
    console = Console(width=140, record=True)
    table = Table(title=f"{_processor()}, {threads} threads, torch {torch.__version__}, float32, median of {repeats}")
    for column in (
        "case",
        "sum ms",
        "copy_ ms",
        "log lik. ms",
        "/ sum",
        "with grad. ms",
        "/ copy_",
        "sample ms",
        "/ sum",
        "/ copy_",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for batch, grid, stencil in CASES:
        times = measure(batch, grid, stencil, repeats)
        likelihood, gradient, sample = times["log likelihood"], times["with gradient"], times["sample"]
        figures = [times["sum"] * 1e3, times["copy_"] * 1e3, likelihood * 1e3, likelihood / times["sum"], gradient * 1e3]
        figures += [gradient / times["copy_"], sample * 1e3, sample / times["sum"], sample / times["copy_"]]
        shape = " x ".join(map(str, (batch, *grid)))
        table.add_row(f"{shape}, K = {len(stencil) + 1}", *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    for samples in (1, 16):
        console.print(
            f"rsample of {samples} and backward, 1 x 1024 x 1024, K = 25: {rsample_peak(samples):.1f} images of memory"
        )
    if out is not None:
        console.save_text(str(out))


if __name__ == "__main__":
    typer.run(main)
