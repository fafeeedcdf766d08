"""Draw the pictures of kernels/README.md from the plans that the kernels follow: ``python kernels/draw_schedules.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Polygon, Rectangle

from gmrf_kernels.stencils import wavefront_slopes
from gmrf_kernels.triton_kernels import schedule
from gmrf_kernels.triton_kernels.geometry import offsets3
from gmrf_kernels.triton_kernels.wavefronts import Plan, plan

PICTURES = Path(__file__).parent / "pictures"
SEVEN = tuple((i, j) for i in range(4) for j in range(-3, 4) if (i, j) > (0, 0))


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for draw in (draw_wavefronts, draw_bands):
        figure = draw()
        figure.savefig(PICTURES / f"{draw.__name__.removeprefix('draw_')}.png", dpi=120)
        plt.close(figure)


def draw_wavefronts() -> plt.Figure:
    """Steps of a solve with L site by site and block by block, and the windows from which one block takes what it needs."""
    rows, columns, sites = 8, 32, 4
    (slope, _), order = wavefront_slopes(SEVEN, 2), plan(offsets3(SEVEN), sites, one_plane=False)
    figure, (by_site, by_block) = plt.subplots(2, 1, figsize=(11, 7), layout="constrained")
    by_site.set_title(f"7 × 7 stencil, site by site: a row begins {slope} steps after the one before")
    by_block.set_title(f"Blocks of {sites} sites: a row begins {order.slopes[1]} steps after the one before")
    for axes, width, row_slope in ((by_site, 1, slope), (by_block, sites, order.slopes[1])):
        last = row_slope * (rows - 1) + columns // width - 1
        for row in range(rows):
            for block in range(columns // width):
                step = row_slope * row + block
                shade = plt.get_cmap("viridis")(0.15 + 0.85 * step / last)
                axes.add_patch(Rectangle((block * width, row), width, 1, facecolor=shade, edgecolor="white", linewidth=0.8))
                text = {"ha": "center", "va": "center", "color": "white" if step < 0.6 * last else "black"}
                axes.text((block + 0.5) * width, row + 0.5, str(step), fontsize=6 if width == 1 else 9, **text)
        axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row", aspect="equal")
    _mark_windows(by_block, order, row=5, block=3, sites=sites)
    return figure


def _mark_windows(axes: plt.Axes, order: Plan, row: int, block: int, sites: int) -> None:
    """Outline a block, and the blocks in its windows with their ages."""
    axes.add_patch(Rectangle((block * sites, row), sites, 1, fill=False, edgecolor="red", linewidth=3, zorder=3))
    for window in order.windows:
        for age in range(window.youngest, window.oldest + 1):
            before = window.blocks + age - window.youngest
            corner = ((block - before) * sites, row - window.rows)
            axes.add_patch(Rectangle(corner, sites, 1, fill=False, edgecolor="orange", linewidth=2, zorder=2))
            axes.text(corner[0] + 0.25, corner[1] + 0.06, f"age {age}", fontsize=7, ha="left", va="top", color="white")


def draw_bands() -> plt.Figure:
    """When each row of a large image is solved, and by which program."""
    size = 1024
    chosen = schedule.wavefronts(offsets3(SEVEN), (1, size, size), 1, torch.float32)
    order = plan(offsets3(SEVEN), chosen.sites, one_plane=True)
    slope, blocks = order.slopes[1], size // chosen.sites
    figure, (whole, detail) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    whole.set_title(f"{size} × {size}, 7 × 7 stencil: {size // chosen.band} bands of {chosen.band} rows")
    detail.set_title(f"Two bands: a flag every {chosen.steps_per_flag} steps")
    for axes in (whole, detail):
        for band, first in enumerate(range(0, size, chosen.band)):
            rows = (first, first + chosen.band)
            corners = [(slope * rows[0], rows[0]), (slope * rows[0] + blocks, rows[0])]
            corners += [(slope * rows[1] + blocks, rows[1]), (slope * rows[1], rows[1])]
            axes.add_patch(Polygon(corners, facecolor=f"C{band % 4}", alpha=0.75))
        axes.set(xlabel="step", ylabel="row")
    end = slope * size + blocks
    whole.set(xlim=(0, end), ylim=(size, 0))
    middle = end // 2
    active = [
        band for band in range(size // chosen.band) if 0 <= middle - slope * band * chosen.band < blocks + slope * chosen.band
    ]
    whole.axvline(middle, color="black", linewidth=1)
    whole.text(middle + 20, 60, f"{len(active)} programs at work", fontsize=9)

    detail.set(xlim=(0, 2 * slope * chosen.band), ylim=(2 * chosen.band, 0))
    flags = range(chosen.steps_per_flag, 2 * slope * chosen.band, chosen.steps_per_flag)
    detail.plot(flags, [chosen.band - 0.5] * len(flags), "v", color="black", markersize=5, clip_on=False)
    begin = slope * chosen.band
    detail.annotate(
        "the next band begins: it reads\nthe last rows of this one, three\nfor this stencil, past the L1 cache",
        (begin, chosen.band),
        (begin * 0.08, chosen.band * 1.45),
        arrowprops={"arrowstyle": "->"},
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    main()
