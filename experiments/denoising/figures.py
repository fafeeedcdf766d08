"""Figure 11 of the SUPN paper for other images and noises, and inpainted images."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..figures import Column, image_grid
from .estimators import BM3D, DENOISER, DIAGONAL_POSTERIOR, INFERRED_POSTERIOR, POSTERIOR, PROJECTION, SECOND_POSTERIOR, VAE
from .inpainting import DRAWS, FILLED, INFERRED, Inpainted

_GRAY = ("gray value", "gray", -1.0, 1.0)
_TITLES = {
    "image": "image",
    "noisy": "noisy",
    DENOISER: "denoising\nautoencoder",
    VAE: "VAE",
    PROJECTION: "projection",
    DIAGONAL_POSTERIOR: "posterior,\ndiagonal",
    POSTERIOR: "posterior\nmean",
    SECOND_POSTERIOR: "encoded\nagain",
    INFERRED_POSTERIOR: "code\ninferred",
    BM3D: BM3D,
}


def draw_estimates(path: Path, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Images, noisy images and all estimates side by side.

    Args:
        path: PNG file to write.
        rows: for each label the images of its rows (count, 1, height, width) by the names of the columns.
    """
    columns = []
    for name, title in _TITLES.items():
        parts = [row[name] for row in rows.values() if name in row]
        if len(parts) == len(rows):
            columns.append(Column(title, torch.cat(parts)[:, 0].cpu(), "gray"))
    labels = [label if first == 0 else "" for label, row in rows.items() for first in range(len(row["image"]))]
    image_grid(path, columns, {"gray": _GRAY}, labels)


def draw_inpainting(
    path: Path, images: Tensor, known: Mapping[str, Tensor], found: Mapping[str, tuple[Tensor, Mapping[str, Inpainted]]]
) -> None:
    """Images, what is known of them, and completions; several images for each mask.

    Args:
        path: PNG file to write.
        images: (count, 1, height, width).
        known: for each mask bool (count, height, width).
        found: their completions, of `inpainting.inpaint`.
    """
    image, count = images[:, 0].cpu(), len(images)

    def rows(of) -> Tensor:
        return torch.cat([of(name).cpu() for name in known])

    columns = [
        Column("image", rows(lambda name: image), "gray"),
        Column("known", rows(lambda name: image.where(known[name].cpu(), torch.nan)), "gray"),
        Column("VAE", rows(lambda name: found[name][0]), "gray"),
    ]
    for method, title in ((FILLED, "code known"), (INFERRED, "code inferred")):
        of = {name: completed[method] for name, (_, completed) in found.items()}
        columns.append(Column(f"{title}:\nmean", rows(lambda name, of=of: of[name].mean), "gray"))
        drawn = [rows(lambda name, of=of, k=k: of[name].samples[k]) for k in range(DRAWS)]
        columns += [Column(f"sample {number}", images, "gray") for number, images in enumerate(drawn, start=1)]
    labels = [name.replace(" missing", "\nmissing") if row == 0 else "" for name in known for row in range(count)]
    image_grid(path, columns, {"gray": _GRAY}, labels)
