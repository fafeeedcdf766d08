"""Machine, versions, commit and command: what is needed to judge a number or to get it again."""

import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from banded_gmrf.checkout import commit

from .peers import PEERS


def environment(device: str) -> dict[str, Any]:
    """All of it, as JSON holds it."""
    versions = {package: version(package) for package in ("banded-gmrf", "torch", "numpy", "numba")}
    return {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": commit(),
        "machine": _machine(device),
        "python": platform.python_version(),
        "versions": versions | {peer.module: peer.version() for peer in PEERS.values()},
    }


def _machine(device: str) -> dict[str, Any]:
    machine = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return machine


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()
