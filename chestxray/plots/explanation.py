"""Figures of explanations: the pointing game, where heat-maps' peaks lie, robustness."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chestxray.plots.style import GREY, PALETTE, canvas, name_rows, panels, reach, titled

_POINTS = {
    "pointing": ("o", PALETTE[0], "heat-map's peak"),
    "centre_pointing": ("+", PALETTE[7], "image's centre"),
    "fixed_pointing": ("x", PALETTE[1], "fixed point of other patients' boxes"),
}
"""Mark, colour and name of what is looked for in a box."""


def pointing(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Pointing game of each finding beside the image's centre and a fixed point.

    Args:
        table: from `localisation.localisation`.
        title: what is shown.
        note: the data.
    """
    names = list(dict.fromkeys(table.index.get_level_values("finding")))
    figure, [[axis]] = canvas(1, 1, 9.6, 1.9 + 0.55 * len(names))
    for shift, (metric, (mark, colour, label)) in zip((-0.22, 0, 0.22), _POINTS.items(), strict=True):
        rows, at = table.xs(metric, level="metric").loc[names], np.arange(len(names)) + shift
        style = {"fmt": mark, "color": colour, "capsize": 3, "markersize": 7, "markerfacecolor": "white"}
        axis.errorbar(rows["estimate"], at, xerr=reach(rows), label=f"{label} in a box", **style)
        if metric == "pointing":
            better = table.xs("pointing_gain", level="metric").loc[names, "low"].to_numpy() > 0
            axis.plot(rows["estimate"][better], at[better], mark, color=colour, markersize=7, zorder=3)
    counts = table.xs("pointing", level="metric")["n_images"]
    name_rows(axis, [f"{name} ({counts[name]})" for name in names])
    axis.set(xlabel="share of images", xlim=(-0.02, 1))
    axis.legend(frameon=False, loc="center right")
    caption = "Filled: the 95 % interval of the difference from the centre, paired by patient, lies above zero."
    return titled(figure, title, note, caption)


def peaks(
    scored: pd.DataFrame,
    fixed: pd.DataFrame,
    densities: Mapping[str, np.ndarray],
    title: str,
    note: str = "",
    background: np.ndarray | None = None,
) -> Figure:
    """Where the heat-maps' peaks lie for each finding: a circle, larger for more maps, over the boxes' density in red.

    Args:
        scored: from `localisation.hits`: `finding`, `pointing`, `x` and `y` in shares of the sides.
        fixed: from `localisation.fixed_points`.
        densities: each finding's (H, W) count of boxes, from `localisation.density`.
        title: what is shown.
        note: the data.
        background: (H, W) grey values 0 to 255, such as the mean radiograph; an empty frame if None.
    """
    shown = {name: scored[scored["finding"] == name] for name in densities}
    titles = [f"{name}: {rows['pointing'].sum():.0f} of {len(rows)} in a box" for name, rows in shown.items()]
    figure, axes = panels(titles, 4.0, columns=3)
    frame = {"extent": (0, 1, 1, 0), "aspect": "equal"}
    for axis, (name, rows) in zip(axes.flat, shown.items(), strict=False):
        if background is not None:
            axis.imshow(background, cmap="gray", vmin=0, vmax=255, alpha=0.5, **frame)
        count = densities[name] / max(densities[name].max(), 1)
        axis.imshow(count, cmap="Reds", vmin=0, vmax=1, alpha=0.75 * count, **frame)
        places = rows.groupby(["x", "y"]).size().reset_index(name="maps")
        lone = {"zorder": 3, "linewidths": 2.2, "s": 130}
        _, colour, label = _POINTS["pointing"]
        style = {"color": colour, "edgecolors": "white", "linewidths": 0.6, "alpha": 0.85, "label": label}
        axis.scatter(places["x"], places["y"], 24 * places["maps"], **style)
        for (x, y), metric in (((0.5, 0.5), "centre_pointing"), (fixed.loc[name, ["x", "y"]], "fixed_pointing")):
            mark, colour, label = _POINTS[metric]
            axis.scatter(x, y, marker=mark, color=colour, label=label, **lone)
        axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    figure.pictures = True
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
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
