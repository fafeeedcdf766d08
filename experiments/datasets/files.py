"""Images that stay on disk: read, cropped and resized one by one on access, so that a data set need not fit in memory."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from .. import distributed
from .images import DataError, ImageData, listed, to_tensor

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load_folder(folder: Path, size: int, console: Console | None = None) -> ImageData:
    """All image files below a folder, split by its subfolders ``train`` and ``test``, or else by name.

    Without those subfolders a tenth of the files, by a hash of their paths, are test images: an order that has nothing to do
    with what the images show, and that does not change from run to run.

    Raises:
        DataError: no images, or none for training or for testing.
    """
    visible = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    names = [path.as_posix() for path in visible if path.suffix.lower() in _SUFFIXES]
    left_out = [f"{path.as_posix()}: no image by its name" for path in visible if path.suffix.lower() not in _SUFFIXES]
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}); other files: {listed(left_out)}")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = ([name for name in names if name.startswith(part)] for part in ("train/", "test/"))
        left_out += [f"{name}: in neither train/ nor test/" for name in names if not name.startswith(("train/", "test/"))]
        split = "training and test images by subfolder"
    else:
        shuffled = sorted(names, key=lambda name: zlib.crc32(name.encode()))
        test_count = max(1, len(names) // 10)
        train, test = sorted(shuffled[test_count:]), sorted(shuffled[:test_count])
        split = "a tenth of the files, by a hash of their names, are the test images"
    counts = Counter(Path(name).suffix.lower() for name in names)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))
    note = f"image files ({suffixes}), their central squares in gray, resized to {size} x {size}; {split}"
    return load_files(folder.name, folder, train, test, partial(read_gray, size=size), note, console, left_out)


def load_files(
    name: str,
    folder: Path,
    train: list[str],
    test: list[str],
    read: Callable[[Path], np.ndarray],
    note: str,
    console: Console | None = None,
    left_out: Sequence[str] = (),
) -> ImageData:
    """The files ``train`` and ``test`` of ``folder`` as `ImageFiles`, without those that ``read`` cannot read.

    Every file is read once for this, in threads and by one of the processes of torchrun: a training should not end at a broken
    one after hours.

    Raises:
        DataError: no file can be read.
    """

    def problem(file: str) -> str | None:
        try:
            read(folder / file)
        except Exception as error:  # decoders raise errors of many kinds for a broken file
            return f"{file}: {error}"
        return None

    files = train + test
    # Parts of one size: were the first process to check all, the others might give up waiting for it.
    own = files[distributed.rank() :: distributed.world_size()]
    with ThreadPool() as pool:
        reasons = track(
            pool.imap(problem, own, chunksize=64),
            f"checking {name}",
            total=len(own),
            console=console,
            disable=console is None,
        )
        found = {file: reason for file, reason in zip(own, reasons, strict=True) if reason is not None}
    of_all = {file: reason for part in distributed.from_all(found) for file, reason in part.items()}
    problems = {file: of_all[file] for file in files if file in of_all}
    if len(problems) == len(files):
        raise DataError(f"no image in {folder} can be used: {listed(list(problems.values()))}")
    usable = (ImageFiles(folder, [file for file in part if file not in problems], read) for part in (train, test))
    return ImageData(name, *usable, note, (*left_out, *problems.values()))


class ImageFiles(Dataset[Tensor]):
    """Image files as float32 tensors (1, size, size) in [-1, 1], read on access.

    Args:
        folder: where the files are.
        names: their paths within it.
        read: a file's path to gray levels (size, size) of uint8.
    """

    def __init__(self, folder: Path, names: list[str], read: Callable[[Path], np.ndarray]):
        self.folder, self.names, self.read = folder, names, read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        path = self.folder / self.names[index]
        try:
            return to_tensor(self.read(path))
        except Exception as error:  # decoders raise errors of many kinds, most of them without the file's name
            raise DataError(f"{path}: {error}") from error


def read_gray(
    path: Path, size: int, expected: tuple[int, int] | None = None, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """One image file, cropped to a square, as gray levels (size, size) of uint8.

    Colours become luma (ITU-R BT.601), transparent images are laid over white, 16 bits are rounded to 8, and the orientation
    that a camera noted is applied. The resizing averages: a bilinear filter as wide as the reduction needs.

    Args:
        path: the file.
        size: pixels along each side of the result.
        expected: the (width, height) that the file must have; None for any.
        box: (left, upper, right, lower) of the square in the file; None for the largest central one.

    Raises:
        ValueError: another size than ``expected``, a square smaller than ``size``, or values of unknown range. Pillow raises
            errors of its own for a broken file.
    """
    with Image.open(path) as image:
        if expected is not None and image.size != expected:
            raise ValueError(f"{image.width} x {image.height} pixels, expected {expected[0]} x {expected[1]}")
        image = _to_gray(ImageOps.exif_transpose(image))
    if box is None:
        side = min(image.size)
        left, upper = (image.width - side) // 2, (image.height - side) // 2
        box = (left, upper, left + side, upper + side)
    if box[2] - box[0] < size:
        raise ValueError(f"{image.width} x {image.height} pixels, too small for {size} x {size}")
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))


def _to_gray(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow's conversion to 8 bits would clip at 255
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"values of 32 bits (mode {image.mode}), whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")
