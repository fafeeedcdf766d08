"""Memory for large CPU results, used again when a result of the same size has been freed.

The C library hands blocks beyond 32 MiB back to the system at once, and the page faults of a fresh block cost several times
what an operation does in it. Freed blocks are kept here, up to a limit, and new ones ask for huge pages.

Tensors in such blocks cannot change their size in place: ``resize_`` beyond it raises RuntimeError. Their clones can.
"""

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller blocks the C library keeps by itself.
_SMALLEST_BYTES = 2**22
_KEPT_BYTES = 2**30

# No lock: finalizers append to it, and may run anywhere, in this module's functions, too. Each change is atomic by itself.
_free: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALLEST_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        # Sizes one by one: torch takes 3 µs to read a sequence of them.
        return torch.empty(*shape, dtype=dtype) if shape else torch.empty((), dtype=dtype)
    block = _take(size)
    buffer = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(buffer, _give_back, block).atexit = False
    return torch.frombuffer(buffer, dtype=dtype).view(*shape)


def _take(size: int) -> mmap.mmap:
    for block in list(_free):
        if len(block) == size:
            with contextlib.suppress(ValueError):  # another thread took it first
                _free.remove(block)
                return block
    # Private: a forked child must not write into its parent's results.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    if len(block) > _KEPT_BYTES:
        return  # all others would have to go for it
    _free.append(block)
    while sum(map(len, list(_free))) > _KEPT_BYTES:
        with contextlib.suppress(IndexError):
            _free.pop(0)
