"""Figures that the experiments share. Images and residuals are (count, height, width) tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

# Of curves that a legend names: colours alone do not tell everyone which is which.
_CURVES = mpl.cycler(color=mpl.color_sequences["tab10"]) + mpl.cycler(
    linestyle=["-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))] * 2
)
_INCHES_OF_LETTER = 0.07
_STYLE = {"font.size": 9, "axes.titlesize": 9, "savefig.dpi": 150, "lines.linewidth": 1.2}


@dataclass
class Column:
    """One column of `image_grid`: an image per row, its title, and the group of columns that share a colour scale."""

    title: str
    images: Tensor
    scale: str


def _show(ax: Axes, image: Tensor, cmap: str, low: float, high: float) -> AxesImage:
    ax.set_xticks([])
    ax.set_yticks([])
    return ax.imshow(image.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def image_grid(
    path: Path,
    columns: Sequence[Column],
    scales: dict[str, tuple[str, str, float, float]],
    row_labels: Sequence[str],
    size: float = 1.15,
) -> None:
    """Images in rows and columns, with one colour bar below for each colour scale.

    Args:
        path: PNG file to write.
        columns: the columns.
        scales: for each scale a label, a colour map, and the values at its two ends.
        row_labels: shown at the left of each row.
        size: of an image, in inches.
    """
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(size * len(columns) + 0.3, size * len(row_labels) + 1.3), layout="constrained")
        axes = fig.subplots(len(row_labels), len(columns), squeeze=False)
        shown = {}
        for i, column in enumerate(columns):
            _, cmap, low, high = scales[column.scale]
            axes[0, i].set_title(column.title)
            for ax, image in zip(axes[:, i], column.images, strict=True):
                shown[column.scale] = _show(ax, image, cmap, low, high)
        for ax, label in zip(axes[:, 0], row_labels, strict=True):
            ax.set_ylabel(label)
        for name, (label, *_) in scales.items():
            members = [i for i, column in enumerate(columns) if column.scale == name]
            # The ends are chosen by whoever calls: there may be values beyond them.
            bar = fig.colorbar(
                shown[name],
                extend="both",
                ax=axes[:, members].ravel().tolist(),
                location="bottom",
                aspect=14 * len(members),
                pad=0.03,
            )
            bar.set_label(label)
        fig.savefig(path)


def correlation_figure(path: Path, patches: Tensor, correlations: Tensor, sites: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Each patch beside maps of the correlation of some of its pixels with all others.

    Args:
        path: PNG file to write.
        patches: (count, height, width) gray values in [0, 1].
        correlations: (count, pixels, height, width).
        sites: for each patch the (row, column) of each of its pixels.
    """
    count, pixels = correlations.shape[:2]
    size = 1.45
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(size * (1 + pixels) + 0.9, size * count + 0.3), layout="constrained")
        axes = fig.subplots(count, 1 + pixels, squeeze=False)
        for row, patch, maps, places in zip(axes, patches, correlations, sites, strict=True):
            _show(row[0], patch, "gray", 0, 1)
            for number, (ax, image, (y, x)) in enumerate(zip(row[1:], maps, places, strict=True), start=1):
                shown = _show(ax, image, "RdBu_r", -1, 1)
                ax.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.8)
                row[0].plot(x, y, "o", markersize=9, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8)
                row[0].text(x, y, str(number), ha="center", va="center_baseline", fontsize=7)
        axes[0, 0].set_title("input")
        for number in range(1, 1 + pixels):
            axes[0, number].set_title(f"pixel {number}")
        fig.colorbar(shown, ax=axes[:, 1:].ravel().tolist(), shrink=0.8, aspect=30).set_label("correlation")
        fig.savefig(path)


def loss_figure(path: Path, panels: Sequence[tuple[str, dict[str, Sequence[float]]]], smooth: int, unit: str = "step") -> None:
    """Training curves, one panel for each loss, as means over ``smooth`` consecutive steps.

    Args:
        path: PNG file to write.
        panels: the label of the vertical axis, and for each curve its name and the loss of every step.
        smooth: steps in each mean.
        unit: what the horizontal axis counts.
    """
    with mpl.rc_context(_STYLE):
        across = min(2, len(panels))  # more in a row cannot be read on a page
        down = -(-len(panels) // across)
        longest = max((len(name) for _, curves in panels for name in curves), default=0)
        width = 4.0 + _INCHES_OF_LETTER * longest  # of the axes, and of the legend beside them
        fig = Figure(figsize=(width * across, 2.6 * down), layout="constrained")
        axes = fig.subplots(down, across, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, (label, curves) in zip(axes, panels, strict=False):
            ax.set_prop_cycle(_CURVES)
            for name, losses in curves.items():
                ends = range(smooth, len(losses) + 1, smooth)
                ax.plot(list(ends), [sum(losses[end - smooth : end]) / smooth for end in ends], label=name)
            ax.set_xlabel(unit)
            ax.set_ylabel(label)
            ax.spines[["top", "right"]].set_visible(False)
            # Beside the axes: within them it would lie over one curve or another.
            ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        fig.savefig(path)


def normal_plot(path: Path, curves: dict[str, dict[str, float]]) -> None:
    """Quantiles against those of a standard normal distribution.

    Args:
        path: PNG file to write.
        curves: for each model the quantile of each level, which is a text.
    """
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(6.4, 4.0), layout="constrained")
        ax = fig.subplots()
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":", label="normal")
        for name, quantiles in curves.items():
            expected = [NormalDist().inv_cdf(float(level)) for level in quantiles]
            ax.plot(expected, list(quantiles.values()), marker=".", label=name)
        ax.set_xlabel("quantile of a standard normal distribution")
        ax.set_ylabel("of whitened residuals")
        ax.spines[["top", "right"]].set_visible(False)
        fig.legend(loc="outside right center", frameon=False)
        fig.savefig(path)


def line_grid(path: Path, means: Tensor, panels: dict[str, Tensor], axis_label: str) -> None:
    """Signals in rows, and in each panel of a row its mean with other signals over it; all on one scale.

    Args:
        path: PNG file to write.
        means: (count, length), drawn in black in each panel.
        panels: for each its title and its signals (number, count, length).
        axis_label: what the positions count.
    """
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(2.4 * len(panels) + 0.4, 1.35 * len(means) + 0.6), layout="constrained")
        axes = fig.subplots(len(means), len(panels), squeeze=False, sharex=True, sharey=True)
        for row, mean, *signals in zip(axes, means, *(values.unbind(1) for values in panels.values()), strict=True):
            for ax, lines in zip(row, signals, strict=True):
                for line in lines:
                    ax.plot(line.numpy(), linewidth=0.8)
                ax.plot(mean.numpy(), color="black")
                ax.spines[["top", "right"]].set_visible(False)
        for ax, title in zip(axes[0], panels, strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel(axis_label)
        fig.savefig(path)


def coverage_figure(path: Path, levels: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """How often the sum of squares of whitened residuals lies below each quantile of χ², against the quantile's level.

    Args:
        path: PNG file to write.
        levels: the levels of the quantiles.
        curves: for each model the share of signals below each quantile.
    """
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(6.0, 3.4), layout="constrained")
        ax = fig.subplots()
        ax.plot([0, 1], [0, 1], color="black", linewidth=0.6, label="ideal")
        ax.set_prop_cycle(_CURVES)
        for name, shares in curves.items():
            ax.plot(levels, shares, label=name)
        ax.set_xlabel("level of the χ² quantile")
        ax.set_ylabel("share of test signals below it")
        ax.spines[["top", "right"]].set_visible(False)
        fig.legend(loc="outside right center", frameon=False)
        fig.savefig(path)
