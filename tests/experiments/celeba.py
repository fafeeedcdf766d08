"""CelebA in small, laid out as its original files are."""

import numpy as np
from PIL import Image


def make_celeba(folder, parts="0012", images="img_align_celeba", partition="list_eval_partition.txt"):
    """One 178 x 218 JPEG for each of ``parts``; image i is a ramp from left to right that starts at i."""
    names = [f"{number:06}.jpg" for number in range(1, 1 + len(parts))]
    (folder / images).mkdir(parents=True)
    for start, name in enumerate(names):
        ramp = np.tile(np.arange(178, dtype=np.uint8) + start, (218, 1))
        Image.fromarray(ramp).convert("RGB").save(folder / images / name, quality=100)
    (folder / partition).parent.mkdir(exist_ok=True)
    (folder / partition).write_text("".join(f"{name} {part}\n" for name, part in zip(names, parts, strict=True)))
    return folder / images
