"""Figures from tables and images, each returned as a matplotlib Figure.

It owns how the study's figures look: colours that colour-blind readers can tell apart, sizes that read at the width of
a notebook, and a title that says which data the figure shows. It computes no metric, and knows nothing of files but how
to save a figure.

Every function takes a `title` that says what is shown, and a `note` that says on which data (`Study.data_note`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chestxray.config import CLASSES
from chestxray.plots.style import (
    CLASS_COLOURS,
    DASHES,
    GREY,
    PALETTE,
    canvas,
    decimal,
    interval,
    signed,
    titled,
)


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
        figure, axes = canvas(1, 1, 7.2, 5.8)
        titled(figure, title, note)
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
    figure, axes = canvas(1, 2, 12.5, 5.4)
    confusion_matrix(counts, "images", axis=axes[0, 0])
    confusion_matrix(shares, "per cent of the true class", axis=axes[0, 1])
    return titled(figure, title, note)


def roc_curves(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """One-vs-rest ROC curve of each class, with its area in the legend.

    Args:
        points: what `evaluation.roc_points` returned.
        title: what is shown; say which split.
        note: the data.
    """
    figure, axes = canvas(1, 1, 6.6, 6.0)
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="chance .500")
    for name, curve in points.groupby("class", sort=False):
        axis.plot(
            curve["false_positive_rate"],
            curve["true_positive_rate"],
            color=CLASS_COLOURS.get(name),
            linestyle=DASHES.get(name, "-"),
            linewidth=1.8,
            label=f"{name.replace('_', ' ')} {decimal(curve['auroc'].iloc[0])}",
        )
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axis.legend(frameon=False, title="AUROC", loc="lower right")
    return titled(figure, title, note)


def forest(table: pd.DataFrame, title: str, note: str = "", chance: float | None = None, label: str = "") -> Figure:
    """Estimates with their intervals, one row each, first row at the top, the numbers written beside.

    Args:
        table: one row an estimate; columns `estimate`, `low`, `high`; the index is shown.
        title: what is shown.
        note: the data.
        chance: draw a line at this value.
        label: the name of the axis.
    """
    figure, axes = canvas(1, 1, 8.6, 1.3 + 0.36 * len(table))
    axis = axes[0, 0]
    rows = np.arange(len(table))[::-1]
    if chance is not None:
        axis.axvline(chance, color=GREY, linewidth=0.9, linestyle=":")
    reach = [table["estimate"] - table["low"], table["high"] - table["estimate"]]
    axis.errorbar(table["estimate"], rows, xerr=reach, fmt="o", color=PALETTE[0], capsize=3, markersize=6)
    for row, (_, entry) in zip(rows, table.iterrows(), strict=True):
        text = "too few images" if pd.isna(entry["estimate"]) else interval(entry)
        axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize="small")
    axis.set(yticks=rows, yticklabels=[str(name) for name in table.index], xlabel=label, ylim=(-0.6, len(table) - 0.4))
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    return titled(figure, title, note)


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
    figure, axes = canvas(rows, 2 * columns, 4.2 * columns, 1.9 * rows + 0.7)
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
    return titled(figure, title, note, caption)


def places(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """How often each model takes each place: a row a model, a column a place, per cent of the draws.

    Args:
        table: what `evaluation.ranking` returned, its index shown.
        title: what is shown.
        note: the data.
    """
    shares = table[[name for name in table if name.startswith("place_")]] * 100
    figure, axes = canvas(1, 1, 8.6, 1.6 + 0.42 * len(table))
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
    return titled(figure, title, note)


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
    figure, axes = canvas(1, 1, 9.6, 1.8 + 0.46 * len(names))
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
    return titled(figure, title, note, "* told apart after Holm's correction (p below .05)")


def reliability(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Reliability diagrams, a panel a class, a curve for each stage of calibration.

    Args:
        points: what `calibration.reliability_table` returned.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(points["class"]))
    figure, axes = canvas(-(-len(names) // 4), 4, 12.0, 3.1 * -(-len(names) // 4) + 0.6)
    for axis, name in zip(axes.flat, names, strict=False):
        panel = points[points["class"] == name]
        top = 1.08 * max(panel["predicted"].max(), panel["high"].max())
        axis.plot([0, top], [0, top], color=GREY, linewidth=0.8, linestyle=":")
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
    return titled(figure, title, note)


def decision_curves(curves: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Net benefit of acting on the model, on every radiograph, and on none, a panel a finding.

    Args:
        curves: what `operating.decision_curves` returned.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(curves["finding"]))
    figure, axes = canvas(2, 3, 12.0, 6.2)
    for axis, name in zip(axes.flat, names, strict=False):
        curve = curves[curves["finding"] == name]
        axis.axhline(0, color="0.2", linewidth=1.0, linestyle=":", label="act on none")
        axis.plot(curve["threshold"], curve["all"], color=GREY, linestyle="--", label="act on every radiograph")
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
    return titled(figure, title, note)


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
    figure, axes = canvas(1, 2, 12.0, 1.4 + 0.38 * len(order))
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
    return titled(figure, title, note, caption)
