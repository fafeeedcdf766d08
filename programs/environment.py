"""Machine, versions, commit and command: what is needed to judge a number or to get it again."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .checkout import commit
from .files import printable


def environment(program: str, packages: Iterable[str], device: torch.device | str) -> dict[str, Any]:
    """All of it, as JSON holds it.

    Args:
        program: what ``python -m`` runs.
        packages: installed ones of which the versions count.
        device: on which it computes.
    """
    return {
        "command": printable(shlex.join(["python", "-m", program, *sys.argv[1:]])),
        "commit": commit(),
        "machine": _machine(torch.device(device)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def machine_text(results: dict[str, Any]) -> str:
    """The machine in results with an `environment`: its GPU, if that was used, its processor, cores and threads."""
    machine = results["machine"]
    # Earlier results of `experiments` name the platform alone, and count threads under another name.
    processor = machine.get("processor", machine["platform"])
    threads = machine["threads"] if "threads" in machine else machine["torch_threads"]
    text = f"{processor}, {machine['cpus']} cores, {threads} threads"
    return f"{machine['gpu']}; {text}" if "gpu" in machine else text


def _machine(device: torch.device) -> dict[str, Any]:
    machine = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return machine


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()
