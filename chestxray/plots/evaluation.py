"""Figures of evaluation: confusion matrices, ROC curves, intervals, pairs, calibration, decision curves, groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chestxray.plots.style import (
    CLASS_COLOURS,
    DASHES,
    GREY,
    PALETTE,
    canvas,
    decimal,
    interval,
    name_rows,
    panels,
    reach,
    readable,
    signed,
    titled,
)


def confusion_matrices(counts: pd.DataFrame, shares: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Counts and row shares of a confusion matrix side by side.

    Args:
        counts: from `metrics.confusion`.
        shares: the same normalised.
        title: what is shown; say which split.
        note: the data.
    """
    figure, [[left, right]] = canvas(1, 2, 12.5, 5.4)
    style = {"annot": True, "annot_kws": {"fontsize": 9}, "cmap": "Blues", "vmin": 0, "square": True, "linewidths": 0.5}
    style |= {"xticklabels": readable(counts.columns), "yticklabels": readable(counts.index)}
    bars = ({"label": "images", "shrink": 0.8}, {"label": "% of the true class", "shrink": 0.8})
    sns.heatmap(counts, ax=left, fmt="d", cbar_kws=bars[0], **style)
    sns.heatmap(shares * 100, ax=right, fmt=".0f", vmax=100, cbar_kws=bars[1], **style)
    for axis, name in ((left, "images"), (right, "per cent of the true class")):
        axis.set_title(name, fontsize="medium")
        axis.set(xlabel="predicted", ylabel="true")
        axis.tick_params(axis="y", rotation=0)
        for text in axis.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")
    return titled(figure, title, note)


def roc_curves(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """One-vs-rest ROC curve of each class, with its area in the legend.

    Args:
        points: from `metrics.roc_points`.
        title: what is shown; say which split.
        note: the data.
    """
    figure, [[axis]] = canvas(1, 1, 6.6, 6.0)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="chance 0.500")
    for name, curve in points.groupby("class", sort=False):
        style = {"color": CLASS_COLOURS.get(name), "linestyle": DASHES.get(name, "-"), "linewidth": 1.8}
        label = f"{name.replace('_', ' ')} {decimal(curve['auroc'].iloc[0])}"
        axis.plot(curve["false_positive_rate"], curve["true_positive_rate"], label=label, **style)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axis.legend(frameon=False, title="AUROC", loc="lower right")
    return titled(figure, title, note)


def forest(table: pd.DataFrame, title: str, note: str = "", chance: float | None = None, label: str = "") -> Figure:
    """Estimates with their intervals, one row each, first row at the top, the numbers written beside.

    Args:
        table: one row per estimate; columns `estimate`, `low`, `high`; the index is shown.
        title: what is shown.
        note: the data.
        chance: draw a line at this value.
        label: the name of the axis.
    """
    figure, [[axis]] = canvas(1, 1, 8.6, 1.3 + 0.36 * len(table))
    rows = np.arange(len(table))
    if chance is not None:
        axis.axvline(chance, color=GREY, linewidth=0.9, linestyle=":")
    axis.errorbar(table["estimate"], rows, xerr=reach(table), fmt="o", color=PALETTE[0], capsize=3, markersize=6)
    for row, (_, entry) in zip(rows, table.iterrows(), strict=True):
        text = "too few images" if pd.isna(entry["estimate"]) else interval(entry)
        axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize="small")
    name_rows(axis, [str(name) for name in table.index])
    axis.set_xlabel(label)
    return titled(figure, title, note)


def pairs(table: pd.DataFrame, names: Sequence[str], title: str, note: str = "") -> Figure:
    """Difference of every pair of models, marked where Holm's correction leaves it below 0.05.

    Args:
        table: one metric of `comparison.compare_all`: index (`first`, `second`), columns `difference` and `p_holm`.
        names: the models, in the order of rows and columns.
        title: what is shown.
        note: the data.
    """
    gaps = table["difference"].unstack().reindex(index=names, columns=names)
    gaps = gaps.fillna(-gaps.T)
    stars = table["p_holm"].unstack().reindex(index=names, columns=names) < 0.05
    text = gaps.map(lambda gap: "" if np.isnan(gap) else signed(gap)) + np.where(stars | stars.T, "*", "")
    figure, [[axis]] = canvas(1, 1, 9.6, 1.8 + 0.46 * len(names))
    largest = float(np.nanmax(np.abs(gaps.to_numpy()), initial=0.01))
    style = {"cmap": "vlag_r", "vmin": -largest, "vmax": largest, "linewidths": 0.5, "annot_kws": {"fontsize": 8}}
    sns.heatmap(gaps.astype(float), ax=axis, annot=text, fmt="", cbar_kws={"label": "row minus column"}, **style)
    axis.tick_params(axis="y", rotation=0)
    for label in axis.get_xticklabels():
        label.set(rotation=35, ha="right", rotation_mode="anchor")
    return titled(figure, title, note, "* differs significantly after Holm's correction (p below 0.05)")


def reliability(points: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Reliability diagrams, one panel per finding, one curve per stage of calibration.

    Args:
        points: from `calibration.reliability_table`.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(points["class"]))
    figure, axes = panels(readable(names), 3.1, 3, "predicted probability", "share that shows it")
    for axis, name in zip(axes.flat, names, strict=False):
        panel = points[points["class"] == name]
        top = 1.08 * max(panel["predicted"].max(), panel["high"].max())
        axis.plot([0, top], [0, top], color=GREY, linewidth=0.8, linestyle=":")
        for number, (stage, curve) in enumerate(panel.groupby("stage", sort=False)):
            style = {"color": PALETTE[number], "marker": "os^D"[number % 4], "markersize": 4, "linewidth": 1.4}
            axis.errorbar(curve["predicted"], curve["observed"], yerr=reach(curve, "observed"), label=stage, **style)
        axis.set(xlim=(0, top), ylim=(0, top))
    axes[0, 0].legend(frameon=False, fontsize="small", loc="upper left")
    return titled(figure, title, note)


def decision_curves(curves: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Net benefit of acting on the model, on every radiograph, and on none, one panel per finding.

    Args:
        curves: from `operating_points.decision_curves`.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(curves["finding"]))
    figure, axes = panels(names, 2.8, 3, "probability at which one acts", "net benefit")
    for axis, name in zip(axes.flat, names, strict=False):
        curve = curves[curves["finding"] == name]
        axis.axhline(0, color="0.2", linewidth=1.0, linestyle=":", label="act on none")
        axis.plot(curve["threshold"], curve["all"], color=GREY, linestyle="--", label="act on every radiograph")
        axis.fill_between(curve["threshold"], curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
        axis.plot(curve["threshold"], curve["model"], color=PALETTE[0], linewidth=1.8, label="act on the model")
        top = curve[["model", "all", "high"]].to_numpy().max()
        axis.set(ylim=(-0.35 * top, 1.1 * top), xlim=(0, curve["threshold"].max()))
    axes[0, 0].legend(frameon=False, fontsize="small")
    return titled(figure, title, note)


def groups(table: pd.DataFrame, titles: dict[str, str], title: str, note: str = "", caption: str = "") -> Figure:
    """Mean AUROC and true-positive rate of each group with its size; filled where the gap survives Holm's correction.

    Args:
        table: rows `mean` of `subgroups.measure`: index (`column`, `group`, `metric`).
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
            place = {"transform": axis.get_yaxis_transform(), "va": "center"}
            if entry["too_small"]:
                axis.text(0.5, row, "too few to measure", ha="center", **place)
                continue
            colour = PALETTE[list(titles).index(key[0]) % len(PALETTE)]
            filled = colour if entry["p_holm"] < 0.05 else "white"
            axis.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=1.8)
            axis.plot(entry["estimate"], row, "o", color=colour, markerfacecolor=filled)
            axis.text(1.01, row, interval(entry), fontsize="x-small", **place)
        sizes = [table.loc[(*key, metric), "n_images"] for key in order]
        labels = [f"{titles[column]}: {group} ({size:,})" for (column, group), size in zip(order, sizes, strict=True)]
        name_rows(axis, labels if axis is axes[0, 0] else [""] * len(order))
        axis.set_xlabel(f"mean {name} of the findings")
    return titled(figure, title, note, caption)
