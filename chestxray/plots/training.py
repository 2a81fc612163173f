"""Figures of training: learning curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chestxray.plots.style import GREY, PALETTE, WIDTH, canvas, decimal, titled

_PHASE_TEXT = {"ha": "center", "va": "bottom", "fontsize": "small", "color": GREY}


def learning_curves(history: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Loss and validation AUROC of the six findings after each epoch, training beside validation.

    Phases of a fit (`head`, `fine_tune`) follow each other on one axis, parted by a line and not joined. The last
    phase's epoch of best validation AUROC is marked.

    Args:
        history: a model's `history.csv`.
        title: what is shown, usually the model's name.
        note: the data.
    """
    panels = (("Loss", "loss", "val_loss"), ("Mean AUROC of six findings", None, "val_six_finding_auroc"))
    figure, axes = canvas(1, len(panels), WIDTH, 3.4)
    position = pd.Series(np.arange(1, len(history) + 1), index=history.index)
    phases = _consecutive(history["phase"])
    for axis, (name, train, valid) in zip(axes.flat, panels, strict=True):
        for column, colour, mark, label in ((train, PALETTE[0], "o", "train"), (valid, PALETTE[1], "s", "validation")):
            for number, (_, start, stop) in enumerate(phases if column else ()):
                part = slice(start, stop)
                lines = {"color": colour, "marker": mark, "markersize": 4, "label": label if number == 0 else None}
                axis.plot(position.iloc[part], pd.to_numeric(history[column]).iloc[part], **lines)
        for phase, start, stop in phases if len(phases) > 1 else ():
            if start:
                axis.axvline(start + 0.5, color=GREY, linewidth=0.8, linestyle=":")
            middle = (start + stop + 1) / 2
            axis.text(middle, 1.0, phase.replace("_", " "), transform=axis.get_xaxis_transform(), **_PHASE_TEXT)
        axis.set(xlabel="epoch", ylabel=name, xlim=(0.4, len(history) + 0.6))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.legend(frameon=False, fontsize="small")
    _, start, stop = phases[-1]
    last = pd.to_numeric(history["val_six_finding_auroc"]).iloc[start:stop]
    if last.notna().any():
        best = last.idxmax()
        label = f"best {decimal(last[best])}"
        axis.plot(position[best], last[best], "*", color=PALETTE[3], markersize=13, label=label)
        axis.legend(frameon=False, fontsize="small")
    return titled(figure, title, note)


def _consecutive(phases: pd.Series) -> list[tuple[str, int, int]]:
    """Consecutive equal phases as (name, first row, one past the last row)."""
    starts = np.flatnonzero((phases != phases.shift()).to_numpy())
    stops = np.r_[starts[1:], len(phases)]
    return [(str(phases.iloc[start]), int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
