"""Draws the pictures of kernels/README.md from the schedules that the kernels follow: ``python kernels/draw_schedules.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from gmrf_kernels.stencils import Offsets, wavefront_slopes
from gmrf_kernels.triton_kernels import schedule
from gmrf_kernels.triton_kernels.wavefronts import block_shifts, plan

PICTURES = Path(__file__).parent / "pictures"


def square(size: int) -> Offsets:
    """Forward offsets (planes, rows, columns) of a patch of ``size`` x ``size`` pixels."""
    reach = size // 2
    return tuple((0, row, column) for row in range(reach + 1) for column in range(-reach, reach + 1) if row > 0 or column > 0)


def draw_wavefronts(size: int = 7, height: int = 10, width: int = 32, sites: int = 4) -> None:
    """A small image, site by site and in blocks: the step in which each is solved, and what one block waits for."""
    offsets = square(size)
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 7), layout="constrained")

    slopes = wavefront_slopes(offsets, 3)
    step = slopes[1] * np.arange(height)[:, None] + np.arange(width)[None, :]
    _draw_steps(above, step, 1, f"single sites: {step.max() + 1} wavefronts, at most {_most_alike(step)} sites in one")

    order = plan(offsets, sites, one_plane=False)
    blocks = width // sites
    step = order.slopes[1] * np.arange(height)[:, None] + np.arange(blocks)[None, :]
    title = f"blocks of {sites} sites: {step.max() + 1} wavefronts, at most {_most_alike(step)} blocks in one"
    _draw_steps(below, step, sites, title)
    row, block = height - 3, 4
    needed = {(row - r, block - s) for _, r, c in offsets for s in block_shifts((c,), sites)} - {(row, block)}
    for r, s in needed:
        below.add_patch(Rectangle((s * sites - 0.5, r - 0.5), sites, 1, fill=False, edgecolor="tab:red", linewidth=2))
    below.add_patch(Rectangle((block * sites - 0.5, row - 0.5), sites, 1, fill=False, edgecolor="black", linewidth=2.5))
    below.set_xlabel("column   (black: a block; red: the blocks whose solutions it needs)")
    figure.suptitle(f"L x = b on {height} × {width} pixels, {size} × {size} stencil: the step that solves each pixel")
    figure.savefig(PICTURES / "wavefronts.png", dpi=110)
    plt.close(figure)


def _draw_steps(axes: plt.Axes, step: np.ndarray, sites: int, title: str) -> None:
    axes.imshow(step.repeat(sites, axis=1) % 8, cmap="Pastel1", aspect="equal")
    for (row, block), t in np.ndenumerate(step):
        axes.text(block * sites + (sites - 1) / 2, row, str(t), ha="center", va="center", fontsize=7)
    axes.set(title=title, ylabel="row")


def _most_alike(step: np.ndarray) -> int:
    return int(np.bincount(step.ravel()).max())


def draw_bands(size: int = 7, side: int = 1024) -> None:
    """The bands of one large image: the steps in which each is at work, were no band ever held up."""
    offsets = square(size)
    chosen = schedule.wavefronts(offsets, (1, side, side), 1, torch.float32)
    order = plan(offsets, chosen.sites, one_plane=True)
    blocks = -(-side // chosen.sites)
    begins = np.arange(0, side, chosen.band) * order.slopes[1]
    length = order.slopes[1] * (chosen.band - 1) + blocks
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    for band, begin in enumerate(begins):
        axes.barh(band, length, left=begin, height=0.8, color="tab:blue")
    axes.invert_yaxis()
    axes.set(xlabel="step", ylabel="band")
    axes.set_title(
        f"One image of {side} × {side} pixels, {size} × {size} stencil: {len(begins)} bands of {chosen.band} rows, "
        f"{begins[-1] + length} steps,\nof which a band takes {length} and begins {order.slopes[1] * chosen.band} "
        "after the band that it follows"
    )
    figure.savefig(PICTURES / "bands.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("agg")
    PICTURES.mkdir(exist_ok=True)
    draw_wavefronts()
    draw_bands()
