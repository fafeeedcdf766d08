"""One image of a file as gray levels: its frame, its orientation, its colours, its range, its central square."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .levels import COLOURS_OF_16_BITS, Levels, Seen

# Others have further images that are no images of the data: a JPEG file may hold its own thumbnail or depth.
_STACKS = {"GIF", "PNG", "TIFF", "WEBP"}
_NEW_SUBFILE_TYPE, _REDUCED = 254, 1  # of TIFF 6.0: a page that is a smaller copy of another


def frame_count(path: Path) -> int:
    """How many images a file has: pages of a TIFF file, frames of an animation."""
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1) if image.format in _STACKS else 1


def read_gray(
    path: Path,
    frame: int = 0,
    *,
    size: int,
    expected: tuple[int, int] | None = None,
    box: tuple[int, int, int, int] | None = None,
    levels: Levels | None = None,
    seen: Seen | None = None,
) -> np.ndarray:
    """One image of a file, cropped to a square, as gray levels (size, size) of uint8.

    Colours become luma (ITU-R BT.601), transparent images are laid over white, values between those of black and white are
    rounded to 8 bits, and the orientation that a camera noted is applied. The resizing averages: a bilinear filter as wide as
    the reduction needs.

    Args:
        path: the file.
        frame: which of its images.
        size: pixels along each side of the result.
        expected: the (width, height) that the file must have; None for any.
        box: (left, upper, right, lower) of the square in the file; None for the largest central one.
        levels: the values that become black and white; None for all of 8 or 16 bits.
        seen: notes the values of the file.

    Raises:
        ValueError: another size than ``expected``, a square smaller than ``size``, values of unknown range, or a page that is a
            smaller copy of another. Pillow raises errors of its own for a broken file.
    """
    with Image.open(path) as image:
        if frame:
            image.seek(frame)
        if expected is not None and image.size != expected:
            raise ValueError(f"{image.width} x {image.height} pixels, expected {expected[0]} x {expected[1]}")
        if frame and image.format == "TIFF" and image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED:
            raise ValueError("a reduced copy of another page")
        upper_bits = image.mode not in ("I", "F") and not image.mode.startswith("I;16") and _has_16_bits(image)
        image = _to_gray(ImageOps.exif_transpose(image), upper_bits, levels, seen)
    if box is None:
        side = min(image.size)
        left, upper = (image.width - side) // 2, (image.height - side) // 2
        box = (left, upper, left + side, upper + side)
    if box[2] - box[0] < size:
        raise ValueError(f"{image.width} x {image.height} pixels, too small for {size} x {size}")
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file has 16 bits for each channel, of which Pillow reads the upper 8 where there are colours."""
    return any(";16" in str(tile[3]) for tile in image.tile)


def _to_gray(image: Image.Image, upper_bits: bool, levels: Levels | None, seen: Seen | None) -> Image.Image:
    if image.mode in ("I", "F"):
        if levels is None:
            raise ValueError(f"values of 32 bits (mode {image.mode}), whose range is not known; --range LOW,HIGH gives it")
        kind, most, values = "files of 32 bits", levels.high, np.asarray(image)
    elif image.mode.startswith("I;16"):  # which Pillow's conversion to 8 bits would clip at 255
        kind, most, values = "files of 16 bits", 65535, np.asarray(image)
    else:
        if upper_bits and levels is not None:
            raise ValueError("colours of 16 bits, of which Pillow reads the upper 8: --range cannot be applied")
        kind, most = (COLOURS_OF_16_BITS if upper_bits else "files of 8 bits"), 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L")
        values = np.asarray(image)
    if seen is not None:
        seen.note(kind, most, values)
    if levels is None and most == 255:
        return image
    return Image.fromarray((levels or Levels(0, most)).to_uint8(values))
