"""GPU tests where there is no GPU: on CPU tensors, by the PTX that Triton compiles, which an emulator runs.

The environment variable PTXEMU names the folder of the emulator (`make emulate`). It is slow, so its runs have sizes of their
own. It has neither streams nor CUDA graphs nor a GPU's memory: tests of these are marked ``gpu("what they need")``. A run on a
GPU needs nothing of this.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch

import gmrf_kernels

T = TypeVar("T")

EMULATOR = os.environ.get("PTXEMU")

# Of the tensors of GPU tests.
DEVICE = "cpu" if EMULATOR else "cuda"

# Programs that the emulator lets run at a time.
RESIDENT = 16


def sized(on_gpu: T, emulated: T) -> T:
    """A size, on a GPU and in the emulator."""
    return emulated if EMULATOR else on_gpu


def why_not(needs: str | None) -> str | None:
    """Why a GPU test cannot run here, None if it can; ``needs``: what it uses of a GPU besides kernels."""
    if EMULATOR is None:
        return None if torch.cuda.is_available() else "needs a GPU that torch can use (CUDA or ROCm)"
    if not (Path(EMULATOR) / "ptxemu" / "launch.py").exists():
        return f"needs a GPU or the emulator ptxemu, which is not in {EMULATOR}"
    return f"needs a GPU: the emulator has no {needs}" if needs else None


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Run the Triton backend's launches on CPU tensors, and fail for each problem that one has."""
    sys.path.insert(0, EMULATOR)
    try:
        from ptxemu.launch import Emulator
    finally:
        sys.path.remove(EMULATOR)
    from gmrf_kernels import triton_kernels

    with (
        patch.object(triton_kernels, "INTERPRETED", True),
        gmrf_kernels.use_backend("triton"),
        Emulator(order="random", resident=RESIDENT),
    ):
        yield
