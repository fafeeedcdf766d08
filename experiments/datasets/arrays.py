"""Images in one ``.npz`` file, held in memory: ``images`` with ``is_test``, or ``train`` and ``test``; perhaps a ``note``."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from rich.console import Console

from .images import ArrayImages, DataError, ImageData, gray
from .levels import Levels, Seen

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def find(folder: Path) -> list[Path]:
    """The ``.npz`` files in a folder."""
    return sorted(folder.glob("*.npz"))


def check(path: Path, size: int, levels: Levels | None = None) -> None:
    """Look at the arrays' headers only: whether `load` would take them.

    Raises:
        DataError: no ``.npz`` file, or arrays of other names, shapes or types.
    """
    shapes = _shapes(path)
    if {"images", "is_test"} <= shapes.keys():
        names = ("images",)
        count, expected = shapes["is_test"][0], shapes["images"][0][:1]
        if count != expected:
            raise DataError(f"{path}: is_test has shape {count}, expected {expected} as there are images")
        if shapes["is_test"][1].kind != "b":
            raise DataError(f"{path}: is_test has type {shapes['is_test'][1]}, expected bool")
    elif {"train", "test"} <= shapes.keys():
        names = ("train", "test")
    else:
        raise DataError(f"{path} holds {', '.join(shapes) or 'nothing'}; expected images and is_test, or train and test")
    for name in names:
        shape, dtype = shapes[name]
        if dtype != np.uint8 and levels is None:
            raise DataError(f"{path}: {name} has type {dtype}, expected uint8; --range LOW,HIGH takes other numbers")
        if dtype.kind not in "uif":
            raise DataError(f"{path}: {name} has type {dtype}, expected integers or floating-point numbers")
        if shape[1:] not in ((size, size), (size, size, 1), (size, size, 3)):
            raise DataError(f"{path}: {name} has shape {shape}, expected (count, {size}, {size}), (..., 1) or (..., 3)")


def load(path: Path, size: int, levels: Levels | None = None, console: Console | None = None) -> ImageData:
    """The images of one file, in gray; the file's text ``note`` says where they come from. Shows no progress.

    Raises:
        DataError: as for `check`, a file that is cut off, values that are NaN, or no training or no test images.
    """
    check(path, size, levels)
    try:
        with np.load(path) as file:
            if {"images", "is_test"} <= set(file):
                images, is_test = file["images"], file["is_test"]
                train, test = images[~is_test], images[is_test]
            else:
                train, test = file["train"], file["test"]
            note = str(file["note"]) if "note" in file else f"{path.name} does not say where its images come from"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if levels:
        note += f"; {levels}"
    seen, parts = Seen(), []
    for part in (train, test):
        seen.note("the arrays", 255, part)
        try:
            parts.append(ArrayImages(_one_channel(levels.to_uint8(part) if levels else part)))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    return ImageData(path.stem, *parts, note, warnings=seen.warnings(levels), levels=levels)


def _one_channel(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images
    return gray(images) if images.shape[-1] == 3 else images[..., 0]


def _shapes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array, from the headers: the arrays themselves may take long to read."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, _, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file)
                shapes[member.removesuffix(".npy")] = (shape, dtype)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not an .npz file of arrays: {error}") from error
    return shapes
