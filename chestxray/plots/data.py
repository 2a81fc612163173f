"""Figures of data: patients, co-occurrence, grey levels, effects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from chestxray.config import CLASSES
from chestxray.plots.style import CLASS_COLOURS, DASHES, GREY, PALETTE, WIDTH, canvas, name_rows, readable, titled


def patients(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Age by sex, images by view, and how many images a patient has.

    Args:
        table: one row per image; `patient`, `age`, `sex`, `view`.
        title: what is shown.
        note: the data.
    """
    figure, axes = canvas(1, 3, WIDTH, 3.2)
    ages, views, counts = axes[0]
    style = {"bins": np.arange(0, 101, 5), "histtype": "step", "linewidth": 1.8}
    for number, (sex, name) in enumerate((("F", "women"), ("M", "men"))):
        values = table.loc[table["sex"] == sex, "age"].dropna().to_numpy(dtype=float)
        if len(values):
            ages.hist(values, color=PALETTE[number], label=name, **style)
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
    return titled(figure, title, note)


def co_occurrence(counts: pd.DataFrame, lift: pd.DataFrame, title: str, note: str = "") -> Figure:
    """How many images show both findings, beside how many times as many as chance would give.

    Args:
        counts: from `associations.co_occurrence`.
        lift: from `associations.lift`.
        title: what is shown.
        note: the data.
    """
    names = readable(counts.columns)
    figure, axes = canvas(1, 2, 13.5, 6.4)
    common = {"square": True, "linewidths": 0.5, "xticklabels": names, "yticklabels": names, "annot_kws": {"size": 7}}
    brief = counts.map(lambda n: f"{n / 1000:.1f}k" if n >= 1000 else str(n))
    sns.heatmap(np.log1p(counts), ax=axes[0, 0], annot=brief, fmt="", cmap="Blues", cbar=False, **common)
    times = np.log2(lift.clip(lower=1 / 16))
    bar = {"shrink": 0.7, "label": "observed / expected", "ticks": [-2, -1, 0, 1, 2]}
    sns.heatmap(times, ax=axes[0, 1], annot=lift, fmt=".1f", cmap="vlag", vmin=-2, vmax=2, cbar_kws=bar, **common)
    axes[0, 1].collections[0].colorbar.set_ticklabels(["¼", "½", "1", "2", "4"])
    for axis, name in zip(axes.flat, ("images (diagonal: all with the finding)", "times chance"), strict=True):
        axis.set_title(name, fontsize="medium")
        axis.tick_params(axis="both", labelsize=8)
        for text in axis.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    return titled(figure, title, note)


def grey_levels(histograms: pd.DataFrame, by_view: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Grey-level histograms by class and by view.

    Args:
        histograms: one row per class, one column per grey level 0 to 255, shares of pixels.
        by_view: the same for each view.
        title: what is shown.
        note: the data.
    """
    figure, axes = canvas(1, 2, WIDTH, 3.4)
    views = dict(zip(("PA", "AP"), PALETTE, strict=False))
    for axis, table, colours in ((axes[0, 0], histograms, CLASS_COLOURS), (axes[0, 1], by_view, views)):
        for (name, row), label in zip(table.iterrows(), readable(table.index), strict=True):
            smooth = row.rolling(5, center=True, min_periods=1).mean() * 100
            style = {"color": colours.get(name), "linestyle": DASHES.get(name, "-"), "linewidth": 1.4}
            axis.plot(range(256), smooth, label=label, **style)
        top = 1.3 * 100 * table.iloc[:, 8:248].to_numpy().max(initial=0.001)
        axis.set(xlabel="grey level", ylabel="% of pixels", xlim=(0, 255), ylim=(0, top))
        axis.legend(frameon=False, fontsize="x-small")
        sns.despine(ax=axis)
    return titled(figure, title, note)


def distributions(table: pd.DataFrame, columns: Sequence[str], title: str, note: str = "") -> Figure:
    """Box plots of plain image numbers by class, the views apart.

    Args:
        table: one row per image; `label`, `view` and `columns`.
        columns: what to show, one panel each.
        title: what is shown.
        note: the data.
    """
    figure, axes = canvas(1, len(columns), WIDTH, 4.0)
    names = [name for name in CLASSES if name in set(table["label"])]
    style = {"y": "label", "order": names, "hue": "view", "hue_order": ("PA", "AP"), "palette": PALETTE[:2]}
    for axis, column in zip(axes.flat, columns, strict=True):
        sns.boxplot(table, x=column, ax=axis, legend=axis is axes[0, -1], fliersize=1, **style)
        axis.set(xlabel=column.replace("_", " "), ylabel="")
        axis.set_yticks(range(len(names)), readable(names) if axis is axes[0, 0] else [])
        sns.despine(ax=axis)
    sns.move_legend(axes[0, -1], "upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title=None, fontsize="small")
    return titled(figure, title, note)


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
    figure, axes = canvas(2, len(names), WIDTH, 2 * WIDTH / len(names) + 0.9)
    figure.pictures = True
    top = max(float(spread.max()) for spread in spreads)
    for column, (mean, spread, name) in enumerate(zip(means, spreads, readable(names), strict=True)):
        axes[0, column].imshow(mean, cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(name, fontsize=8)
        drawn = axes[1, column].imshow(spread, cmap="magma", vmin=0, vmax=top)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("mean", fontsize=8)
    axes[1, 0].set_ylabel("standard deviation", fontsize=8)
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.8, label="grey levels")
    return titled(figure, title, note, caption)


def effects(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Effect of each factor on each finding with its interval; filled where it is significant after Holm's correction.

    Args:
        table: from `associations.correct`; odds ratios are drawn on a log scale, rank-biserial correlations plainly.
        title: what is shown.
        note: the data.
    """
    factors = list(dict.fromkeys(table["factor"]))
    findings = list(dict.fromkeys(table["finding"]))
    figure, axes = canvas(1, len(factors), 3.6 * len(factors), 1.4 + 0.3 * len(findings))
    for number, (axis, factor) in enumerate(zip(axes.flat, factors, strict=True)):
        rows = table[table["factor"] == factor].set_index("finding").reindex(findings)
        odds = rows["odds_ratio"].notna().any()
        names = ("odds_ratio", "odds_low", "odds_high") if odds else ("effect", "effect_low", "effect_high")
        for height, (value, low, high, p) in enumerate(rows[[*names, "p_holm"]].to_numpy(dtype=float)):
            if np.isnan(value):
                continue
            axis.plot([low, high], [height, height], color=PALETTE[0], linewidth=1.5)
            filled = PALETTE[0] if p < 0.05 else "white"
            axis.plot(value, height, "o", color=PALETTE[0], markerfacecolor=filled, markersize=6)
        axis.axvline(1 if odds else 0, color=GREY, linewidth=0.9, linestyle=":")
        name_rows(axis, readable(findings) if number == 0 else [""] * len(findings))
        axis.set_title(factor)
        if odds:
            axis.set_xscale("log")
            axis.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator()
            )
        axis.set_xlabel("odds ratio" if odds else "rank-biserial correlation")
    return titled(figure, title, note)
