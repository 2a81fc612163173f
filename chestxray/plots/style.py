"""Style of all figures: sizes, colours, number formats, grids of images."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from chestxray.config import CLASSES
from chestxray.files import atomic_write

WIDTH = 10.0
"""Width of a figure in inches: fills a notebook's column at `DPI`."""
DPI = 90
PALETTE = sns.color_palette("colorblind")
CLASS_COLOURS = dict(zip(CLASSES, PALETTE, strict=False))
DASHES = dict(zip(CLASSES, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (2, 1))), strict=True))
GREY = "0.45"


class NotebookFigure(Figure):
    """A figure that a notebook shows as a static PNG, and that pyplot does not hold open.

    It is stored in 256 colours, a third of the bytes, and drawn once: what is saved is what was shown.

    Attributes:
        pictures: whether it holds pictures, whose shades are then mixed from dots of these colours.
    """

    pictures = False

    def _repr_png_(self) -> bytes:
        return self._png

    @functools.cached_property
    def _png(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        drawn = Image.open(buffer).convert("RGB")
        few = drawn.quantize(256, method=Image.Quantize.MEDIANCUT)
        colours = np.array(few.getpalette()).reshape(-1, 3)
        colours[(colours >= 248).all(axis=1)] = 255  # the paper: means of near whites would be greys
        few.putpalette(colours.ravel().tolist())
        if self.pictures:
            few = drawn.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG)
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def save(figure: NotebookFigure, path: Path) -> Path:
    """Write a figure as PNG, complete or not at all, and return the path.

    Args:
        figure: which.
        path: of the file.
    """
    atomic_write(path, figure._repr_png_())
    return path


def interval(entry: pd.Series) -> str:
    """`0.712 (0.690–0.734)`, or `−0.012 (−0.050 to 0.020)`, from a row with `estimate`, `low` and `high`.

    Where there is no interval the estimate stands alone.
    """
    estimate, low, high = (decimal(entry[name]) for name in ("estimate", "low", "high"))
    if pd.isna(entry["low"]):
        return estimate
    return f"{estimate} ({low}{' to ' if entry['low'] < 0 else '–'}{high})"


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    title: str,
    note: str = "",
    columns: int = 6,
    caption: str = "",
    maps: Sequence[np.ndarray] = (),
    boxes: Sequence[Sequence[Sequence[float]]] = (),
) -> Figure:
    """Radiographs in rows, each with its own title, on request under heat-maps and with frames.

    Args:
        images: (H, W) or (H, W, 1) arrays, grey 0 to 255.
        titles: one for each image; may have several lines.
        title: what is shown.
        note: the data.
        columns: images per row.
        caption: small print below, such as the acknowledgement that real radiographs carry.
        maps: none, or for each image an (H, W) array, 0 to 1.
        boxes: none, or for each image any number of (left, top, right, bottom) in shares of the side.
    """
    columns = min(columns, max(1, len(images)))
    rows = -(-len(images) // columns)
    lines = max((text.count("\n") + 1 for text in titles), default=1)
    figure, axes = canvas(rows, columns, WIDTH, rows * (WIDTH / columns + 0.18 * lines) + 0.6)
    figure.pictures = True
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, titles, strict=False):
        axis.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
        axis.set_title(text, fontsize=8)
    for axis, heat in zip(axes.flat, maps, strict=False):
        axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.45 * heat)
    for axis, image, corners in zip(axes.flat, images, boxes, strict=False):
        height, width = np.squeeze(image).shape
        for left, top, right, bottom in corners:
            corner, size = (left * width - 0.5, top * height - 0.5), ((right - left) * width, (bottom - top) * height)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=PALETTE[9], linewidth=1.6))
    return titled(figure, title, note, caption)


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes.

    Args:
        rows: of axes.
        columns: of axes.
        width: of the figure in inches.
        height: of the figure in inches.
    """
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(
    titles: Sequence[str], row_height: float, columns: int = 4, xlabel: str = "", ylabel: str = ""
) -> tuple[Figure, np.ndarray]:
    """A figure of panels and its axes, those that are left over empty.

    Args:
        titles: one for each panel.
        row_height: in inches.
        columns: panels a row.
        xlabel: of the bottom row.
        ylabel: of the first column.
    """
    rows = -(-len(titles) // columns)
    figure, axes = canvas(rows, columns, 12.0, row_height * rows + 0.6)
    for axis, title in itertools.zip_longest(axes.flat, titles):
        axis.set_title(title or "", fontsize="medium")
        axis.axis(title is not None)
        sns.despine(ax=axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    return figure, axes


def titled(figure: Figure, title: str, note: str, caption: str = "") -> Figure:
    """Give a figure its title and caption, and return it.

    Args:
        figure: which.
        title: what is shown.
        note: the data, in parentheses behind the title.
        caption: small print below.
    """
    figure.suptitle(f"{title} ({note})" if note else title, fontsize="large")
    if caption:
        figure.supxlabel(caption, fontsize=7, color=GREY)
    return figure


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart of points, the first at the top, with a grid behind them.

    Args:
        axis: which; row k is drawn at height k.
        names: one for each row.
    """
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    axis.set_yticklabels(names)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    sns.despine(ax=axis)


def reach(table: pd.DataFrame, estimate: str = "estimate") -> np.ndarray:
    """Lengths of the error bars to `low` and `high`, (2, n), none below 0.

    Args:
        table: n rows with `low` and `high`.
        estimate: the column that the bars start from.
    """
    return np.clip([table[estimate] - table["low"], table["high"] - table[estimate]], 0, None)


def readable(names: Iterable[object]) -> list[str]:
    """Names as text shows them: `No finding` for `No_finding`."""
    return [str(name).replace("_", " ") for name in names]


def decimal(value: float) -> str:
    """`0.712`; `−0.012`."""
    return f"{value:.3f}".replace("-", "−")


def shares(table: pd.DataFrame, title: str, note: str = "", label: str = "") -> Figure:
    """Bars of one quantity by category, a bar for each column.

    Args:
        table: categories as index, one column a group, values as drawn.
        title: what is shown.
        note: the data.
        label: the name of the value axis.
    """
    figure, [[axis]] = canvas(1, 1, WIDTH, 1.1 + 0.34 * len(table) + 0.08 * table.size)
    table.plot.barh(ax=axis, width=0.8, color=PALETTE, legend=False)
    axis.set(xlabel=label, ylabel="")
    name_rows(axis, readable(table.index))
    if len(table.columns) > 1:
        axis.legend(frameon=False, fontsize="small")
    return titled(figure, title, note)


def signed(value: float) -> str:
    """`+0.012`, `−0.034`, `0.000`: a difference."""
    return ("+" if value >= 0.0005 else "") + decimal(value if abs(value) >= 0.0005 else 0)
