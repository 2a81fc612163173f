"""Localisation: the pointing game of heat-maps on lesion boxes, beside two points that look at nothing.

A map points right where its peak lies in one of the image's boxes (Zhang et al., ECCV 2016, without tolerance). It is
compared with the image's centre, and with one fixed point for each finding that is drawn from other patients' boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws

FEWEST = 10
"""Boxed training images of a finding from which its fixed point is drawn from them alone."""

GRID = 128
"""Pixels of a side in which the density of boxes is counted."""

POINTS = ("pointing", "centre_pointing", "fixed_pointing")


def targets(boxes: pd.DataFrame, images: pd.DataFrame, side: int) -> pd.DataFrame:
    """What a model should point at: the boxes of each finding in each image.

    Args:
        boxes: of `nih_tables.read_boxes`.
        images: a table with `image` and `patient`, such as predictions; only its images count.
        side: of the image whose pixels the boxes are in (`nih_tables.box_side`).

    Returns:
        One row per image and finding (of the six), in the order of the boxes: `image`, `patient`, `finding` and
        `boxes`, a list of (left, top, right, bottom) in shares of the side, 0 to 1.
    """
    known = boxes[boxes["finding"].isin(SIX_FINDINGS) & boxes["image"].isin(images["image"])]
    starts, sizes = known[["x", "y"]].to_numpy(), known[["width", "height"]].to_numpy()
    ends = np.clip(np.hstack([starts, starts + sizes]) / side, 0, 1)
    shares = known.assign(boxes=[tuple(box) for box in ends.tolist()])
    found = shares.groupby(["image", "finding"], sort=False)["boxes"].agg(list).reset_index()
    found.insert(1, "patient", found["image"].map(images.set_index("image")["patient"]))
    return found


def peak(values: np.ndarray) -> tuple[float, float]:
    """Where an (H, W) array is largest, of several pixels the middle one: x, y in shares of the sides; NaN if flat."""
    top = values.max()
    if top <= values.min():
        return np.nan, np.nan
    largest = np.argwhere(values >= top - 1e-6 * abs(top))
    row, column = largest[np.linalg.norm(largest - largest.mean(axis=0), axis=1).argmin()]
    return (column + 0.5) / values.shape[1], (row + 0.5) / values.shape[0]


def inside(x: np.ndarray | float, y: np.ndarray | float, boxes: Sequence[Sequence[float]]) -> np.ndarray | bool:
    """Whether each point lies in one of the boxes.

    Args:
        x: of any shape, in shares of the image's width; NaN lies in no box.
        y: alike, of its height.
        boxes: (left, top, right, bottom) of each, in the same unit.
    """
    return np.any(
        [(left <= x) & (x <= right) & (top <= y) & (y <= bottom) for left, top, right, bottom in boxes], axis=0
    )


def density(found: pd.DataFrame) -> np.ndarray:
    """How many rows of `targets` have each pixel of a (`GRID`, `GRID`) image in a box."""
    middles = (np.arange(GRID) + 0.5) / GRID
    return sum((inside(*np.meshgrid(middles, middles), boxes) for boxes in found["boxes"]), np.zeros((GRID, GRID), int))


def fixed_points(train: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The point of each finding that lies in the boxes of most images; no evaluated patient may have a part in it.

    Args:
        train: rows of `targets` of training images; ChestX-ray14 has boxes in its test list alone.
        others: of patients outside the dataset, for findings with fewer than `FEWEST` rows in `train`.

    Returns:
        Index `finding`; `x` and `y` in shares of the sides (NaN without boxes), `images`, and `source`.
    """
    rows = {}
    for finding in SIX_FINDINGS:
        own, far = (table[table["finding"] == finding] for table in (train, others))
        used, source = (own, "train") if len(own) >= FEWEST else (far, "other patients")
        x, y = peak(density(used))
        rows[finding] = {"x": x, "y": y, "images": len(used), "source": source}
    return pd.DataFrame(rows).T.rename_axis("finding")


def hits(points: Sequence[Sequence[float]], found: pd.DataFrame, fixed: pd.DataFrame) -> pd.DataFrame:
    """Whether the maps' peaks, the centre and the fixed points lie in a box.

    Args:
        points: the `peak` of a map for each row of `found`, for its finding.
        found: rows of `targets`.
        fixed: of `fixed_points`.

    Returns:
        `found` with `x` and `y` of the peak, and `POINTS` as 0 or 1; `fixed_pointing` is NaN where the finding has no
        fixed point.
    """
    rows = []
    for place, boxes, finding in zip(points, found["boxes"], found["finding"], strict=True):
        known = fixed.loc[finding, ["x", "y"]].to_numpy(dtype=float)
        score = np.nan if np.isnan(known).any() else inside(*known, boxes)
        rows.append([*place, inside(*place, boxes), inside(0.5, 0.5, boxes), score])
    return found.assign(**dict(zip(("x", "y", *POINTS), np.reshape(rows, (-1, 5)).T.astype(float), strict=True)))


def localisation(scored: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The pointing game of each finding with 95 % intervals that resample patients.

    Args:
        scored: what `hits` returned.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`finding`, `metric`), the last finding `mean` (of the findings). Metrics: `POINTS`, shares of the rows,
        and on the same draws `pointing_gain` and `fixed_gain`: the first less the second, and less the third.
        Columns `estimate`, `low`, `high`, `draws`, `n_images`, `n_patients`.

    Raises:
        StudyError: there is no box.
    """
    if scored.empty:
        raise StudyError("no lesion box lies in an evaluated image; heat-maps cannot be compared with anything")
    drawn = Draws.of(scored["patient"], draws, seed)
    pairs = {name: scored[scored["finding"] == name] for name in SIX_FINDINGS if name in set(scored["finding"])}
    means = {name: drawn.means(scored[list(POINTS)], scored[["finding"]].to_numpy() == name) for name in pairs}
    rows = {}
    for name, shown in (pairs | {"mean": scored}).items():
        maps, centre, fixed = (means[name] if name in means else np.mean([*means.values()], axis=0)).T
        values = (maps, centre, fixed, maps - centre, maps - fixed)
        size = {"n_images": len(shown), "n_patients": shown["patient"].nunique()}
        for metric, value in zip((*POINTS, "pointing_gain", "fixed_gain"), values, strict=True):
            rows[name, metric] = bootstrap.entry(value) | size
    return bootstrap.table(rows, ["finding", "metric"])


def better(table: pd.DataFrame) -> pd.DataFrame:
    """Whether maps beat the `centre` and the `fixed` point: by finding, where the gain's whole interval is above 0."""
    lows = table["low"].unstack("metric", sort=False)
    return lows[["pointing_gain", "fixed_gain"]].gt(0).set_axis(["centre", "fixed"], axis=1)
