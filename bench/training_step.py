"""``python -m bench training-step``: what share of training a covariance network the library's operators take.

A step is the paper's for 64 x 64 pixels: a `LatentCovarianceNetwork` predicts factors from codes, and the likelihood of
residuals under them, its gradient and Adam follow. On a GPU the times of all kernels of a few steps are summed; those of the
library are known by their names. On a CPU it is the time within operators, each without what it calls in turn.
"""

import functools
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import banded_gmrf as bg
from programs.tables import markdown_table
from supn_models import LatentCovarianceNetwork

from .measure import synchronize
from .results import Results, about, environment, table, write_results

_STDDEV = 0.1  # of the residuals, gray levels in [-1, 1]
_SHOWN = 20
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Setting:
    """What is trained, and how: by default the paper's network as ``experiments`` reads it."""

    batch: int = 64
    pixels: int = 64
    stencil_size: int = 7
    latent_size: int = 128
    decoder_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    channels: int = 32
    compiled: bool = False
    bfloat16: bool = False

    def __str__(self) -> str:
        options = [name for name in ("compiled", "bfloat16") if getattr(self, name)]
        return ", ".join([f"f = {self.stencil_size}, batch {self.batch} × {self.pixels} × {self.pixels}", *options])


@dataclass(frozen=True)
class Kernel:
    """All launches of a GPU's kernel, or calls of an operator on a CPU: seconds and number in all steps."""

    name: str
    ours: bool
    seconds: float = 0.0
    calls: int = 0


def training_step(setting: Setting, device: str) -> Callable[[], None]:
    """A network of random weights on random data, and one step of its training as a function without arguments."""
    torch.manual_seed(0)
    grid, stencil = (setting.pixels, setting.pixels), bg.Stencil.square(setting.stencil_size)
    network = LatentCovarianceNetwork(
        grid,
        setting.latent_size,
        stencil,
        decoder_channels=setting.decoder_channels,
        channels=setting.channels,
        initial_stddev=_STDDEV,
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    code = torch.randn(setting.batch, setting.latent_size, device=device)
    residual = _STDDEV * torch.randn(setting.batch, *grid, device=device)

    def loss():
        factor = network(code)
        nats = bg.negative_log_likelihood(residual, factor.log_diag, factor.off_diag, stencil)
        return nats.mean() / residual[0].numel()

    loss = torch.compile(loss) if setting.compiled else loss

    def step():
        with torch.autocast(residual.device.type, torch.bfloat16, enabled=setting.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def kernels(events: Iterable[Any], device: str) -> list[Kernel]:
    """The events of a profile by name, the longest first.

    Args:
        events: of `torch.profiler.profile.events`.
        device: of what they are wanted; operators on a CPU that launch kernels on a GPU are not of the latter.
    """
    device_type = DeviceType.CUDA if torch.device(device).type == "cuda" else DeviceType.CPU
    found: dict[tuple[str, bool], Kernel] = {}
    for event in events:
        if event.device_type != device_type:
            continue
        if device_type == DeviceType.CUDA:
            if event.is_user_annotation:  # spans the kernels of a part of the program
                continue
            ours, microseconds = event.name in _triton_kernels(), event.time_range.elapsed_us()
        else:
            ours, microseconds = _within_operator(event), event.self_cpu_time_total
        kernel = found.get((event.name, ours), Kernel(event.name, ours))
        found[event.name, ours] = replace(kernel, seconds=kernel.seconds + microseconds / 1e6, calls=kernel.calls + 1)
    return sorted(found.values(), key=lambda kernel: -kernel.seconds)


@functools.cache
def _triton_kernels() -> frozenset[str]:
    """Names of all that the library compiles with Triton; what a kernel calls is among them, and has no time of its own."""
    from triton.runtime import KernelInterface  # where there are GPUs: not on every system

    from gmrf_kernels import triton_kernels

    modules = pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")
    members = (member for module in modules for member in vars(importlib.import_module(module.name)).values())
    return frozenset(member.__name__ for member in members if isinstance(member, KernelInterface))


def _within_operator(event: Any) -> bool:
    """Whether it is one of ``torch.ops.gmrf_kernels``, its backward, or called by one."""
    while event is not None:
        if "gmrf_kernels" in event.name:
            return True
        event = event.cpu_parent
    return False


def profile_training(setting: Setting, steps: int, device: str, folder: Path, console: Console) -> Results:
    """Profile ``steps`` steps, write results.json and results.md into ``folder``, and show the table.

    Raises:
        RuntimeError: the profiler was told of no kernel.
    """
    start = time.perf_counter()
    on_gpu = torch.device(device).type == "cuda"
    step = training_step(setting, device)
    with console.status(f"training step, {setting}"):
        for _ in range(3):  # compiles, and chooses algorithms
            step()
        seconds = _seconds(step, steps, device)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
            for _ in range(steps):
                step()
            synchronize(device)
    found = kernels(profiled.events(), device)
    total = sum(kernel.seconds for kernel in found)
    if total == 0:
        raise RuntimeError(
            f"torch.profiler saw nothing run on {device}; on a GPU it needs the right to use performance counters"
        )
    results = {
        "setting": asdict(setting),
        "title": str(setting),
        "device": device,
        "steps": steps,
        "seconds_per_step": seconds / steps,
        "kernel_seconds_per_step": total / steps,
        "share_of_operators": sum(kernel.seconds for kernel in found if kernel.ours) / total,
        "aim": "at most 15 % on a GPU, f = 7, batch 64 × 64 × 64",
        **environment(device),
        "interrupted": False,
        "seconds": time.perf_counter() - start,
        "kernels": [asdict(kernel) for kernel in found],
    }
    write_results(folder, results, markdown_report(results))
    console.print(terminal_table(results))
    return results


def _seconds(step: Callable[[], None], steps: int, device: str) -> float:
    """Of all steps by the clock, one after the other: a GPU is not waited for in between."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start


def markdown_report(results: Results) -> str:
    """The share, and what takes longest."""
    return (
        f"# A training step of a covariance network: {results['title']}\n\n{about(results)}\n"
        f"{_summary(results)}\n\n{markdown_table(_HEADER, _lines(results), text_columns=2)}\n"
        f"The {_SHOWN} longest. Library: operators of `gmrf_kernels`, on a GPU their Triton kernels; network: all others, Adam "
        "included. On a GPU these are kernels, copies and fillings of memory; on a CPU operators, without the time of those "
        "that they call, under the profiler. The time by the clock is without the profiler: what it exceeds that of the "
        "kernels by, the GPU waits.\n"
    )


def terminal_table(results: Results) -> Table:
    """The same table."""
    return table(results, _HEADER, _lines(results), text_columns=2, caption=_summary(results))


_HEADER = ("kernel", "of", "calls per step", "ms per step", "share")


def _summary(results: Results) -> str:
    clock, kernels = (results[name] * 1e3 for name in ("seconds_per_step", "kernel_seconds_per_step"))
    share = f"Share of the library's operators: {results['share_of_operators']:.1%} (aim: {results['aim']})."
    return f"{share} A step: {clock:.3g} ms by the clock, {kernels:.3g} ms in kernels; means over {results['steps']} steps."


def _lines(results: Results) -> list[list[str]]:
    steps, total = results["steps"], results["kernel_seconds_per_step"] * results["steps"]
    lines = []
    for kernel in results["kernels"][:_SHOWN]:
        name = kernel["name"] if len(kernel["name"]) <= _LONGEST_NAME else kernel["name"][: _LONGEST_NAME - 1] + "…"
        figures = [f"{kernel['calls'] / steps:g}", f"{kernel['seconds'] / steps * 1e3:.3g}", f"{kernel['seconds'] / total:.1%}"]
        lines.append([name.replace("|", r"\|"), "library" if kernel["ours"] else "network", *figures])
    return lines
