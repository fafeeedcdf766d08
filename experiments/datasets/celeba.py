"""CelebA from its original files: ``img_align_celeba/`` with 218 x 178 JPEGs, and ``list_eval_partition.txt``.

Source: Liu, Luo, Wang and Tang, Deep Learning Face Attributes in the Wild, ICCV 2015;
https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html. Train and validation images together train, as in Dorta et al., Structured
Uncertainty Prediction Networks, CVPR 2018. The crop is not in that paper: rows 40 to 188, columns 15 to 163.
"""

from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console

from .files import load_files, split_by_file
from .images import DataError, ImageData, listed
from .levels import Levels
from .pixels import read_gray

_IMAGES, _PARTITION = "img_align_celeba", "list_eval_partition.txt"
# The original download has the images, and the partition, one folder deeper.
_DOWNLOADED, _DOWNLOADED_PARTITION = "Img", "Eval"
_WIDTH_AND_HEIGHT = (178, 218)
_BOX = (15, 40, 163, 188)


def find(folder: Path) -> list[Path]:
    """The folder with CelebA's images and partition, as one or as none: ``folder`` itself, or around that of the images."""
    if folder.name == _IMAGES:
        folder = folder.parent
    if folder.name == _DOWNLOADED:
        folder = folder.parent
    return [folder] if _images(folder).is_dir() else []


def check(folder: Path, size: int, levels: Levels | None = None) -> None:
    """CelebA can be had in any size up to that of its crop.

    Raises:
        DataError: a larger ``size``.
    """
    side = _BOX[2] - _BOX[0]
    if size > side:
        raise DataError(f"CelebA's crop has {side} x {side} pixels, fewer than {size} x {size}")


def load(folder: Path, size: int, levels: Levels | None = None, console: Console | None = None) -> ImageData:
    """CelebA with the official partition.

    Raises:
        DataError: no partition file, one that cannot be read, or one that lists other images than there are.
    """
    check(folder, size)
    images = _images(folder)
    train, test = _read_partition(folder)
    in_partition = {*train, *test}
    present = {path.name for path in images.iterdir() if not path.name.startswith(".")}
    if in_partition != present:
        only_listed, only_present = sorted(in_partition - present), sorted(present - in_partition)
        raise DataError(
            f"{_PARTITION} lists {len(in_partition):,} images, but {images} holds {len(present):,} files. "
            f"Only listed: {listed(only_listed)}. Only in the folder: {listed(only_present)}. "
            "Extract the archive again, or take both from one release."
        )
    left, upper, right, lower = _BOX
    scale = f", {levels}" if levels else ""
    note = (
        f"aligned and cropped JPEGs, rows {upper} to {lower} and columns {left} to {right} in gray{scale}, resized "
        f"to {size} x {size}; official partition, train and validation together for training"
    )
    read = partial(read_gray, size=size, expected=_WIDTH_AND_HEIGHT, box=_BOX, levels=levels)
    split = partial(split_by_file, test=frozenset(test))
    return load_files("CelebA", images, train + test, split, read, note, levels, console)


def _images(folder: Path) -> Path:
    inside = folder / _DOWNLOADED / _IMAGES
    return inside if inside.is_dir() else folder / _IMAGES


def _read_partition(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images for training and of those for testing."""
    path = next((path for path in (folder / _PARTITION, folder / _DOWNLOADED_PARTITION / _PARTITION) if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} holds {_IMAGES} but no {_PARTITION}, which comes with CelebA and says what is for testing")
    train: list[str] = []
    test: list[str] = []
    parts = {"0": train, "1": train, "2": test}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in parts:
            raise DataError(f"{path}, line {number}: {line!r}, expected a file name and 0, 1 or 2")
        parts[words[1]].append(words[0])
    if twice := sorted(name for name, count in Counter(train + test).items() if count > 1):
        raise DataError(f"{path} lists files more than once: {listed(twice)}")
    return train, test
