"""Images to train on, from wherever a user has them: CelebA, CIFAR10, a folder of images, ``.npz`` arrays, or none of these.

`load_images` finds out what it is given. All data sets have one form, `ImageData`: training and test images as
`torch.utils.data.Dataset` of float32 tensors (1, size, size) in [-1, 1], a name, and a note on where they come from.
"""

import os
from pathlib import Path

from rich.console import Console

from . import arrays, builtin, celeba, cifar10
from .files import load_folder
from .images import DataError, Dequantised, ImageData, stack
from .levels import Levels

__all__ = ["BUILTIN", "VARIABLE", "DataError", "Dequantised", "ImageData", "Levels", "load_images", "stack"]

VARIABLE = "BANDED_GMRF_DATA"
BUILTIN = "builtin"

# Each finds its data sets in a folder, checks quickly whether one comes in a size, and loads it.
_KINDS = (celeba, cifar10, arrays)

_WHAT_TO_GET = f"""no data: give --data PATH or set ${VARIABLE} to one of
  CelebA       a folder with img_align_celeba/ and list_eval_partition.txt, from
               https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
  CIFAR10      a folder with cifar-10-batches-bin/ or cifar-10-batches-py/, from https://www.cs.toronto.edu/~kriz/cifar.html
  images       a folder of image files, perhaps with subfolders train/ and test/
  arrays       an .npz file with uint8 arrays images (count, size, size) and is_test (count), or train and test
or try it without any: --data {BUILTIN} takes patches of the photographs in scikit-image"""


def load_images(
    data: str | os.PathLike | None, size: int, console: Console | None = None, levels: Levels | None = None
) -> ImageData:
    """Find and open a data set.

    Args:
        data: a file, a folder that holds a data set, or "builtin"; None for what $BANDED_GMRF_DATA says.
        size: pixels along each side of an image. CelebA and folders of images are resized to it, others must have it.
        console: where the progress of checking many files is shown; None for nowhere.
        levels: the values of image files and arrays that become black and white; None for all that 8 or 16 bits can hold.

    Raises:
        DataError: nothing given, nothing there, several data sets, or one that cannot be used, as it is or with ``levels``.
    """
    data = data or os.environ.get(VARIABLE)
    if not data:
        raise DataError(_WHAT_TO_GET)
    if data == BUILTIN:
        return builtin.load(size, levels)
    path = Path(data).expanduser().absolute()
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path} is a file but no .npz; a folder of images is given as the folder")
        return arrays.load(path, size, levels)
    if not path.is_dir():
        raise DataError(f"{path} does not exist\n{_WHAT_TO_GET}")
    return _load_from_folder(path, size, levels, console)


def _load_from_folder(folder: Path, size: int, levels: Levels | None, console: Console | None) -> ImageData:
    """The one data set in a folder, or one level deeper, that comes in the size asked for; if none is there, all images."""
    places = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    found = dict.fromkeys((kind, place) for kind in _KINDS for around in places for place in kind.find(around))
    if not found:
        return load_folder(folder, size, levels, console)
    fitting, reasons = [], []
    for kind, place in found:
        try:
            kind.check(place, size, levels)
        except DataError as error:
            reasons.append(str(error))
        else:
            fitting.append((kind, place))
    if not fitting:
        raise DataError("\n  ".join([f"{folder} has nothing that can be used:", *reasons]))
    if len(fitting) > 1:
        names = ", ".join(str(place) for _, place in fitting)
        raise DataError(f"{folder} has several data sets of {size} x {size} pixels: {names}; give one of them with --data")
    kind, place = fitting[0]
    return kind.load(place, size, levels, console)
