"""Images that stay on disk: read, cropped and resized one by one on access, so that a data set need not fit in memory."""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from programs.files import printable

from .. import distributed
from .images import DataError, ImageData, listed, to_tensor
from .levels import Levels, Seen
from .pixels import frame_count, read_gray

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Frame(NamedTuple):
    """One image of a file: its number, counted from 0, of as many as the file has."""

    file: str
    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        return printable(self.file) + (f", frame {self.number + 1}" if self.of > 1 else "")


class Reader(Protocol):
    """Reads a frame of a file as gray levels (size, size) of uint8, and notes its values in ``seen``."""

    def __call__(self, path: Path, frame: int, *, seen: Seen | None = None) -> np.ndarray: ...


# Usable frames to those for training and those for testing.
Split = Callable[[list[Frame]], tuple[list[Frame], list[Frame]]]


def load_folder(folder: Path, size: int, levels: Levels | None = None, console: Console | None = None) -> ImageData:
    """All images below a folder, split by its subfolders ``train`` and ``test``, or else by the names of files.

    Without those subfolders a tenth of the files, by a hash of their paths, are test images: an order that has nothing to do
    with what the images show, and that does not change from run to run. The frames of a file stay together. Of a single file
    the last tenth of the frames are test images.

    Raises:
        DataError: no images, or none for training or for testing.
    """
    visible = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    names = [path.as_posix() for path in visible if path.suffix.lower() in _SUFFIXES]
    others = [path.as_posix() for path in visible if path.suffix.lower() not in _SUFFIXES]
    left_out = [f"{printable(name)}: no image by its name" for name in others]
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}); other files: {listed(left_out)}")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        files = [name for part in ("train/", "test/") for name in names if name.startswith(part)]
        left_out += [f"{printable(name)}: in neither train/ nor test/" for name in names if name not in set(files)]
        split = partial(split_by_file, test=frozenset(name for name in files if name.startswith("test/")))
        how = "training and test images by subfolder"
    elif len(names) == 1:
        files, split, how = names, _last_tenth, "the last tenth of the frames are the test images"
    else:
        shuffled = sorted(names, key=lambda name: zlib.crc32(os.fsencode(name)))
        test_count = max(1, len(names) // 10)
        files = sorted(shuffled[test_count:]) + sorted(shuffled[:test_count])
        split = partial(split_by_file, test=frozenset(shuffled[:test_count]))
        how = "a tenth of the files, by a hash of their names, are the test images"
    counts = Counter(Path(name).suffix.lower() for name in names)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))
    scale = f", {levels}" if levels else ""
    note = f"image files ({suffixes}), their central squares in gray{scale}, resized to {size} x {size}; {how}"
    read = partial(read_gray, size=size, levels=levels)
    return load_files(printable(folder.name), folder, files, split, read, note, levels, console, left_out)


def split_by_file(frames: list[Frame], test: frozenset[str]) -> tuple[list[Frame], list[Frame]]:
    """The frames of all other files, and those of the files ``test``."""
    return [frame for frame in frames if frame.file not in test], [frame for frame in frames if frame.file in test]


def _last_tenth(frames: list[Frame]) -> tuple[list[Frame], list[Frame]]:
    count = max(1, len(frames) // 10)
    return frames[:-count], frames[-count:]


@dataclass
class _Checked:
    """What reading all frames of some files has found: the usable ones, the reasons against others, and the values seen."""

    frames: dict[str, list[Frame]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    def add(self, other: "_Checked") -> None:
        self.frames |= other.frames
        self.problems |= other.problems
        self.seen.add(other.seen)


def load_files(
    name: str,
    folder: Path,
    files: list[str],
    split: Split,
    read: Reader,
    note: str,
    levels: Levels | None = None,
    console: Console | None = None,
    left_out: Sequence[str] = (),
) -> ImageData:
    """All frames of ``files`` of ``folder`` as `ImageFiles`, without those that ``read`` cannot read.

    Every frame is read once for this, in threads and by one of the processes of torchrun: a training should not end at a broken
    one after hours.

    Raises:
        DataError: no file can be read.
    """
    # Parts of one size: were the first process to check all, the others might give up waiting for it.
    own = files[distributed.rank() :: distributed.world_size()]
    checked = _Checked()
    with ThreadPool() as pool:
        found = pool.imap(partial(_check, folder, read), own, chunksize=64)
        for of_file in track(found, f"checking {name}", total=len(own), console=console, disable=console is None):
            checked.add(of_file)
    together = _Checked()
    for part in distributed.from_all(checked):
        together.add(part)
    frames = [frame for file in files for frame in together.frames[file]]
    problems = [problem for file in files for problem in together.problems[file]]
    if not frames:
        raise DataError(f"no image in {folder} can be used: {listed(problems)}")
    stacks = len({frame.file for frame in frames if frame.of > 1})
    if stacks:
        note += f"; {sum(frame.of > 1 for frame in frames):,} of the images are frames of {stacks:,} files with several"
    usable = (ImageFiles(folder, part, read) for part in split(frames))
    return ImageData(name, *usable, note, (*left_out, *problems), together.seen.warnings(levels), levels)


def _check(folder: Path, read: Reader, file: str) -> _Checked:
    """Read all frames of one file."""
    checked = _Checked({file: []}, {file: []})
    try:
        count = frame_count(folder / file)
    except Exception as error:  # decoders raise errors of many kinds for a broken file
        checked.problems[file].append(f"{printable(file)}: {printable(str(error))}")
        return checked
    for frame in (Frame(file, number, count) for number in range(count)):
        try:
            read(folder / file, frame.number, seen=checked.seen)
        except Exception as error:
            checked.problems[file].append(f"{frame}: {printable(str(error))}")
        else:
            checked.frames[file].append(frame)
    return checked


class ImageFiles(Dataset[Tensor]):
    """Image files as float32 tensors (1, size, size) in [-1, 1], read on access.

    Args:
        folder: where the files are.
        frames: the images, their files by paths within the folder.
        read: reads one of them.
    """

    def __init__(self, folder: Path, frames: list[Frame], read: Reader):
        self.folder, self.frames, self.read = folder, frames, read

    @property
    def names(self) -> list[str]:
        """What each image is called: its file, and its frame if the file has several."""
        return [str(frame) for frame in self.frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        frame = self.frames[index]
        try:
            return to_tensor(self.read(self.folder / frame.file, frame.number))
        except Exception as error:  # decoders raise errors of many kinds, most of them without the file's name
            raise DataError(f"{self.folder / str(frame)}: {error}") from error
