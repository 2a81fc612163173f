"""Figures of training: learning curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chestxray.plots.style import GREY, PALETTE, WIDTH, canvas, decimal, titled

_STAGE_TEXT = {"ha": "center", "va": "bottom", "fontsize": "small", "color": GREY}


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
    panels = tuple(panel for panel in panels if _has_values(history, panel[1]) or _has_values(history, panel[2]))
    figure, axes = canvas(1, len(panels), WIDTH, 3.4)
    position = pd.Series(np.arange(1, len(history) + 1), index=history.index)
    stages = _consecutive(history["stage"]) if "stage" in history else [("", 0, len(history))]
    for axis, (name, train, valid) in zip(axes.flat, panels, strict=True):
        for column, colour, mark, label in ((train, PALETTE[0], "o", "train"), (valid, PALETTE[1], "s", "validation")):
            for number, (_, start, stop) in enumerate(stages):
                if not _has_values(history, column):
                    continue
                part = slice(start, stop)
                lines = {"color": colour, "marker": mark, "markersize": 4, "label": label if number == 0 else None}
                axis.plot(position.iloc[part], pd.to_numeric(history[column]).iloc[part], **lines)
        for stage, start, stop in stages if len(stages) > 1 else ():
            if start:
                axis.axvline(start + 0.5, color=GREY, linewidth=0.8, linestyle=":")
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
    return titled(figure, title, note)


def _has_values(table: pd.DataFrame, column: str | None) -> bool:
    return column is not None and column in table and bool(table[column].notna().any())


def _consecutive(stages: pd.Series) -> list[tuple[str, int, int]]:
    """Consecutive equal stages as (name, first row, one past the last row)."""
    starts = np.flatnonzero((stages != stages.shift()).to_numpy())
    stops = np.r_[starts[1:], len(stages)]
    return [(str(stages.iloc[start]), int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
