"""Figures from tables and images, each returned as a matplotlib Figure.

It owns how the study's figures look: colours that colour-blind readers can tell apart, sizes that read at the width of
a notebook, and a title that says which data the figure shows. It computes no metric, and knows nothing of files but how
to save a figure.

Every function takes a `title` that says what is shown, and a `note` that says on which data (`Study.data_note`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chestxray.config import CLASSES
from chestxray.files import atomic_write

WIDTH = 10.0
"""Width of a figure in inches: fills a notebook's column at `DPI`."""
DPI = 90
PALETTE = sns.color_palette("colorblind")
CLASS_COLOURS = dict(zip(CLASSES, PALETTE, strict=False))
_DASHES = dict(zip(CLASSES, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (2, 1))), strict=True))
_GREY = "0.45"
_STAGE_TEXT = {"ha": "center", "va": "bottom", "fontsize": "small", "color": _GREY}


class NotebookFigure(Figure):
    """A figure unknown to pyplot, so that no list of open figures keeps it, that a notebook shows as a static PNG."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()


def save(figure: NotebookFigure, path: Path) -> Path:
    """Write a figure as PNG, complete or not at all, and return its path."""
    atomic_write(path, figure._repr_png_())
    return path


def learning_curves(history: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Loss, accuracy and validation macro AUROC after each epoch, training beside validation.

    Stages of a fit (`all_findings`, `head`, `fine_tune`) follow each other on one axis, parted by a line and not
    joined, since they may minimise different losses. The last stage's epoch of best validation macro AUROC is marked.

    Args:
        history: a model's `history.csv`; a column that a stage doesn't have may be empty or missing.
        title: what is shown, usually the model's name.
        note: the data.
    """
    panels = (
        ("Loss", "loss", "val_loss"),
        ("Accuracy", "accuracy", "val_accuracy"),
        ("Macro AUROC", None, "val_macro_auroc"),
    )
    panels = tuple(panel for panel in panels if _holds(history, panel[1]) or _holds(history, panel[2]))
    figure, axes = _canvas(1, len(panels), WIDTH, 3.4)
    position = pd.Series(np.arange(1, len(history) + 1), index=history.index)
    stages = _runs(history["stage"]) if "stage" in history else [("", 0, len(history))]
    for axis, (name, train, valid) in zip(axes.flat, panels, strict=True):
        for column, colour, mark, label in ((train, PALETTE[0], "o", "train"), (valid, PALETTE[1], "s", "validation")):
            for number, (_, start, stop) in enumerate(stages):
                if not _holds(history, column):
                    continue
                part = slice(start, stop)
                lines = {"color": colour, "marker": mark, "markersize": 4, "label": label if number == 0 else None}
                axis.plot(position.iloc[part], pd.to_numeric(history[column]).iloc[part], **lines)
        for stage, start, stop in stages if len(stages) > 1 else ():
            if start:
                axis.axvline(start + 0.5, color=_GREY, linewidth=0.8, linestyle=":")
            middle = (start + stop + 1) / 2
            axis.text(middle, 1.0, stage.replace("_", " "), transform=axis.get_xaxis_transform(), **_STAGE_TEXT)
        axis.set(xlabel="epoch", ylabel=name, xlim=(0.4, len(history) + 0.6))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.legend(frameon=False, fontsize="small")
    if panels and panels[-1][2] == "val_macro_auroc":
        _, start, stop = stages[-1]
        last = pd.to_numeric(history["val_macro_auroc"]).iloc[start:stop]
        if last.notna().any():
            best = last.idxmax()
            axis.plot(
                position[best], last[best], "*", color=PALETTE[3], markersize=13, label=f"best {_decimal(last[best])}"
            )
            axis.legend(frameon=False, fontsize="small")
    return _titled(figure, title, note)


def confusion_matrix(table: pd.DataFrame, title: str, note: str = "", axis: Axes | None = None) -> Figure:
    """One confusion matrix, counts or row shares as the table holds them.

    Args:
        table: what `evaluation.confusion` returned; floats are shown as per cent of the row.
        title: what is shown; say which split.
        note: the data.
        axis: draw into this axis of an existing figure instead of a new one.
    """
    shares = not all(np.issubdtype(kind, np.integer) for kind in table.dtypes)
    if axis is None:
        figure, axes = _canvas(1, 1, 7.2, 5.8)
        _titled(figure, title, note)
        axis = axes[0, 0]
    else:
        figure = axis.figure
        axis.set_title(title, fontsize="medium")
    values = table * 100 if shares else table
    names = [name.replace("_", " ") for name in table.columns]
    sns.heatmap(
        values,
        ax=axis,
        annot=True,
        fmt=".0f" if shares else "d",
        cmap="Blues",
        vmin=0,
        vmax=100 if shares else None,
        square=True,
        linewidths=0.5,
        xticklabels=names,
        yticklabels=[name.replace("_", " ") for name in table.index],
        cbar_kws={"label": "% of the true class" if shares else "images", "shrink": 0.8},
        annot_kws={"fontsize": 9},
    )
    axis.set(xlabel="predicted", ylabel="true")
    axis.tick_params(axis="x", rotation=40)
    axis.tick_params(axis="y", rotation=0)
    for text in axis.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    return figure


def confusion_matrices(counts: pd.DataFrame, shares: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Counts and row shares of the same confusion matrix side by side."""
    figure, axes = _canvas(1, 2, 12.5, 5.4)
    confusion_matrix(counts, "images", axis=axes[0, 0])
    confusion_matrix(shares, "per cent of the true class", axis=axes[0, 1])
    return _titled(figure, title, note)


def roc_curves(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """One-vs-rest ROC curve of each class, with its area in the legend.

    Args:
        points: what `evaluation.roc_points` returned.
        title: what is shown; say which split.
        note: the data.
    """
    figure, axes = _canvas(1, 1, 6.6, 6.0)
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":", label="chance .500")
    for name, curve in points.groupby("class", sort=False):
        axis.plot(
            curve["false_positive_rate"],
            curve["true_positive_rate"],
            color=CLASS_COLOURS.get(name),
            linestyle=_DASHES.get(name, "-"),
            linewidth=1.8,
            label=f"{name.replace('_', ' ')} {_decimal(curve['auroc'].iloc[0])}",
        )
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axis.legend(frameon=False, title="AUROC", loc="lower right")
    return _titled(figure, title, note)


def forest(table: pd.DataFrame, title: str, note: str = "", chance: float | None = None, label: str = "") -> Figure:
    """Estimates with their intervals, one row each, first row at the top, the numbers written beside.

    Args:
        table: one row an estimate; columns `estimate`, `low`, `high`; the index is shown.
        title: what is shown.
        note: the data.
        chance: draw a line at this value.
        label: the name of the axis.
    """
    figure, axes = _canvas(1, 1, 8.6, 1.3 + 0.36 * len(table))
    axis = axes[0, 0]
    rows = np.arange(len(table))[::-1]
    if chance is not None:
        axis.axvline(chance, color=_GREY, linewidth=0.9, linestyle=":")
    reach = [table["estimate"] - table["low"], table["high"] - table["estimate"]]
    axis.errorbar(table["estimate"], rows, xerr=reach, fmt="o", color=PALETTE[0], capsize=3, markersize=6)
    for row, (_, entry) in zip(rows, table.iterrows(), strict=True):
        text = "too few images" if pd.isna(entry["estimate"]) else interval(entry)
        axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize="small")
    axis.set(yticks=rows, yticklabels=[str(name) for name in table.index], xlabel=label, ylim=(-0.6, len(table) - 0.4))
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    return _titled(figure, title, note)


def interval(entry: pd.Series) -> str:
    """`.712 [.690, .734]` from a row with `estimate`, `low` and `high`; `.712` alone where there is no interval."""
    if pd.isna(entry["low"]):
        return _decimal(entry["estimate"])
    return f"{_decimal(entry['estimate'])} [{_decimal(entry['low'])}, {_decimal(entry['high'])}]"


def image_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], title: str, note: str = "", columns: int = 6, caption: str = ""
) -> Figure:
    """Radiographs in rows, each with its own title.

    Args:
        images: (H, W) or (H, W, 1) arrays, grey 0 to 255.
        titles: one for each image; may have several lines.
        title: what is shown.
        note: the data.
        columns: images a row.
        caption: small print below, such as the acknowledgement that real radiographs carry.
    """
    columns = min(columns, max(1, len(images)))
    rows = -(-len(images) // columns)
    lines = max((text.count("\n") + 1 for text in titles), default=1)
    side = WIDTH / columns
    figure, axes = _canvas(rows, columns, WIDTH, rows * (side + 0.18 * lines) + 0.6)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, titles, strict=False):
        axis.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
        axis.set_title(text, fontsize=8)
    return _titled(figure, title, note, caption)


def probability_grid(
    images: Sequence[np.ndarray],
    predictions: pd.DataFrame,
    title: str,
    note: str = "",
    columns: int = 3,
    caption: str = "",
) -> Figure:
    """Radiographs, each beside the model's seven probabilities, the true class in a second colour.

    Args:
        images: (H, W) or (H, W, 1) arrays, grey 0 to 255, in the order of the rows of `predictions`.
        predictions: rows of a predictions table; `label` is the true class, or empty.
        title: what is shown.
        note: the data.
        columns: images a row.
        caption: small print below.
    """
    columns = min(columns, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure, axes = _canvas(rows, 2 * columns, 4.2 * columns, 1.9 * rows + 0.7)
    for axis in axes.flat:
        axis.axis("off")
    for number, (image, (_, row)) in enumerate(zip(images, predictions.iterrows(), strict=True)):
        picture, bars = axes[number // columns, 2 * (number % columns) : 2 * (number % columns) + 2]
        picture.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
        truth = row.get("label", "")
        picture.set_title((truth or "several findings").replace("_", " "), fontsize=9)
        bars.axis("on")
        colours = [PALETTE[1] if name == truth else PALETTE[0] for name in CLASSES]
        bars.barh(range(len(CLASSES)), [row[name] for name in CLASSES], color=colours)
        bars.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=range(len(CLASSES)))
        bars.set_yticklabels([name.replace("_", " ") for name in CLASSES], fontsize=7)
        bars.tick_params(axis="x", labelsize=7)
        bars.invert_yaxis()
        sns.despine(ax=bars)
    return _titled(figure, title, note, caption)


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _titled(figure: Figure, title: str, note: str, caption: str = "") -> Figure:
    figure.suptitle(f"{title} ({note})" if note else title, fontsize="large")
    if caption:
        figure.supxlabel(caption, fontsize=7, color=_GREY)
    return figure


def _holds(table: pd.DataFrame, column: str | None) -> bool:
    return column is not None and column in table and bool(table[column].notna().any())


def _runs(stages: pd.Series) -> list[tuple[str, int, int]]:
    """Consecutive equal stages as (name, first row, one past the last row)."""
    starts = np.flatnonzero((stages != stages.shift()).to_numpy())
    stops = np.r_[starts[1:], len(stages)]
    return [(str(stages.iloc[start]), int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def _decimal(value: float) -> str:
    """`.712`, as the field writes shares; `-.012`; `1.000`."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and not text.lstrip("-").startswith("1") else text
