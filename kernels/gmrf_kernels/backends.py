"""Which implementation runs an operation: by the device of its tensors, unless `use_backend` says otherwise."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

# Names for users, and the module of each.
BACKENDS = {"reference": ".reference", "cpu": ".cpu", "triton": ".triton_kernels"}

_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}

_override: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block on one backend, whatever the device of its tensors.

    Args:
        name: ``"reference"`` (plain torch, any device), ``"cpu"`` (Numba, CPU tensors only) or ``"triton"`` (CUDA tensors only,
            AMD's among them; CPU tensors where Triton interprets its kernels, ``TRITON_INTERPRET=1``).

    The choice holds for the whole process, as torch's own backend flags do, so that a backward pass run by an autograd
    thread sees it too. It is restored on leaving the block.

    Raises:
        ValueError: the name is not a backend of this version.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def default_backend(device: torch.device) -> str:
    """The name of the backend for tensors on ``device``, where `use_backend` does not choose another: the CPU backend for CPU
    tensors, the Triton backend for CUDA tensors, the reference for all others."""
    return _BY_DEVICE.get(device.type, "reference")


def backend_of(tensor: Tensor) -> ModuleType:
    """As `backend_for` the tensor's device."""
    if _override is None and tensor.is_cpu:
        return _module("cpu")
    return backend_for(tensor.device)


def backend_for(device: torch.device) -> ModuleType:
    """The module that implements the operations for tensors on ``device``.

    Raises:
        ValueError: the backend does not take tensors of this device, or needs Triton, which is not installed.
    """
    kind = device.type
    name = _override or _BY_DEVICE.get(kind, "reference")
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got tensors on {device}; use 'reference' there")
    if name == "triton":
        _check_triton(device)
    return _module(name)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name], __package__)


def _check_triton(device: torch.device) -> None:
    instead = "'cpu' or 'reference'" if device.type == "cpu" else "'reference'"
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"backend 'triton' needs the package triton, which is not installed; use {instead} on {device}")
    interpreted = _module("triton").INTERPRETED
    if device.type != ("cpu" if interpreted else "cuda"):
        takes = "CPU tensors in Triton's interpreter" if interpreted else "CUDA tensors"
        raise ValueError(f"backend 'triton' takes {takes}, got tensors on {device}; use {instead} there")
