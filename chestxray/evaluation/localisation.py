"""Localisation: the pointing game and IoU of heat-maps against lesion boxes, and weight randomisation.

It knows heat-maps as arrays, and Keras layers only as far as their weights are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.networks.class_activation import joined

if TYPE_CHECKING:
    import keras

SHARE = 0.5
"""Share of a map's maximum from which a pixel counts as pointed out."""

PEER_POINTING: dict[str, float] = {
    "Atelectasis": 0.250,
    "Effusion": 0.333,
    "Infiltration": 0.455,
    "Mass": 0.306,
    "Nodule": 0.038,
    "Pneumothorax": 0.082,
}
"""Pointing game of a published repository on the NIH's boxes."""


def targets(boxes: pd.DataFrame, predictions: pd.DataFrame, side: int) -> pd.DataFrame:
    """What a model should point at: the boxes of each finding in each image.

    Args:
        boxes: of `nih_tables.read_boxes`.
        predictions: a predictions table; only its images count.
        side: of the image whose pixels the boxes are in (`nih_tables.box_side`).

    Returns:
        One row per image and finding, in the order of the boxes: `image`, `patient`, `finding` and `boxes`, a list of
        (left, top, right, bottom) in shares of the side, 0 to 1. Only the six findings of the study.
    """
    known = boxes[boxes["finding"].isin(SIX_FINDINGS) & boxes["image"].isin(predictions["image"])]
    ends = pd.DataFrame(
        {
            "left": known["x"],
            "top": known["y"],
            "right": known["x"] + known["width"],
            "bottom": known["y"] + known["height"],
        }
    ).div(side)
    shares = known[["image", "finding"]].assign(box=list(ends.clip(0, 1).itertuples(index=False, name=None)))
    found = shares.groupby(["image", "finding"], sort=False)["box"].agg(list).rename("boxes").reset_index()
    patients = predictions.set_index("image")["patient"]
    found.insert(1, "patient", found["image"].map(patients))
    return found


def box_mask(boxes: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """(height, width) bool: the pixels whose centre lies in one of the boxes.

    Args:
        boxes: left, top, right, bottom of each, as shares of the image, 0 to 1.
        height: of the mask, in pixels.
        width: of the mask, in pixels.
    """
    rows, columns = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width
    mask = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes:
        mask |= (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
    return mask


def point(heat: np.ndarray) -> tuple[int, int] | None:
    """Row and column of a map's peak, or None where it is flat.

    A coarse map that was enlarged has a plateau where it is largest at the border; the middle of the plateau is taken,
    not its corner.
    """
    top = heat.max()
    if top <= heat.min():
        return None
    rows, columns = np.nonzero(heat >= top - 1e-6 * abs(top))
    return round(float(rows.mean())), round(float(columns.mean()))


def _overlap(region: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of two (H, W) bool arrays; 0 where both are empty."""
    union = (region | mask).sum()
    return float((region & mask).sum() / union) if union else 0.0


def _centred_square(pixels: int, height: int, width: int) -> np.ndarray:
    """(height, width) bool: a square of about `pixels` pixels in the middle."""
    half = np.sqrt(pixels) / 2
    rows, columns = np.abs(np.arange(height) + 0.5 - height / 2), np.abs(np.arange(width) + 0.5 - width / 2)
    return (rows[:, None] <= half) & (columns[None] <= half)


def hits(maps: np.ndarray, found: pd.DataFrame, cells: tuple[int, int] | None = None) -> pd.DataFrame:
    """Score each map against its boxes, beside what an image's centre scores.

    Args:
        maps: (n, H, W), one for each row of `found`, for its finding.
        found: rows of `targets`.
        cells: rows and columns of the feature map before it was enlarged; as fine as the maps if None.

    Returns:
        `found` with `pointing` (bool: the map's peak lies in a box; Zhang et al., ECCV 2016, without tolerance), `iou`
        (of the region above `SHARE`), `centre_pointing` and `centre_iou` (of a square of the same area in the middle),
        `reachable` (bool: so coarse a map could have pointed into a box) and `flat` (bool: nothing spoke for it).
    """
    height, width = maps.shape[1:]
    rows = []
    for heat, boxes in zip(maps, found["boxes"], strict=True):
        mask = box_mask(boxes, height, width)
        place = point(heat)
        region = heat >= SHARE * heat.max() if place else np.zeros_like(mask)
        square = _centred_square(int(region.sum()) or mask.sum(), height, width)
        rows.append(
            {
                "pointing": bool(place and mask[place]),
                "iou": _overlap(region, mask),
                "centre_pointing": bool(mask[height // 2, width // 2]),
                "centre_iou": _overlap(square, mask),
                # Enlarged bilinearly, a map peaks in the middle of a cell.
                "reachable": bool(box_mask(boxes, *(cells or (height, width))).any()),
                "flat": place is None,
            }
        )
    return pd.concat([found.reset_index(drop=True), pd.DataFrame(rows)], axis=1)


def network_hits(
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray],
    pixels: np.ndarray,
    found: pd.DataFrame,
    cells: tuple[int, int],
    batch_size: int = 32,
) -> list[pd.DataFrame]:
    """`hits` of an ensemble and of each of its members.

    Args:
        explain: pixels (n, H, W) and classes (n,) to the members' heat-maps (members, n, H, W), as
            `engines.Engine.member_maps`.
        pixels: (n, H, W) grey values 0–255, one radiograph for each row of `found`.
        found: rows of `targets`, at least one.
        cells: rows and columns of the coarsest member's feature map.
        batch_size: images at a time.

    Returns:
        What `hits` returns, of the ensemble and then of each member.
    """
    classes = found["finding"].map(CLASSES.index).to_numpy()
    parts = []
    for start in range(0, len(found), batch_size):
        part = slice(start, start + batch_size)
        maps = explain(pixels[part], classes[part])
        parts.append([hits(heat, found[part], cells) for heat in (joined(maps), *maps)])
    return [pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)]


def localisation(scored: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Pointing game and IoU of each finding with intervals that resample patients.

    Args:
        scored: what `hits` returned.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`finding`, `metric`), the last finding `mean` (of the findings); metrics `pointing`, `centre_pointing`,
        `pointing_gain` (the first less the second, on the same draws), the same three of `iou`, and `reachable`, the
        share that maps so coarse can hit at all. Columns `estimate`, `low`, `high`, `draws`, `n_images`, `n_patients`.

    Raises:
        StudyError: there is no box.
    """
    if scored.empty:
        raise StudyError("no lesion box lies in a test image, so heat-maps have nothing to be compared with")
    drawn = Draws.of(scored["patient"], draws, seed)
    columns = ("pointing", "centre_pointing", "iou", "centre_iou", "reachable")
    shown = {name: scored["finding"].eq(name).to_numpy() for name in SIX_FINDINGS if name in set(scored["finding"])}
    means = {name: {column: drawn.means(scored[column], where) for column in columns} for name, where in shown.items()}
    means["mean"] = {column: sum(values[column] for values in means.values()) / len(shown) for column in columns}
    rows = {}
    for name, values in means.items():
        inside = shown.get(name, np.ones(len(scored), dtype=bool))
        size = {"n_images": int(inside.sum()), "n_patients": scored.loc[inside, "patient"].nunique()}
        for metric in ("pointing", "iou"):
            values[f"{metric}_gain"] = values[metric] - values[f"centre_{metric}"]
        rows |= {(name, metric): bootstrap.entry(drawn_values) | size for metric, drawn_values in values.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["finding", "metric"])
    return table


def randomisation(
    networks: Sequence[keras.Model],
    explain: Callable[[], np.ndarray],
    steps: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> pd.DataFrame:
    """Shuffle the weights layer by layer from the output on, and see whether the maps change (Adebayo et al. 2018).

    A map that stays as it was shows edges of the picture and not what the network learned. Weights are shuffled within
    each array, so that their sizes stay what they were; they are put back in the end.

    Args:
        networks: whose weights are shuffled, such as the members of an ensemble.
        explain: heat-maps (n, H, W) of the same radiographs by these networks, as their weights are when it is called.
        steps: shares of the layers with weights, counted from the output, rising; at least the last is shuffled.
        seed: seeds the shuffling.

    Returns:
        One row per step: `share`, `layers` (shuffled, of all networks), `correlation` (Spearman's, of shuffled with
        original maps, mean over images; a flat map counts 0), `low` and `high` (the middle 95 % of the images).
    """
    rng = np.random.default_rng(seed)
    original = explain()
    stacks = [[layer for layer in _layers(network) if layer.weights] for network in networks]
    saved = [(layer, layer.get_weights()) for stack in stacks for layer in stack]
    left = [len(stack) for stack in stacks]
    rows = []
    try:
        for share in steps:
            for number, stack in enumerate(stacks):
                start = len(stack) - max(1, round(share * len(stack)))
                for layer in stack[start : left[number]]:
                    layer.set_weights([rng.permutation(w.ravel()).reshape(w.shape) for w in layer.get_weights()])
                left[number] = min(left[number], start)
            ranks = [_rank_correlation(*pair) for pair in zip(original, explain(), strict=True)]
            low, high = np.percentile(ranks, [2.5, 97.5])
            done = sum(map(len, stacks)) - sum(left)
            rows.append(
                {"share": share, "layers": done, "correlation": float(np.mean(ranks)), "low": low, "high": high}
            )
    finally:
        for layer, values in saved:
            layer.set_weights(values)
    return pd.DataFrame(rows)


def _layers(network: Any) -> list[Any]:
    """All layers of a network, those of networks inside it in their place, from input to output."""
    return [part for layer in network.layers for part in (_layers(layer) if hasattr(layer, "layers") else [layer])]


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first.ravel(), second.ravel()).statistic)
