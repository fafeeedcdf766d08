"""Which implementation runs an operation: by the device of its tensors, unless `use_backend` says otherwise."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

_MODULES = {"reference": ".reference", "cpu": ".cpu"}
_BY_DEVICE = {"cpu": "cpu"}

_override: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block on one backend, whatever the device of its tensors.

    Args:
        name: ``"reference"`` (plain torch, any device) or ``"cpu"`` (Numba, CPU tensors only).

    The choice holds for the whole process, as torch's own backend flags do, so that a backward pass run by an autograd
    thread sees it too. It is restored on leaving the block.

    Raises:
        ValueError: the name is not a backend of this version.
    """
    global _override
    if name not in _MODULES:
        raise ValueError(f"use_backend: name is {name!r}, expected one of {', '.join(map(repr, _MODULES))}")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def backend_for(device: torch.device) -> ModuleType:
    """The module that implements the operations for tensors on ``device``.

    Raises:
        ValueError: the backend chosen with `use_backend` does not take tensors of this device.
    """
    name = _override or _BY_DEVICE.get(device.type, "reference")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got tensors on {device}; use 'reference' there")
    return _module(name)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name], __package__)
