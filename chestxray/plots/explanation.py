"""Figures of explanations: the pointing game, randomised weights, robustness."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chestxray.plots.style import GREY, PALETTE, canvas, name_rows, panels, reach, titled


def pointing(
    table: pd.DataFrame, peer: dict[str, float], title: str, note: str = "", ours: str = "heat-map's peak in a box"
) -> Figure:
    """Pointing game of each finding beside the image's centre and a peer's figures.

    Args:
        table: from `localisation.localisation`.
        peer: a peer's figure for each finding; may be empty.
        title: what is shown.
        note: the data.
        ours: what the model's mark is called.
    """
    names = list(dict.fromkeys(table.index.get_level_values("finding")))
    figure, [[axis]] = canvas(1, 1, 9.6, 1.5 + 0.5 * len(names))
    kinds = (("pointing", PALETTE[0], "o", ours), ("centre_pointing", PALETTE[7], "s", "image's centre in a box"))
    for shift, (metric, colour, mark, label) in zip((-0.16, 0.16), kinds, strict=True):
        rows = table.xs(metric, level="metric").loc[names]
        style = {"fmt": mark, "color": colour, "capsize": 3, "markersize": 6, "label": label}
        axis.errorbar(rows["estimate"], np.arange(len(names)) + shift, xerr=reach(rows), **style)
    known = [(peer[name], row) for row, name in enumerate(names) if name in peer]
    if "reachable" in table.index.get_level_values("metric"):
        most = table.xs("reachable", level="metric").loc[names, "estimate"]
        style = {"color": GREY, "markersize": 16, "markeredgewidth": 1.6, "linestyle": "none"}
        axis.plot(most, np.arange(len(names)), "|", label="most that maps so coarse can hit", **style)
    if known:
        axis.plot(*zip(*known, strict=True), "D", color=PALETTE[1], markersize=6, label="a peer's figure")
    counts = table.xs("pointing", level="metric")["n_images"]
    name_rows(axis, [f"{name} ({counts[name]})" for name in names])
    axis.set(xlabel="share of images", xlim=(-0.02, 1))
    axis.legend(frameon=False, loc="center right")
    return titled(figure, title, note)


def randomisation(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Rank correlation of heat-maps with the original ones while weights are shuffled from the output on.

    Args:
        table: from `localisation.randomisation`.
        title: what is shown.
        note: the data.
    """
    figure, [[axis]] = canvas(1, 1, 7.6, 3.6)
    steps = np.arange(len(table) + 1)
    axis.axhline(0, color=GREY, linewidth=0.9, linestyle=":")
    middle, low, high = ([1.0, *table[name]] for name in ("correlation", "low", "high"))
    axis.fill_between(steps, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label="95 % of the images")
    axis.plot(steps, middle, "o-", color=PALETTE[0], label="mean")
    names = ["none", *("last layer" if share == 0 else f"{share:.0%}" for share in table["share"])]
    axis.set(xticks=steps, xlabel="layers shuffled, from the output on", ylabel="rank correlation", ylim=(-1.02, 1.05))
    axis.set_xticklabels(names)
    axis.legend(frameon=False)
    sns.despine(ax=axis)
    return titled(figure, title, note)


def robustness(
    table: pd.DataFrame, names: dict[str, tuple[str, str]], title: str, note: str = "", label: str = "macro AUROC"
) -> Figure:
    """A metric against the strength of each degradation.

    Args:
        table: from `robustness.sweep`.
        names: title and unit of each degradation.
        title: what is shown.
        note: the data.
        label: the name of the value axis.
    """
    shown = [name for name in names if name in table.index.get_level_values("degradation")]
    figure, axes = panels([names[name][0] for name in shown], 2.9, ylabel=label)
    low, high = min(0.45, table["low"].min()), table["high"].max()
    for axis, name in zip(axes.flat, shown, strict=False):
        curve = table.loc[name]
        steps = np.arange(len(curve))
        axis.axhline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        axis.fill_between(steps, curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
        axis.plot(steps, curve["estimate"], "o-", color=PALETTE[0])
        for step, (_, entry) in enumerate(curve.iterrows()):
            if step and entry["loss_high"] < 0:
                axis.plot(step, entry["estimate"], "o", color=PALETTE[3], markersize=8)
        axis.set(
            xticks=steps, ylim=(low - 0.02, high + 0.02), xticklabels=[f"{strength:g}" for strength in curve.index]
        )
        axis.set_xlabel(names[name][1], fontsize="small")
    caption = "Filled red: the loss's 95 % interval, paired by patient, lies below zero. Dotted: chance."
    return titled(figure, title, note, caption)
