"""Lesions of phantoms: the textbook sign of each of the six findings, its shape, density and place in the lung.

A maker draws what one finding looks like from the image's random numbers and gives its lesions. Lengths are in mm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chestxray.data.phantom.anatomy import LUNG, PIXEL_SLACK_MM, Anatomy


@dataclass
class Field:
    """Tissue along the rays through one side of the patient; lesions change it in place."""

    anatomy: Anatomy
    side: int  # -1 for the image's left half, 1 for its right
    x: np.ndarray  # (1, W)
    y: np.ndarray  # (H, 1)
    air: np.ndarray  # (H, W) lung along the ray, behind and before heart and great vessels
    markings: np.ndarray  # (H, W) factor on the lung vessels, 0 to 1
    extra: np.ndarray  # (H, W) water added

    @property
    def out(self) -> np.ndarray:
        """Distance from the patient's middle."""
        return self.side * (self.x - self.anatomy.middle)

    @property
    def lung(self) -> np.ndarray:
        """1 inside the lung, falling to 0 at its borders."""
        return np.clip(self.air / 45, 0, 1)


class Lesion(NamedTuple):
    """The sign of one finding on one side."""

    finding: str  # NIH name
    side: int  # -1 or 1
    apply: Callable[[Field], None]  # adds the sign, in place
    box: Callable[[Anatomy], tuple[float, float, float, float]]  # smallest rectangle: x, y, width, height


def _spread(finding: str, side: int, share: Callable[[Field], np.ndarray], apply: Callable[[Field], None]) -> Lesion:
    """A sign without an outline: `share` says how much of each point of the lung it covers, (H, W), 0 to 1."""

    def box(anatomy: Anatomy) -> tuple[float, float, float, float]:  # on a 1.5 mm grid, whatever the image's size
        x = (anatomy.middle + np.sort(side * np.arange(0, 200, 1.5)))[None, :]
        field = field_of(anatomy, side, x, np.arange(0, 400, 1.5)[:, None])
        visible = share(field) * field.lung > 0.04
        xs, ys = field.x[0, visible.any(axis=0)], field.y[visible.any(axis=1), 0]
        grow = 0.75 + PIXEL_SLACK_MM
        left, top = float(xs.min()) - grow, float(ys.min()) - grow
        return left, top, float(xs.max()) + grow - left, float(ys.max()) + grow - top

    return Lesion(finding, side, apply, box)


def field_of(anatomy: Anatomy, side: int, x: np.ndarray, y: np.ndarray) -> Field:
    """The field of one side without lesions.

    Args:
        anatomy: the patient in this exposure.
        side: -1 or 1.
        x: (1, W) mm, ascending.
        y: (H, 1) mm, ascending.
    """
    air = anatomy.air(x, y, side)
    organ = np.zeros_like(air)
    for cx, cy, a, b, tilt, depth in anatomy.hearts():
        dx, dy = x - cx, y - cy
        u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / a
        v = (dy * math.cos(tilt) - dx * math.sin(tilt)) / b
        np.maximum(organ, depth * np.sqrt(np.maximum(1 - u * u - v * v, 0)), out=organ)
    air = np.maximum(air - organ, 0)
    return Field(anatomy, side, x, y, air, np.ones_like(air), np.zeros_like(air))


def _in_lung(anatomy: Anatomy, side: int, margin: float, top: float, base: float, rng: np.random.Generator) -> tuple:
    """Choose a point (x, y) of aerated lung at least `margin` from wall and dome, and half of it from the mediastinum.

    `top` and `base` are the highest and lowest place allowed, as shares of the way from apex to dome.
    """
    y = anatomy.apex + (anatomy.dome(side) - anatomy.apex) * rng.uniform(top, base, 400)
    outer, inner = anatomy.outer(y), anatomy.inner(y, side)
    out = inner + (outer - inner) * rng.uniform(0, 1, 400)
    free = (out > inner + 0.5 * margin) & (out < outer - margin) & (y < anatomy.diaphragm(out, side) - margin)
    free &= y > anatomy.apex + margin + 12
    x = anatomy.middle + side * out
    for cx, cy, a, b, _, _ in anatomy.hearts():
        free &= ((x - cx) / (a + 0.35 * margin)) ** 2 + ((y - cy) / (b + 0.35 * margin)) ** 2 > 0.85
    chosen = int(np.flatnonzero(free)[0]) if free.any() else int(np.argmax(np.minimum(out - inner, outer - out)))
    return float(x[chosen]), float(y[chosen])


def _round(finding: str, anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    """A nodule (at most 30 mm across) or a mass (more than 30 mm): a solid, nearly round body in the lung."""
    if finding == "Nodule":
        radius, margin, most, density = rng.uniform(9.5, 13.5), 1.0, 0.035, rng.uniform(2.5, 3.3)
    else:
        radius, margin, most, density = rng.uniform(22, 36), 0.75, 0.045, rng.uniform(1.1, 1.3)
    x, y = _in_lung(anatomy, side, margin * radius, 0.12, 0.9, rng)
    waves = [(rng.uniform(0, most), rng.uniform(0, 2 * np.pi)) for _ in range(3)]

    def outline(angle: np.ndarray) -> np.ndarray:
        return radius * (1 + sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(waves, start=2)))

    def apply(field: Field) -> None:
        dx, dy = field.x - x, field.y - y
        border = outline(np.arctan2(dy, dx))
        inside = np.maximum(1 - (dx * dx + dy * dy) / (border * border), 0)
        field.extra += (density - LUNG) * 2 * radius * np.sqrt(inside)

    def box(_: Anatomy) -> tuple[float, float, float, float]:
        angle = np.linspace(-np.pi, np.pi, 361)
        xs, ys = x + outline(angle) * np.cos(angle), y + outline(angle) * np.sin(angle)
        return float(xs.min()), float(ys.min()), float(np.ptp(xs)), float(np.ptp(ys))

    return [Lesion(finding, side, apply, box)]


def _effusion(_: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    """Fluid in the pleural space: a white base whose upper border is a meniscus, highest at the chest wall."""
    level, rise = rng.uniform(-10, 34), rng.uniform(40, 75)  # above the dome; further up at the chest wall

    def share(field: Field) -> np.ndarray:
        anatomy = field.anatomy
        across = np.clip((field.out - 0.2 * anatomy.lung) / (0.8 * anatomy.outer(field.y)), 0, 1)
        surface = anatomy.dome(side) - level - rise * across**3
        return np.clip((field.y - surface) / 7 + 0.5, 0, 1)

    def apply(field: Field) -> None:
        field.air *= 1 - 0.97 * share(field)

    return [_spread("Effusion", side, share, apply)]


def _pneumothorax(_: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    """Air outside a partly collapsed lung: a fine pleural line, and beyond it darkness without markings."""
    scale, line = rng.uniform(0.66, 0.84), rng.uniform(9, 14)  # size of the lung, 1 for a full one; water in the line

    def depth_inside(field: Field) -> np.ndarray:  # the collapsed lung's border; negative in the air outside it
        anatomy = field.anatomy
        root_y = anatomy.dome(side) + 0.2 * anatomy.drop
        root_x = float(anatomy.inner(np.array([root_y]), side)[0])
        y = root_y + (field.y - root_y) / scale  # heights in the full lung that are now at field.y
        outer = root_x + scale * (anatomy.outer(y) - root_x)
        inner = root_x + scale * (anatomy.inner(y, side) - root_x)
        slope = np.gradient(outer[:, 0], field.y[:, 0])[:, None]
        wall = (outer - field.out) / np.sqrt(1 + slope * slope)
        top = root_y + scale * (anatomy.apex - root_y)
        return np.minimum(np.minimum(wall, field.y - top), field.out - inner + 4)

    def share(field: Field) -> np.ndarray:
        return np.clip(0.5 - depth_inside(field) / 2, 0, 1)

    def apply(field: Field) -> None:
        inside = depth_inside(field)
        beyond = np.clip(0.5 - inside / 2, 0, 1)
        field.markings *= 1 - beyond
        field.extra += field.air * (0.05 * (1 - beyond) - 0.9 * LUNG * beyond)
        field.extra += line * np.clip(1.5 - np.abs(inside) / 1.1, 0, 1) * field.lung

    return [_spread("Pneumothorax", side, share, apply)]


def _shadow(finding: str, side: int, share: Callable[[Field], np.ndarray], strength: float) -> Lesion:
    """A sign that adds water to the lung, `strength` where it is thickest."""

    def apply(field: Field) -> None:
        field.extra += strength * share(field) * field.lung

    return _spread(finding, side, share, apply)


def _infiltration(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    """Patchy, ill-defined shadows of one zone of a lung, or of both lungs."""
    lesions: list[Lesion] = []
    for where in (side, -side) if rng.random() < 0.35 else (side,):
        x, y = _in_lung(anatomy, where, 22, 0.3, 0.92, rng)
        count = int(rng.integers(6, 11))
        centres = rng.normal(x, 20, count), rng.normal(y, 30, count)
        patches = np.column_stack([*centres, rng.uniform(9, 17, count), rng.uniform(0.5, 0.9, count)])
        grain = np.clip(rng.normal(0.7, 0.4, (14, 14)), 0.1, 1.3)
        share = functools.partial(_patchy, patches, grain)
        lesions.append(_shadow("Infiltration", where, share, rng.uniform(52, 68)))
    return lesions


def _patchy(patches: np.ndarray, grain: np.ndarray, field: Field) -> np.ndarray:
    """Patches, (k, 4) centre x, centre y, spread and weight, broken up by a coarse random field over 160 mm."""
    total = np.zeros_like(field.air)
    for x, y, spread, weight in patches:
        across = np.exp(-0.5 * ((field.x - x) / spread) ** 2)
        total += weight * across * np.exp(-0.5 * ((field.y - y) / spread) ** 2)
    total = np.minimum(total, 1.2)
    total[total < 0.12] = 0
    centre = patches[:, :2].mean(axis=0)
    cells = len(grain)
    step = 160 / (cells - 1)
    rows = ((field.y[:, 0] - centre[1]) / step + cells / 2).clip(0, cells - 1.001)
    columns = ((field.x[0] - centre[0]) / step + cells / 2).clip(0, cells - 1.001)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r)[:, None], columns - c
    upper, lower = (grain[row][:, c] * (1 - fc) + grain[row][:, c + 1] * fc for row in (r, r + 1))
    return total * (upper * (1 - fr) + lower * fr)  # bilinear


def _atelectasis(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    """Lung without air: plates (bands across the lower lung) or a wedge from the hilum to the chest wall.

    The volume loss that belongs to it, the raised dome and the shifted heart, is in the anatomy (`remodel`).
    """
    dome, lung = anatomy.dome(side), anatomy.lung
    wedge = rng.random() >= 0.5
    if wedge:
        tilt = rng.uniform(0.15, 0.6)  # it runs outwards and down from the hilum
        length = 0.42 * lung
        x = anatomy.middle + side * (0.22 * lung + length * np.cos(tilt))
        y = anatomy.hilum + rng.uniform(0, 22) + length * np.sin(tilt)
        bands = np.array([[x, y, length, rng.uniform(17, 25), side * tilt]])
    else:
        count = int(rng.integers(1, 3))
        up = rng.uniform(18, 30) + np.arange(count) * rng.uniform(20, 34)
        x = anatomy.middle + side * lung * rng.uniform(0.52, 0.66, count)
        sizes = rng.uniform(38, 52, count), rng.uniform(3.5, 5.5, count), rng.normal(0, 0.2, count)
        bands = np.column_stack([x, dome - up, *sizes])
    return [_shadow("Atelectasis", side, functools.partial(_banded, bands, wedge), rng.uniform(45, 60))]


def _banded(bands: np.ndarray, wedge: bool, field: Field) -> np.ndarray:
    """Bands, (k, 5) centre x, centre y, half-length, half-thickness, angle; a wedge grows thicker outwards."""
    total = np.zeros_like(field.air)
    for x, y, length, thickness, angle in bands:
        dx, dy = field.x - x, field.y - y
        along = (dx * np.cos(angle) + dy * np.sin(angle)) * field.side
        aside = np.abs(dy * np.cos(angle) - dx * np.sin(angle))
        half = thickness * (0.15 + 0.85 * np.clip(along / length * 0.5 + 0.5, 0, 1)) if wedge else thickness
        band = np.clip((half - aside) / (9 if wedge else 3) + 0.5, 0, 1)
        np.maximum(total, band * np.clip((length - np.abs(along)) / 16 + 0.5, 0, 1), out=total)
    return total


MAKERS: dict[str, Callable[[Anatomy, int, np.random.Generator], list[Lesion]]] = {
    "Atelectasis": _atelectasis,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": functools.partial(_round, "Mass"),
    "Nodule": functools.partial(_round, "Nodule"),
    "Pneumothorax": _pneumothorax,
}
