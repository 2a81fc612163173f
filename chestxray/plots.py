"""Figures from tables and images, each returned as a matplotlib Figure.

It owns how the study's figures look: colours that colour-blind readers can tell apart, sizes that read at the width of
a notebook, and a title that says which data the figure shows. It computes no metric, and knows nothing of files but how
to save a figure.

Every function takes a `title` that says what is shown, and a `note` that says on which data (`Study.data_note`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

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
    """A figure unknown to pyplot, so that no list of open figures keeps it, that a notebook shows as a static PNG.

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
                position[best], last[best], "*", color=PALETTE[3], markersize=13, label=f"best {decimal(last[best])}"
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
            label=f"{name.replace('_', ' ')} {decimal(curve['auroc'].iloc[0])}",
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
        return decimal(entry["estimate"])
    return f"{decimal(entry['estimate'])} [{decimal(entry['low'])}, {decimal(entry['high'])}]"


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
    figure.pictures = True
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
    figure.pictures = True
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


def decimal(value: float) -> str:
    """`.712`, as the field writes shares; `-.012`; `1.000`."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and not text.lstrip("-").startswith("1") else text


def shares(table: pd.DataFrame, title: str, note: str = "", label: str = "") -> Figure:
    """Bars of one quantity by category, a bar for each column.

    Args:
        table: categories as index, one column a group, values as drawn.
        title: what is shown.
        note: the data.
        label: the name of the value axis.
    """
    figure, axes = _canvas(1, 1, WIDTH, 1.1 + 0.34 * len(table) + 0.08 * table.size)
    axis = axes[0, 0]
    height = 0.8 / len(table.columns)
    for number, name in enumerate(table.columns):
        places = np.arange(len(table)) - 0.4 + (number + 0.5) * height
        axis.barh(places, table[name], height, color=PALETTE[number], label=str(name))
    axis.set(yticks=range(len(table)), yticklabels=[str(name).replace("_", " ") for name in table.index], xlabel=label)
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    if len(table.columns) > 1:
        axis.legend(frameon=False, fontsize="small")
    sns.despine(ax=axis)
    return _titled(figure, title, note)


def people(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Age by sex, images by view, and how many images a patient has.

    Args:
        table: one row an image; `patient`, `age`, `sex`, `view`.
        title: what is shown.
        note: the data.
    """
    figure, axes = _canvas(1, 3, WIDTH, 3.2)
    ages, views, counts = axes[0]
    for number, (sex, name) in enumerate((("F", "women"), ("M", "men"))):
        values = table.loc[table["sex"] == sex, "age"].dropna().to_numpy(dtype=float)
        if len(values):
            ages.hist(
                values, bins=np.arange(0, 101, 5), histtype="step", linewidth=1.8, color=PALETTE[number], label=name
            )
    ages.set(xlabel="age, years", ylabel="images", title="age by sex")
    ages.legend(frameon=False, fontsize="small")
    by_view = table["view"].replace("", "unknown").value_counts()
    views.bar(by_view.index, by_view.to_numpy(), color=PALETTE[2])
    views.set(title="view position")
    views.bar_label(views.containers[0], labels=[f"{n / len(table):.0%}" for n in by_view], fontsize=8)
    each = table.groupby("patient").size().clip(upper=20).value_counts().reindex(range(1, 21), fill_value=0)
    counts.bar(each.index, each.to_numpy(), color=PALETTE[4])
    counts.set(xlabel="images a patient", ylabel="patients", title="images a patient", yscale="log")
    counts.set_xticks((1, 5, 10, 15, 20), ("1", "5", "10", "15", "20+"))
    for axis in axes.flat:
        sns.despine(ax=axis)
    return _titled(figure, title, note)


def co_occurrence(counts: pd.DataFrame, lift: pd.DataFrame, title: str, note: str = "") -> Figure:
    """How many images show both findings, beside how many times as many as chance would give.

    Args:
        counts: what `cohort.co_occurrence` returned.
        lift: what `cohort.lift` returned.
        title: what is shown.
        note: the data.
    """
    names = [name.replace("_", " ") for name in counts.columns]
    figure, axes = _canvas(1, 2, 13.5, 6.4)
    common = {"square": True, "linewidths": 0.5, "xticklabels": names, "yticklabels": names}
    brief = counts.map(lambda n: f"{n / 1000:.1f}k" if n >= 1000 else str(n))
    colours = np.log1p(counts)
    bar = {"shrink": 0.7}
    sns.heatmap(colours, ax=axes[0, 0], annot=brief, fmt="", cmap="Blues", cbar=False, annot_kws={"size": 7}, **common)
    times = np.log2(lift.clip(lower=1 / 16))
    sns.heatmap(
        times,
        ax=axes[0, 1],
        annot=lift,
        fmt=".1f",
        cmap="vlag",
        vmin=-2,
        vmax=2,
        annot_kws={"size": 7},
        cbar_kws=bar | {"label": "observed / expected", "ticks": [-2, -1, 0, 1, 2]},
        **common,
    )
    axes[0, 1].collections[0].colorbar.set_ticklabels(["¼", "½", "1", "2", "4"])
    for axis, name in zip(axes.flat, ("images (diagonal: all with the finding)", "times chance"), strict=True):
        axis.set_title(name, fontsize="medium")
        axis.tick_params(axis="both", labelsize=8)
        for text in axis.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    return _titled(figure, title, note)


def lesion_boxes(
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[float]],
    titles: Sequence[str],
    title: str,
    note: str = "",
    columns: int = 7,
    caption: str = "",
) -> Figure:
    """Radiographs with the box that a radiologist drew.

    Args:
        images: (H, W) arrays, grey 0 to 255.
        boxes: x, y, width and height for each, in shares of the side from the top left.
        titles: one for each image.
        title: what is shown.
        note: the data.
        columns: images a row.
        caption: small print below.
    """
    figure = image_grid(images, titles, title, note, columns, caption)
    for axis, image, (x, y, width, height) in zip(figure.axes, images, boxes, strict=False):
        rows, across = np.squeeze(image).shape
        frame = Rectangle(
            (x * across, y * rows), width * across, height * rows, fill=False, color=PALETTE[1], linewidth=1.4
        )
        axis.add_patch(frame)
    return figure


def grey_levels(histograms: pd.DataFrame, by_view: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Grey-level histograms by class and by view.

    Args:
        histograms: one row a class, one column a grey level 0 to 255, shares of pixels.
        by_view: the same for each view.
        title: what is shown.
        note: the data.
    """
    figure, axes = _canvas(1, 2, WIDTH, 3.4)
    views = dict(zip(("PA", "AP"), PALETTE, strict=False))
    for axis, table, colours in ((axes[0, 0], histograms, CLASS_COLOURS), (axes[0, 1], by_view, views)):
        for name, row in table.iterrows():
            smooth = row.rolling(5, center=True, min_periods=1).mean() * 100
            style = {"color": colours.get(name), "linestyle": _DASHES.get(name, "-"), "linewidth": 1.4}
            axis.plot(range(256), smooth, label=str(name).replace("_", " "), **style)
        axis.set(xlabel="grey level", ylabel="% of pixels", xlim=(0, 255))
        axis.legend(frameon=False, fontsize="x-small")
        sns.despine(ax=axis)
    axes[0, 0].set_ylim(0, 1.3 * 100 * histograms.iloc[:, 8:248].to_numpy().max())
    axes[0, 1].set_ylim(0, 1.3 * 100 * by_view.iloc[:, 8:248].to_numpy().max())
    return _titled(figure, title, note)


def distributions(table: pd.DataFrame, columns: Sequence[str], title: str, note: str = "") -> Figure:
    """Box plots of plain image numbers by class, the views apart.

    Args:
        table: one row an image; `label`, `view` and `columns`.
        columns: what to show, one panel each.
        title: what is shown.
        note: the data.
    """
    figure, axes = _canvas(1, len(columns), WIDTH, 4.0)
    names = [name for name in CLASSES if name in set(table["label"])]
    for number, (axis, column) in enumerate(zip(axes.flat, columns, strict=True)):
        for shift, view in ((-0.2, "PA"), (0.2, "AP")):
            groups = [table.loc[(table["label"] == name) & (table["view"] == view), column] for name in names]
            boxes = axis.boxplot(
                groups,
                positions=np.arange(len(names)) + shift,
                widths=0.32,
                orientation="horizontal",
                patch_artist=True,
                flierprops={"markersize": 1, "markeredgecolor": _GREY},
                medianprops={"color": "black"},
            )
            for box in boxes["boxes"]:
                box.set(facecolor=PALETTE[0 if view == "PA" else 1], label=view if box is boxes["boxes"][0] else None)
        axis.set(yticks=range(len(names)), yticklabels=[name.replace("_", " ") for name in names], xlabel=column)
        axis.set_xlabel(column.replace("_", " "))
        axis.invert_yaxis()
        if number:
            axis.set_yticklabels([])
        sns.despine(ax=axis)
    axes[0, -1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _titled(figure, title, note)


def mean_images(
    means: Sequence[np.ndarray],
    spreads: Sequence[np.ndarray],
    names: Sequence[str],
    title: str,
    note: str = "",
    caption: str = "",
) -> Figure:
    """The mean of each group's radiographs above their standard deviation.

    Args:
        means: (H, W) arrays, grey levels.
        spreads: the same for the standard deviation; all share one colour scale.
        names: one for each group.
        title: what is shown.
        note: the data.
        caption: small print below.
    """
    figure, axes = _canvas(2, len(names), WIDTH, 2 * WIDTH / len(names) + 0.9)
    figure.pictures = True
    top = max(float(spread.max()) for spread in spreads)
    for place, (mean, spread, name) in enumerate(zip(means, spreads, names, strict=True)):
        axes[0, place].imshow(mean, cmap="gray", vmin=0, vmax=255)
        axes[0, place].set_title(name.replace("_", " "), fontsize=8)
        drawn = axes[1, place].imshow(spread, cmap="magma", vmin=0, vmax=top)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("mean", fontsize=8)
    axes[1, 0].set_ylabel("standard deviation", fontsize=8)
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.8, label="grey levels")
    return _titled(figure, title, note, caption)


def effects(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Effect of each factor on each finding with its interval, a panel a factor; filled where Holm's correction holds.

    Args:
        table: rows of `cohort.correct`; odds ratios are drawn on a log scale, rank-biserial correlations plainly.
        title: what is shown.
        note: the data.
    """
    factors = list(dict.fromkeys(table["factor"]))
    findings = list(dict.fromkeys(table["finding"]))
    figure, axes = _canvas(1, len(factors), 3.6 * len(factors), 1.4 + 0.3 * len(findings))
    for number, (axis, factor) in enumerate(zip(axes.flat, factors, strict=True)):
        rows = table[table["factor"] == factor].set_index("finding").reindex(findings)
        odds = rows["odds_ratio"].notna().any()
        names = ("odds_ratio", "odds_low", "odds_high") if odds else ("effect", "effect_low", "effect_high")
        for place, (_, row) in enumerate(rows.iterrows()):
            value, low, high = row[list(names)]
            if pd.isna(value):
                continue
            sure = row["p_holm"] < 0.05
            axis.plot([low, high], [place, place], color=PALETTE[0], linewidth=1.5)
            axis.plot(
                value, place, "o", color=PALETTE[0], markerfacecolor=PALETTE[0] if sure else "white", markersize=6
            )
        axis.axvline(1 if odds else 0, color=_GREY, linewidth=0.9, linestyle=":")
        axis.set(yticks=range(len(findings)), ylim=(len(findings) - 0.5, -0.5), title=factor)
        axis.set_yticklabels([name.replace("_", " ") for name in findings] if number == 0 else [])
        if odds:
            axis.set_xscale("log")
            ends = axis.get_xlim()
            marks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if ends[1] / ends[0] > 8 else (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
            ticks = [tick for tick in marks if ends[0] <= tick <= ends[1]]
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel("odds ratio" if odds else "rank-biserial correlation")
        axis.grid(axis="both", color="0.92")
        axis.set_axisbelow(True)
        sns.despine(ax=axis)
    return _titled(figure, title, note)


def places(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """How often each model takes each place: a row a model, a column a place, per cent of the draws.

    Args:
        table: what `evaluation.ranking` returned, its index shown.
        title: what is shown.
        note: the data.
    """
    shares = table[[name for name in table if name.startswith("place_")]] * 100
    figure, axes = _canvas(1, 1, 8.6, 1.6 + 0.42 * len(table))
    axis = axes[0, 0]
    sns.heatmap(
        shares,
        ax=axis,
        annot=shares.map(lambda share: f"{share:.0f}" if share >= 0.5 else ""),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=100,
        linewidths=0.5,
        xticklabels=range(1, len(shares.columns) + 1),
        yticklabels=[str(name) for name in table.index],
        cbar_kws={"label": "% of draws of patients"},
    )
    axis.set(xlabel="place among all models", ylabel="")
    axis.tick_params(axis="y", rotation=0)
    return _titled(figure, title, note)


def pairs(table: pd.DataFrame, names: Sequence[str], title: str, note: str = "") -> Figure:
    """Difference of every pair of models, marked where Holm's correction leaves it below .05.

    Args:
        table: one metric of `evaluation.compare_all`: index (`first`, `second`), columns `difference` and `p_holm`.
        names: the models, in the order of rows and columns.
        title: what is shown.
        note: the data.
    """
    gaps = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    text = gaps.astype(object).where(gaps.notna(), "")
    for (first, second), row in table.iterrows():
        for one, other, sign in ((first, second, 1), (second, first, -1)):
            gaps.loc[one, other] = sign * row["difference"]
            text.loc[one, other] = signed(sign * row["difference"]) + ("*" if row["p_holm"] < 0.05 else "")
    figure, axes = _canvas(1, 1, 9.6, 1.8 + 0.46 * len(names))
    axis = axes[0, 0]
    reach = float(np.nanmax(np.abs(gaps.to_numpy()), initial=0.01))
    sns.heatmap(
        gaps.astype(float),
        ax=axis,
        annot=text,
        fmt="",
        cmap="vlag_r",
        vmin=-reach,
        vmax=reach,
        linewidths=0.5,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "row minus column"},
    )
    axis.tick_params(axis="both", rotation=0)
    for label in axis.get_xticklabels():
        label.set(rotation=35, ha="right", rotation_mode="anchor")
    return _titled(figure, title, note, "* told apart after Holm's correction (p below .05)")


def signed(value: float) -> str:
    """`+.012`, `−.034`, `.000`: a difference as the field writes it."""
    text = decimal(abs(value))
    return text if float(f"{value:.3f}") == 0 else ("+" if value > 0 else "−") + text


def reliability(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Reliability diagrams, a panel a class, a curve for each stage of calibration.

    Args:
        points: what `calibration.reliability_table` returned.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(points["class"]))
    figure, axes = _canvas(-(-len(names) // 4), 4, 12.0, 3.1 * -(-len(names) // 4) + 0.6)
    for axis, name in zip(axes.flat, names, strict=False):
        panel = points[points["class"] == name]
        top = 1.08 * max(panel["predicted"].max(), panel["high"].max())
        axis.plot([0, top], [0, top], color=_GREY, linewidth=0.8, linestyle=":")
        for number, (stage, curve) in enumerate(panel.groupby("stage", sort=False)):
            reach = [curve["observed"] - curve["low"], curve["high"] - curve["observed"]]
            style = {"color": PALETTE[number], "marker": "os^D"[number % 4], "markersize": 4, "linewidth": 1.4}
            axis.errorbar(curve["predicted"], curve["observed"], yerr=np.clip(reach, 0, None), label=stage, **style)
        axis.set(xlim=(0, top), ylim=(0, top), title=name.replace("_", " "))
        axis.title.set_fontsize("medium")
        sns.despine(ax=axis)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("share that shows it")
    for axis in axes[-1]:
        axis.set_xlabel("predicted probability")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, frameon=False, loc="center")
    return _titled(figure, title, note)


def decision_curves(curves: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Net benefit of acting on the model, on every radiograph, and on none, a panel a finding.

    Args:
        curves: what `operating.decision_curves` returned.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(curves["finding"]))
    figure, axes = _canvas(2, 3, 12.0, 6.2)
    for axis, name in zip(axes.flat, names, strict=False):
        curve = curves[curves["finding"] == name]
        axis.axhline(0, color="0.2", linewidth=1.0, linestyle=":", label="act on none")
        axis.plot(curve["threshold"], curve["all"], color=_GREY, linestyle="--", label="act on every radiograph")
        axis.fill_between(curve["threshold"], curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
        axis.plot(curve["threshold"], curve["model"], color=PALETTE[0], linewidth=1.8, label="act on the model")
        top = curve[["model", "all", "high"]].to_numpy().max()
        axis.set(ylim=(-0.35 * top, 1.1 * top), xlim=(0, curve["threshold"].max()), title=name)
        axis.title.set_fontsize("medium")
        sns.despine(ax=axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("net benefit")
    for axis in axes[-1]:
        axis.set_xlabel("probability at which one acts")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return _titled(figure, title, note)


def groups(table: pd.DataFrame, titles: dict[str, str], title: str, note: str = "", caption: str = "") -> Figure:
    """Mean AUROC and true-positive rate of each group with its size; hollow where the gap survives Holm's correction.

    Args:
        table: rows `mean` of `groups.measure`: index (`column`, `group`, `metric`).
        titles: what each column is called.
        title: what is shown.
        note: the data.
        caption: small print below.
    """
    order = list(dict.fromkeys((column, group) for column, group, _ in table.index))
    figure, axes = _canvas(1, 2, 12.0, 1.4 + 0.38 * len(order))
    for axis, metric, name in zip(axes.flat, ("auroc", "tpr"), ("AUROC", "true-positive rate"), strict=True):
        for row, key in enumerate(order):
            entry = table.loc[(*key, metric)]
            if entry["too_small"]:
                axis.text(
                    0.5, row, "too few to measure", transform=axis.get_yaxis_transform(), va="center", ha="center"
                )
                continue
            told = entry["p_holm"] < 0.05
            colour = PALETTE[list(titles).index(key[0]) % len(PALETTE)]
            axis.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=1.8)
            axis.plot(entry["estimate"], row, "o", color=colour, markerfacecolor="white" if told else colour)
            axis.text(1.01, row, interval(entry), transform=axis.get_yaxis_transform(), va="center", fontsize="x-small")
        labels = []
        for key in order:
            images = table.loc[(*key, metric), "n_images"]
            labels.append(f"{titles[key[0]]}: {key[1]} ({images:,})")
        axis.set(yticks=range(len(order)), ylim=(len(order) - 0.5, -0.5), xlabel=f"mean {name} of the findings")
        axis.set_yticklabels(labels if axis is axes[0, 0] else [])
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        sns.despine(ax=axis)
    return _titled(figure, title, note, caption)


def heat_maps(
    images: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    boxes: Sequence[Sequence[Sequence[float]]],
    titles: Sequence[str],
    title: str,
    note: str = "",
    columns: int = 6,
    caption: str = "",
) -> Figure:
    """Radiographs under their heat-maps, with the radiologist's boxes.

    Args:
        images: (H, W) or (H, W, 1) arrays, grey 0 to 255.
        maps: (H, W) arrays, 0 to 1, as `explain.Explainer.maps` makes them.
        boxes: for each image (left, top, right, bottom) in shares of the side; may be empty.
        titles: one for each image; may have several lines.
        title: what is shown.
        note: the data.
        columns: images a row.
        caption: small print below.
    """
    figure = image_grid(images, titles, title, note, columns, caption)
    for axis, heat, corners in zip(figure.axes, maps, boxes, strict=False):
        rows, across = heat.shape
        axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.45 * heat)
        for left, top, right, bottom in corners:
            frame = {"fill": False, "edgecolor": PALETTE[9], "linewidth": 1.6}
            size = ((right - left) * across, (bottom - top) * rows)
            axis.add_patch(Rectangle((left * across - 0.5, top * rows - 0.5), *size, **frame))
    return figure


def pointing(
    table: pd.DataFrame, peer: dict[str, float], title: str, note: str = "", ours: str = "heat-map's peak in a box"
) -> Figure:
    """Pointing game of each finding beside the image's centre and a peer's figures.

    Args:
        table: what `explain.localisation` returned.
        peer: a peer's figure for each finding; may be empty.
        title: what is shown.
        note: the data.
        ours: what the model's mark is called.
    """
    names = list(dict.fromkeys(table.index.get_level_values("finding")))
    figure, axes = _canvas(1, 1, 9.6, 1.5 + 0.5 * len(names))
    axis = axes[0, 0]
    kinds = (("pointing", PALETTE[0], "o", ours), ("centre_pointing", PALETTE[7], "s", "image's centre in a box"))
    for shift, (metric, colour, mark, label) in zip((-0.16, 0.16), kinds, strict=True):
        rows = table.xs(metric, level="metric").loc[names]
        reach = [rows["estimate"] - rows["low"], rows["high"] - rows["estimate"]]
        style = {"fmt": mark, "color": colour, "capsize": 3, "markersize": 6, "label": label}
        axis.errorbar(rows["estimate"], np.arange(len(names)) + shift, xerr=np.clip(reach, 0, None), **style)
    known = [(peer[name], row) for row, name in enumerate(names) if name in peer]
    if "reachable" in table.index.get_level_values("metric"):
        most = table.xs("reachable", level="metric").loc[names, "estimate"]
        style = {"color": _GREY, "markersize": 16, "markeredgewidth": 1.6, "linestyle": "none"}
        axis.plot(most, np.arange(len(names)), "|", label="most that maps so coarse can hit", **style)
    if known:
        axis.plot(*zip(*known, strict=True), "D", color=PALETTE[1], markersize=6, label="a peer's figure")
    counts = table.xs("pointing", level="metric")["n_images"]
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlabel="share of images", xlim=(-0.02, 1))
    axis.set_yticklabels([f"{name} ({counts[name]})" for name in names])
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="center right")
    sns.despine(ax=axis)
    return _titled(figure, title, note)


def randomisation(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Rank correlation of heat-maps with the original ones while weights are shuffled from the output on.

    Args:
        table: what `explain.randomisation` returned.
        title: what is shown.
        note: the data.
    """
    figure, axes = _canvas(1, 1, 7.6, 3.6)
    axis = axes[0, 0]
    places = np.arange(len(table) + 1)
    axis.axhline(0, color=_GREY, linewidth=0.9, linestyle=":")
    middle, low, high = ([1.0, *table[name]] for name in ("correlation", "low", "high"))
    axis.fill_between(places, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label="95 % of the images")
    axis.plot(places, middle, "o-", color=PALETTE[0], label="mean")
    names = ["none", *("last layer" if share == 0 else f"{share:.0%}" for share in table["share"])]
    axis.set(xticks=places, xlabel="layers shuffled, from the output on", ylabel="rank correlation", ylim=(-1.02, 1.05))
    axis.set_xticklabels(names)
    axis.legend(frameon=False)
    sns.despine(ax=axis)
    return _titled(figure, title, note)


def robustness(
    table: pd.DataFrame, names: dict[str, tuple[str, str]], title: str, note: str = "", label: str = "macro AUROC"
) -> Figure:
    """A metric against the strength of each degradation.

    Args:
        table: what `robustness.sweep` returned.
        names: title and unit of each degradation.
        title: what is shown.
        note: the data.
        label: the name of the value axis.
    """
    shown = [name for name in names if name in table.index.get_level_values("degradation")]
    rows = -(-len(shown) // 4)
    figure, axes = _canvas(rows, 4, 12.0, 2.9 * rows + 0.6)
    low, high = min(0.45, table["low"].min()), table["high"].max()
    for axis, name in zip(axes.flat, shown, strict=False):
        curve = table.loc[name]
        places = np.arange(len(curve))
        axis.axhline(0.5, color=_GREY, linewidth=0.9, linestyle=":")
        axis.fill_between(places, curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
        axis.plot(places, curve["estimate"], "o-", color=PALETTE[0])
        for place, (_, entry) in enumerate(curve.iterrows()):
            if place and entry["loss_high"] < 0:
                axis.plot(place, entry["estimate"], "o", color=PALETTE[3], markersize=8)
        axis.set(xticks=places, ylim=(low - 0.02, high + 0.02), title=names[name][0], xlabel=names[name][1])
        axis.set_xticklabels([f"{strength:g}" for strength in curve.index])
        axis.title.set_fontsize("medium")
        axis.xaxis.label.set_fontsize("small")
        sns.despine(ax=axis)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    caption = "Filled red: the loss's 95 % interval, paired by patient, lies below zero. Dotted: chance."
    return _titled(figure, title, note, caption)
