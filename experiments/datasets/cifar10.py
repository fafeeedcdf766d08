"""CIFAR10 from its original files, the binary or the Python ones.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .images import ArrayImages, DataError, ImageData, gray
from .levels import Levels, refuse_levels

_SIZE = 32
_PIXELS = 3 * _SIZE * _SIZE
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

# All that a batch needs. A pickle may name any function of any module to be called; no other is.
_UNPICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def find(folder: Path) -> list[Path]:
    """The folder itself if it holds a batch, as one or as none."""
    return [folder] if any(path.is_file() for path in _batches(folder)) else []


def check(folder: Path, size: int, levels: Levels | None = None) -> None:
    """CIFAR10 has one size and six files.

    Raises:
        DataError: another ``size``, ``levels``, or files that are missing.
    """
    if size != _SIZE:
        raise DataError(f"CIFAR10 has {_SIZE} x {_SIZE} pixels, not {size} x {size}")
    refuse_levels("CIFAR10", levels)
    missing = [path.name for path in _batches(folder) if not path.is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} of CIFAR10's six batches")


def load(folder: Path, size: int, levels: Levels | None = None, console: Console | None = None) -> ImageData:
    """CIFAR10 in gray, its five training batches and its test batch, held in memory. Shows no progress.

    Raises:
        DataError: another ``size``, ``levels``, files that are missing, or one whose content is not a batch.
    """
    check(folder, size, levels)
    *train, test = (gray(_read(path)) for path in _batches(folder))
    note = "original pixels in gray; official training and test images"
    return ImageData("CIFAR10", ArrayImages(np.concatenate(train)), ArrayImages(test), note)


def _batches(folder: Path) -> list[Path]:
    """The files of the batches, the test batch last: binary ones if there are any, else Python ones."""
    binary = [folder / f"{name}.bin" for name in _BATCHES]
    return binary if any(path.is_file() for path in binary) else [folder / name for name in _BATCHES]


def _read(path: Path) -> np.ndarray:
    """The colour images of one batch, (count, 32, 32, 3)."""
    pixels = _read_binary(path) if path.suffix == ".bin" else _read_python(path)
    return pixels.reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1)


def _read_binary(path: Path) -> np.ndarray:
    records = np.fromfile(path, dtype=np.uint8)
    if len(records) == 0 or len(records) % (1 + _PIXELS):
        raise DataError(f"{path} has {len(records):,} bytes, expected a multiple of {1 + _PIXELS:,}: a label and the pixels")
    return records.reshape(-1, 1 + _PIXELS)[:, 1:]


def _read_python(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            pixels = _BatchUnpickler(file, encoding="bytes").load()[b"data"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not a batch of CIFAR10: {type(error).__name__}: {error}") from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(f"{path} is not a batch of CIFAR10: data is not an array (count, {_PIXELS:,}) of uint8")
    return pixels


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _UNPICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _UNPICKLED[module, name]
