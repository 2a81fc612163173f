"""Draws chest radiographs of patients who do not exist, and writes them as a data set in the NIH layout.

It owns the whole phantom: who the patients are, their anatomy in millimetres, the textbook sign of each finding, the
X-ray physics (attenuation along the ray, scatter, quantum noise), and the raw folder with its tables. Everything
follows from `(seed, index)`, so an image is the same whichever process draws it and however often. It must know
nothing of the study: no split beyond the official lists it writes, no class folder, no model.

Lengths are millimetres in the plane of the detector: x grows to the right of the image (the patient's left) from the
middle of the image, y grows downwards from its top edge. Thicknesses are millimetres of water along the ray.
"""

from __future__ import annotations

import abc
import csv
import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, cpu_count, delayed
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from chestxray.config import NO_FINDING_NIH, SIX_FINDINGS, StudyError

RECIPE = 2
"""Raised whenever the drawing changes, so that images of an older recipe are drawn again."""

SIZES = (64, 1024)
"""Smallest and largest side of an image, in pixels."""

OTHER_FINDINGS = ("Cardiomegaly", "Emphysema")
"""Findings outside the seven classes that a few images show, as in the NIH set."""

_NAMES = (*SIX_FINDINGS, *OTHER_FINDINGS)

DATA_ENTRY = "Data_Entry_2017_v2020.csv"
BBOX_LIST = "BBox_List_2017.csv"
TRAIN_VAL_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"
STATE = "phantom.json"

DATA_ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
"""The header of the NIH's own file, character by character (two brackets hold a comma, so it counts eleven columns)."""

BBOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
"""The header of the NIH's own file: four numbers under one name, and three columns without a name."""

_BBOX_SPELLING = {"Infiltration": "Infiltrate"}  # the NIH's box list spells this finding in its own way

_WATER = 0.02  # linear attenuation of water at a chest tube's mean energy, per mm
_LUNG = 0.27  # density of inflated lung, water = 1
_SCATTER = 0.28  # scattered quanta for each primary one behind a thick body and an anti-scatter grid
_SCATTER_BODY = 120.0  # mm of water beyond which thicker tissue adds no more scatter
_SCATTER_MM = 28.0  # standard deviation of the scattered quanta's spread
_DETECTOR_MM = 0.45  # standard deviation of the detector's and the focal spot's blur
_PIXEL_SLACK_MM = 1.0  # how far outside its outline a lesion's soft edge may reach

_BLOCK = 100  # images dealt together: every block holds each finding equally often in both lists
_BLOCK_TEST = 25
_TRAIN_PATIENTS = (1,) * 18 + (2,) * 9 + (3,) * 6 + (4,) * 4 + (5,)  # images a patient: 75 in 38 patients
_TEST_PATIENTS = (1,) * 6 + (2,) * 3 + (3,) * 3 + (4,)  # 25 images in 13 patients
_BLOCK_PATIENTS = len(_TRAIN_PATIENTS) + len(_TEST_PATIENTS)

_DEAL, _PATIENT, _IMAGE, _NOISE, _VESSELS = range(5)  # streams of random numbers that never share a seed


def _rng(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, number])


# --- who is in the data set ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One image's place in the data set, before anything is drawn.

    Attributes:
        index: number of the image, from 0.
        patient: number of the patient, from 1.
        follow_up: number of the image among this patient's, from 0.
        test: whether the patient is in the official test list.
        findings: NIH names in alphabetical order; empty for No Finding.
    """

    index: int
    patient: int
    follow_up: int
    test: bool
    findings: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


@functools.lru_cache(maxsize=64)
def _deal(block: int, seed: int) -> tuple[Slot, ...]:
    """Deal the patients and the findings of 100 images.

    Findings are dealt from small shuffled decks (six images with one finding each beside six without), apart for the
    two lists, so that each class is equally common in both, however few blocks are drawn, and is independent of
    patient, age, sex and view.
    """
    rng = _rng(seed, _DEAL, block)
    groups: list[tuple[float, bool, int]] = []
    for test, sizes in ((False, _TRAIN_PATIENTS), (True, _TEST_PATIENTS)):
        images = rng.permutation(sizes)
        middle = (np.cumsum(images) - images / 2) / images.sum()  # spreads the test patients over the block
        groups += [(float(m), test, int(n)) for m, n in zip(middle, images, strict=True)]
    decks = {False: _deck(rng, _BLOCK - _BLOCK_TEST, block), True: _deck(rng, _BLOCK_TEST, block)}

    slots: list[Slot] = []
    for rank, (_, test, images) in enumerate(sorted(groups)):
        for follow_up in range(images):
            patient = block * _BLOCK_PATIENTS + rank + 1
            slots.append(Slot(block * _BLOCK + len(slots), patient, follow_up, test, decks[test].pop(0)))
    return tuple(slots)


def _deck(rng: np.random.Generator, cards: int, block: int) -> list[tuple[str, ...]]:
    single: list[tuple[str, ...]] = [(finding,) for finding in SIX_FINDINGS] + [()] * len(SIX_FINDINGS)
    deck: list[tuple[str, ...]] = []
    for _ in range(cards // len(single)):
        deck += [single[i] for i in rng.permutation(len(single))]
    for extra in range(cards - len(deck)):
        if (block + extra) % 4 == 3:
            card: tuple[str, ...] = (OTHER_FINDINGS[int(rng.integers(len(OTHER_FINDINGS)))],)
        else:
            card = tuple(sorted(str(f) for f in rng.choice(SIX_FINDINGS, size=2, replace=False)))
        deck.insert(int(rng.integers(len(deck) + 1)), card)
    return deck


def slot(index: int, seed: int) -> Slot:
    """Return the place of image `index` (from 0) in the data set of this seed."""
    return _deal(index // _BLOCK, seed)[index % _BLOCK]


# --- anatomy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """One patient as the beam meets them in one exposure. Lengths in mm; sides are -1 (image left) and 1.

    Attributes:
        apex: y of the lung apices.
        domes: y of the top of the right and the left diaphragm dome.
        lung: half the width of the rib cage, inside, at its widest.
        drop: how far the costophrenic angle lies below the dome.
        depth: thickness of the chest from front to back.
        middle: x of the spine.
        shift: how far heart and mediastinum are displaced to the image's right.
        heart: half-width of the heart's shadow.
        aorta: radius of the aortic knob.
        fat: soft tissue outside the ribs.
        pitch: distance from rib to rib.
        rib_jitter: (24,) offset of each rib.
        bone: strength of bone, 1 for a young adult.
        clavicle: y of the inner ends of the clavicles.
        scapula: how far the shoulder blades overlap the lungs.
        breast: radius of the breast shadow, 0 for none.
        bubble: radius of the gas bubble of the stomach.
        lucency: factor on the aeration of the lungs.
        tree: seed of the lung vessels.
    """

    apex: float
    domes: tuple[float, float]
    lung: float
    drop: float
    depth: float
    middle: float
    shift: float
    heart: float
    aorta: float
    fat: float
    pitch: float
    rib_jitter: np.ndarray
    bone: float
    clavicle: float
    scapula: float
    breast: float
    bubble: float
    lucency: float
    tree: tuple[int, int]

    def dome(self, side: int) -> float:
        return self.domes[0] if side < 0 else self.domes[1]

    @property
    def hilum(self) -> float:
        """Height of the lung roots."""
        return self.apex + 0.47 * (min(self.domes) - self.apex)

    def outer(self, y: np.ndarray) -> np.ndarray:
        """Distance of the rib cage's inside from the middle at height `y`."""
        down = np.clip((y - self.apex) / (max(self.domes) + self.drop - self.apex), 0, 1)
        top = 0.40 * self.lung
        return top + (self.lung - top) * (1 - (1 - down) ** 2.4) ** 0.54

    def inner(self, y: np.ndarray, side: int) -> np.ndarray:
        """Distance of the lung's mediastinal border from the middle at height `y`."""
        down = np.clip((y - self.apex) / (0.30 * (max(self.domes) - self.apex)), 0, 1)
        top = 0.40 * self.lung
        return top - (top - 23 - side * self.shift) * np.sqrt(1 - (1 - down) ** 2)

    def diaphragm(self, out: np.ndarray, side: int) -> np.ndarray:
        """Height of the diaphragm at distance `out` from the middle."""
        across = (out - 0.42 * self.lung) / (0.58 * self.lung)
        return self.dome(side) + np.where(across > 0, self.drop * np.abs(across) ** 2.4, 0.35 * self.drop * across**2)

    def air(self, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Length of the ray inside one lung, without heart or lesion, for x (1, W) on this side and y (H, 1)."""
        out = side * (x - self.middle)
        inner, outer = self.inner(y, side), self.outer(y)
        across = np.abs((out - (inner + outer) / 2) / np.maximum((outer - inner) / 2, 1e-3))
        depth = 0.74 * self.depth * (0.55 + 0.45 * np.clip((y - self.apex) / 120, 0, 1))
        chord = np.sqrt(np.maximum(1 - across * across * across, 0)) * depth
        above = self.diaphragm(out, side) - y
        edge = _PIXEL_SLACK_MM + 0.5
        chord *= np.clip(above / edge + 0.5, 0, 1) * (0.68 + 0.32 * np.clip(above / 60, 0, 1))
        return np.where(y > self.apex, chord, 0)

    def hearts(self) -> tuple[tuple[float, float, float, float, float, float], ...]:
        """Ellipsoids of heart and great vessels: centre x, centre y, half-axes, tilt in radians, depth."""
        x, low = self.middle + self.shift, self.dome(1)
        wide = self.heart
        return (
            (x + 0.42 * wide, low - 0.44 * wide, 1.06 * wide, 0.66 * wide, 0.66, 130),
            (x - 0.16 * wide, low - 0.52 * wide, 0.52 * wide, 0.74 * wide, 0.0, 100),
            (x + 0.26 * wide, low - 0.98 * wide, 0.40 * wide, 0.66 * wide, -0.42, 90),
            (x + 20, self.hilum - 44, self.aorta, 1.05 * self.aorta, 0.0, 60),
            (x + 22, self.hilum - 12, 17, 20, 0.4, 70),
            (x - 16, self.hilum - 30, 14, 46, 0.05, 60),
        )


@dataclass(frozen=True)
class Patient:
    """What belongs to the patient in all their images."""

    number: int
    sex: str
    age: int
    anatomy: Anatomy


def _patient(number: int, seed: int) -> Patient:
    """Make up one patient; their anatomy is that of a PA exposure in deep inspiration."""
    rng = _rng(seed, _PATIENT, number)
    sex = "M" if rng.random() < 0.55 else "F"
    age = int(np.clip(rng.normal(48, 17), 18, 92))
    build = float(np.clip(rng.normal(1.0 if sex == "M" else 0.94, 0.05), 0.84, 1.12))
    apex = float(rng.uniform(42, 58))
    dome = apex + build * float(rng.uniform(192, 222))
    anatomy = Anatomy(
        apex=apex,
        domes=(dome - float(rng.uniform(5, 13)), dome + float(rng.uniform(-2, 4))),
        lung=134 * build * float(rng.uniform(0.95, 1.05)),
        drop=float(rng.uniform(26, 38)),
        depth=218 * build * float(rng.uniform(0.9, 1.1)),
        middle=0.0,
        shift=float(rng.uniform(-2, 3)),
        heart=60 * build * float(rng.uniform(0.9, 1.1)),
        aorta=float(rng.uniform(15, 18)) + max(age - 45, 0) * 0.06,
        fat=float(rng.uniform(20, 38)),
        pitch=23.5 * build * float(rng.uniform(0.94, 1.06)),
        rib_jitter=rng.normal(0, 1.6, 24),
        bone=float(rng.uniform(0.9, 1.1)) * (1 - 0.003 * max(age - 40, 0)),
        clavicle=apex + float(rng.uniform(24, 34)),
        scapula=float(rng.uniform(-14, -4)),
        breast=float(rng.uniform(48, 66)) if sex == "F" else 0.0,
        bubble=float(rng.uniform(10, 22)) if rng.random() < 0.6 else 0.0,
        lucency=float(rng.uniform(0.94, 1.04)),
        tree=(seed, number),
    )
    return Patient(number, sex, age, anatomy)


def _expose(anatomy: Anatomy, view: str, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy as one exposure shows it.

    AP exposures are of lying or sitting patients near the tube: the heart is magnified, the breath is shallower, the
    clavicles stand higher and the shoulder blades overlap the lungs.
    """
    breath, middle, turn = float(rng.normal(0, 4)), float(rng.uniform(-7, 7)), float(rng.normal(0, 2))
    nearer = float(rng.uniform(14, 24))
    larger = float(rng.uniform(1.13, 1.22))
    higher = float(rng.uniform(10, 18))
    if view == "PA":
        nearer, larger, higher = 0.0, 1.0, 0.0
    return dataclasses.replace(
        anatomy,
        domes=(anatomy.domes[0] + breath - nearer, anatomy.domes[1] + breath - nearer),
        middle=middle,
        shift=anatomy.shift + turn,
        heart=anatomy.heart * larger,
        clavicle=anatomy.clavicle - higher,
        scapula=anatomy.scapula + 2.2 * higher,
    )


# --- findings --------------------------------------------------------------------------------------------------------


@dataclass
class Field:
    """What the rays of half an image meet on one side of the patient; lesions change it in place.

    Attributes:
        anatomy: the patient.
        side: -1 for the image's left half, 1 for its right.
        x: (1, W) mm.
        y: (H, 1) mm.
        air: (H, W) mm of lung along the ray, behind and before heart and great vessels.
        markings: (H, W) factor on the lung vessels, 0 to 1.
        extra: (H, W) mm of water added.
    """

    anatomy: Anatomy
    side: int
    x: np.ndarray
    y: np.ndarray
    air: np.ndarray
    markings: np.ndarray
    extra: np.ndarray

    @property
    def out(self) -> np.ndarray:
        """Distance from the patient's middle, mm."""
        return self.side * (self.x - self.anatomy.middle)

    @property
    def lung(self) -> np.ndarray:
        """1 inside the lung, falling to 0 at its borders."""
        return np.clip(self.air / 45, 0, 1)


@dataclass(frozen=True)
class Lesion(abc.ABC):
    """The sign of one finding on one side.

    Attributes:
        finding: NIH name.
        side: -1 or 1.
    """

    finding: str
    side: int

    @abc.abstractmethod
    def apply(self, field: Field) -> None:
        """Change what the rays meet."""

    @abc.abstractmethod
    def box(self, anatomy: Anatomy) -> tuple[float, float, float, float]:
        """Smallest rectangle round the sign: x, y, width, height in mm."""


@dataclass(frozen=True)
class Spread(Lesion):
    """A sign without an outline of its own, which covers a share of each point of the lung."""

    @abc.abstractmethod
    def share(self, field: Field) -> np.ndarray:
        """Where the sign is, (H, W), 0 to 1, for the box."""

    def box(self, anatomy: Anatomy) -> tuple[float, float, float, float]:
        """As `Lesion.box`, found on a 1.5 mm grid."""
        field = _survey(anatomy, self.side)
        seen = self.share(field) * field.lung > 0.04
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        xs, ys = field.x[0, columns], field.y[rows, 0]
        grow = 0.75 + _PIXEL_SLACK_MM
        left, top = float(xs.min()) - grow, float(ys.min()) - grow
        return left, top, float(xs.max()) + grow - left, float(ys.max()) + grow - top


def _survey(anatomy: Anatomy, side: int) -> Field:
    """Return the field of one lung on a grid that doesn't depend on the image's size."""
    x = (anatomy.middle + np.sort(side * np.arange(0, 200, 1.5)))[None, :]
    y = np.arange(0, 400, 1.5)[:, None]
    return _field(anatomy, side, x, y)


def _window(x: np.ndarray, y: np.ndarray, cx: float, cy: float, reach: float) -> tuple[slice, slice] | None:
    """Rows and columns of a grid that lie within `reach` of a point on either axis; None where there are none."""
    top, bottom = np.searchsorted(y[:, 0], [cy - reach, cy + reach])
    left, right = np.searchsorted(x[0], [cx - reach, cx + reach])
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def _field(anatomy: Anatomy, side: int, x: np.ndarray, y: np.ndarray) -> Field:
    air = anatomy.air(x, y, side)
    organ = np.zeros_like(air)
    for cx, cy, a, b, tilt, depth in anatomy.hearts():
        window = _window(x, y, cx, cy, max(a, b))
        if window is None:
            continue
        dx, dy = x[:, window[1]] - cx, y[window[0]] - cy
        u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / a
        v = (dy * math.cos(tilt) - dx * math.sin(tilt)) / b
        chord = depth * np.sqrt(np.maximum(1 - u * u - v * v, 0))
        np.maximum(organ[window], chord, out=organ[window])
    air = np.maximum(air - organ, 0)
    return Field(anatomy, side, x, y, air, np.ones_like(air), np.zeros_like(air))


@dataclass(frozen=True)
class Round(Lesion):
    """A nodule (at most 30 mm across) or a mass (more than 30 mm): a solid, nearly round body in the lung.

    Attributes:
        x, y: centre, mm.
        radius: mean radius, mm.
        waves: (k, 2) amplitude (share of the radius) and phase of the outline's 2nd, 3rd … wave.
        density: water = 1.
    """

    x: float
    y: float
    radius: float
    waves: tuple[tuple[float, float], ...]
    density: float

    def _outline(self, angle: np.ndarray) -> np.ndarray:
        return self.radius * (1 + sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(self.waves, start=2)))

    def apply(self, field: Field) -> None:
        window = _window(field.x, field.y, self.x, self.y, 1.5 * self.radius)
        if window is None:
            return
        dx, dy = field.x[:, window[1]] - self.x, field.y[window[0]] - self.y
        outline = self._outline(np.arctan2(dy, dx))
        inside = np.maximum(1 - (dx * dx + dy * dy) / (outline * outline), 0)
        field.extra[window] += (self.density - _LUNG) * 2 * self.radius * np.sqrt(inside)

    def box(self, anatomy: Anatomy) -> tuple[float, float, float, float]:
        angle = np.linspace(-np.pi, np.pi, 361)
        xs = self.x + self._outline(angle) * np.cos(angle)
        ys = self.y + self._outline(angle) * np.sin(angle)
        return float(xs.min()), float(ys.min()), float(np.ptp(xs)), float(np.ptp(ys))


@dataclass(frozen=True)
class Effusion(Spread):
    """Fluid in the pleural space: a white base whose upper border is a meniscus, highest at the chest wall.

    Attributes:
        level: how far the fluid stands above the dome towards the middle, mm (may be negative).
        rise: how far the meniscus climbs at the chest wall, mm.
    """

    level: float
    rise: float

    def share(self, field: Field) -> np.ndarray:
        anatomy, out = field.anatomy, field.out
        across = np.clip((out - 0.2 * anatomy.lung) / (0.8 * anatomy.outer(field.y)), 0, 1)
        surface = anatomy.dome(self.side) - self.level - self.rise * across**3
        return np.clip((field.y - surface) / 7 + 0.5, 0, 1)

    def apply(self, field: Field) -> None:
        field.air *= 1 - 0.97 * self.share(field)


@dataclass(frozen=True)
class Pneumothorax(Spread):
    """Air outside a partly collapsed lung: a fine pleural line, and beyond it darkness without markings.

    Attributes:
        scale: size of the collapsed lung, 1 for a full one.
        line: water in the pleural line, mm.
    """

    scale: float
    line: float

    def _depth_inside(self, field: Field) -> np.ndarray:
        """Distance inside the collapsed lung's border, mm; negative in the air outside it."""
        anatomy = field.anatomy
        root_y = anatomy.dome(self.side) + 0.2 * anatomy.drop
        root_x = float(anatomy.inner(np.array([root_y]), self.side)[0])
        y = root_y + (field.y - root_y) / self.scale  # heights in the full lung that are now at field.y
        outer = root_x + self.scale * (anatomy.outer(y) - root_x)
        inner = root_x + self.scale * (anatomy.inner(y, self.side) - root_x)
        slope = np.gradient(outer[:, 0], field.y[:, 0])[:, None]
        wall = (outer - field.out) / np.sqrt(1 + slope * slope)
        top = root_y + self.scale * (anatomy.apex - root_y)
        return np.minimum(np.minimum(wall, field.y - top), field.out - inner + 4)

    def share(self, field: Field) -> np.ndarray:
        return np.clip(0.5 - self._depth_inside(field) / 2, 0, 1)

    def apply(self, field: Field) -> None:
        inside = self._depth_inside(field)
        beyond = np.clip(0.5 - inside / 2, 0, 1)
        field.markings *= 1 - beyond
        field.extra += field.air * (0.05 * (1 - beyond) - 0.9 * _LUNG * beyond)
        field.extra += self.line * np.clip(1.5 - np.abs(inside) / 1.1, 0, 1) * field.lung


@dataclass(frozen=True)
class Infiltration(Spread):
    """Patchy, ill-defined shadows of one zone of a lung.

    Attributes:
        patches: (k, 4) centre x, centre y, spread and weight of each patch, mm.
        grain: (n, n) coarse random field that breaks the patches up, 0 to 1, stretched over 160 mm.
        strength: water added where patches are thickest, mm.
    """

    patches: np.ndarray
    grain: np.ndarray
    strength: float

    def share(self, field: Field) -> np.ndarray:
        total = np.zeros_like(field.air)
        for x, y, spread, weight in self.patches:
            across = np.exp(-0.5 * ((field.x - x) / spread) ** 2)
            total += weight * across * np.exp(-0.5 * ((field.y - y) / spread) ** 2)
        total = np.minimum(total, 1.2)
        total[total < 0.12] = 0
        centre = self.patches[:, :2].mean(axis=0)
        step = 160 / (len(self.grain) - 1)
        rows = ((field.y[:, 0] - centre[1]) / step + len(self.grain) / 2).clip(0, len(self.grain) - 1.001)
        columns = ((field.x[0] - centre[0]) / step + len(self.grain) / 2).clip(0, len(self.grain) - 1.001)
        return total * _bilinear(self.grain, rows, columns)

    def apply(self, field: Field) -> None:
        field.extra += self.strength * self.share(field) * field.lung


@dataclass(frozen=True)
class Atelectasis(Spread):
    """Lung without air: a plate (a band across the lower lung) or a wedge from the hilum to the chest wall.

    The volume loss that belongs to it, the raised dome and the shifted heart, is in the anatomy (`_lose_volume`).

    Attributes:
        bands: (k, 5) centre x, centre y, half-length, half-thickness, angle; half-thickness grows with the distance
            from the hilum where `wedge` is true.
        wedge: whether the shadow is a wedge.
        strength: water added, mm.
    """

    bands: np.ndarray
    wedge: bool
    strength: float

    def share(self, field: Field) -> np.ndarray:
        total = np.zeros_like(field.air)
        for x, y, length, thickness, angle in self.bands:
            dx, dy = field.x - x, field.y - y
            along = (dx * np.cos(angle) + dy * np.sin(angle)) * self.side
            aside = np.abs(dy * np.cos(angle) - dx * np.sin(angle))
            half = thickness * (0.15 + 0.85 * np.clip(along / length * 0.5 + 0.5, 0, 1)) if self.wedge else thickness
            soft = 9 if self.wedge else 3
            band = np.clip((half - aside) / soft + 0.5, 0, 1) * np.clip((length - np.abs(along)) / 16 + 0.5, 0, 1)
            np.maximum(total, band, out=total)
        return total

    def apply(self, field: Field) -> None:
        field.extra += self.strength * self.share(field) * field.lung


def _bilinear(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read `grid` at fractional `rows` (H,) and `columns` (W,), giving (H, W)."""
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r)[:, None], (columns - c)[None, :]
    upper = grid[r][:, c] * (1 - fc) + grid[r][:, c + 1] * fc
    lower = grid[r + 1][:, c] * (1 - fc) + grid[r + 1][:, c + 1] * fc
    return upper * (1 - fr) + lower * fr


def _in_lung(anatomy: Anatomy, side: int, margin: float, top: float, base: float, rng: np.random.Generator) -> tuple:
    """Choose a point of aerated lung at least `margin` mm from wall and dome.

    Args:
        anatomy: the patient.
        side: -1 or 1.
        margin: mm to the rib cage, the dome and (half of it) the mediastinum.
        top: highest place allowed, as a share of the way from apex to dome.
        base: lowest place allowed, likewise.
        rng: the image's random numbers.

    Returns:
        x and y in mm.
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


def _make_round(finding: str, anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    if finding == "Nodule":
        radius, waves, density = float(rng.uniform(9.5, 13.5)), 0.035, float(rng.uniform(2.5, 3.3))
        margin = radius
    else:
        radius, waves, density = float(rng.uniform(22, 36)), 0.045, float(rng.uniform(1.1, 1.3))
        margin = 0.75 * radius
    x, y = _in_lung(anatomy, side, margin, 0.12, 0.9, rng)
    outline = tuple((float(rng.uniform(0, waves)), float(rng.uniform(0, 2 * np.pi))) for _ in range(3))
    return [Round(finding, side, x, y, radius, outline, density)]


def _make_effusion(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    return [Effusion("Effusion", side, float(rng.uniform(-10, 34)), float(rng.uniform(40, 75)))]


def _make_pneumothorax(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    return [Pneumothorax("Pneumothorax", side, float(rng.uniform(0.66, 0.84)), float(rng.uniform(9, 14)))]


def _make_infiltration(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    lesions: list[Lesion] = []
    for where in (side, -side) if rng.random() < 0.35 else (side,):
        x, y = _in_lung(anatomy, where, 22, 0.3, 0.92, rng)
        count = int(rng.integers(6, 11))
        patches = np.column_stack(
            [
                rng.normal(x, 20, count),
                rng.normal(y, 30, count),
                rng.uniform(9, 17, count),
                rng.uniform(0.5, 0.9, count),
            ]
        )
        grain = np.clip(rng.normal(0.7, 0.4, (14, 14)), 0.1, 1.3)
        lesions.append(Infiltration("Infiltration", where, patches, grain, float(rng.uniform(52, 68))))
    return lesions


def _make_atelectasis(anatomy: Anatomy, side: int, rng: np.random.Generator) -> list[Lesion]:
    dome, lung = anatomy.dome(side), anatomy.lung
    if rng.random() < 0.5:
        count = int(rng.integers(1, 3))
        up = float(rng.uniform(18, 30)) + np.arange(count) * rng.uniform(20, 34)
        x = anatomy.middle + side * lung * rng.uniform(0.52, 0.66, count)
        bands = np.column_stack(
            [x, dome - up, rng.uniform(38, 52, count), rng.uniform(3.5, 5.5, count), rng.normal(0, 0.2, count)]
        )
        return [Atelectasis("Atelectasis", side, bands, False, float(rng.uniform(45, 60)))]
    tilt = float(rng.uniform(0.15, 0.6))  # the wedge runs outwards and down from the hilum
    length = 0.42 * lung
    x = anatomy.middle + side * (0.22 * lung + length * np.cos(tilt))
    y = anatomy.hilum + float(rng.uniform(0, 22)) + length * np.sin(tilt)
    bands = np.array([[x, y, length, float(rng.uniform(17, 25)), side * tilt]])
    return [Atelectasis("Atelectasis", side, bands, True, float(rng.uniform(45, 60)))]


_MAKERS: dict[str, Callable[[Anatomy, int, np.random.Generator], list[Lesion]]] = {
    "Atelectasis": _make_atelectasis,
    "Effusion": _make_effusion,
    "Infiltration": _make_infiltration,
    "Mass": functools.partial(_make_round, "Mass"),
    "Nodule": functools.partial(_make_round, "Nodule"),
    "Pneumothorax": _make_pneumothorax,
}


def _lose_volume(anatomy: Anatomy, side: int, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy with one lung smaller: its dome is raised, heart and mediastinum are drawn towards it."""
    raised = float(rng.uniform(18, 30))
    domes = (anatomy.domes[0] - raised * (side < 0), anatomy.domes[1] - raised * (side > 0))
    return dataclasses.replace(anatomy, domes=domes, shift=anatomy.shift + side * float(rng.uniform(7, 12)))


def _remodel(anatomy: Anatomy, finding: str, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy changed by a finding outside the seven classes."""
    if finding == "Cardiomegaly":
        return dataclasses.replace(anatomy, heart=anatomy.heart * float(rng.uniform(1.3, 1.45)))
    down = float(rng.uniform(12, 20))  # emphysema: dark lungs, low flat domes, a narrow heart
    domes = (anatomy.domes[0] + down, anatomy.domes[1] + down)
    return dataclasses.replace(
        anatomy, domes=domes, drop=0.45 * anatomy.drop, heart=0.85 * anatomy.heart, lucency=1.16 * anatomy.lucency
    )


# --- one image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """The true place of a finding: NIH name, then left, top, width and height in pixels of the image as written."""

    finding: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides how one image looks, whatever its size.

    Attributes:
        slot: the image's place in the data set.
        age: years.
        sex: M or F.
        view: PA or AP.
        anatomy: the patient in this exposure.
        lesions: the signs of the findings.
        width: side of the square field of view, mm.
        quanta: X-ray quanta a mm² that would reach the detector without the patient.
        window: thicknesses of water shown black and white, mm.
        gamma: exponent of the display's curve.
        marker: letter, x and y in mm of the side marker.
        seed: seed of the data set.
    """

    slot: Slot
    age: int
    sex: str
    view: str
    anatomy: Anatomy
    lesions: tuple[Lesion, ...]
    width: float
    quanta: float
    window: tuple[float, float]
    gamma: float
    marker: tuple[str, float, float]
    seed: int


@dataclass(frozen=True)
class Phantom:
    """One drawn radiograph.

    Attributes:
        image: (size, size) uint8, bone white.
        file: file name as in the NIH set.
        patient: number of the patient, from 1.
        follow_up: number of the image among this patient's, from 0.
        age: years.
        sex: M or F.
        view: PA or AP.
        findings: NIH names in alphabetical order; empty for No Finding.
        boxes: true place of every sign, in this image's pixels.
        spacing: side of a pixel, mm.
        test: whether the patient is in the official test list.
    """

    image: np.ndarray
    file: str
    patient: int
    follow_up: int
    age: int
    sex: str
    view: str
    findings: tuple[str, ...]
    boxes: tuple[Box, ...]
    spacing: float
    test: bool


def compose(index: int, seed: int, *, findings: Sequence[str] | None = None, view: str | None = None) -> Scene:
    """Decide everything about one image.

    Args:
        index: number of the image, from 0.
        seed: seed of the data set.
        findings: NIH names to show in place of those dealt to this image; `()` for none. The patient and the exposure
            stay the same.
        view: `PA` or `AP` in place of the one drawn by lot.

    Raises:
        StudyError: a finding or the view is unknown.
    """
    place = slot(index, seed)
    shown = place.findings if findings is None else tuple(sorted(findings))
    for finding in shown:
        if finding not in _NAMES:
            raise StudyError(f"phantom finding {finding!r} is unknown; there are: {', '.join(_NAMES)}")
    if view not in (None, "PA", "AP"):
        raise StudyError(f"phantom view {view!r} is unknown; there are: PA, AP")

    patient = _patient(place.patient, seed)
    rng = _rng(seed, _IMAGE, index)
    drawn_view = "PA" if rng.random() < 0.6 else "AP"
    view = view or drawn_view
    anatomy = _expose(patient.anatomy, view, rng)
    width = float(rng.uniform(342, 378))
    letter = "L" if rng.random() < 0.6 else "R"
    corner = (1 if letter == "L" else -1) * width * float(rng.uniform(0.38, 0.44))
    dark, bright = float(rng.uniform(0.14, 0.22)), float(rng.uniform(0.98, 1.1))
    exposure = {
        "quanta": float(rng.uniform(1.5e4, 3e4)) * (0.8 if view == "AP" else 1.0),
        "window": (dark * anatomy.depth, bright * anatomy.depth),
        "gamma": float(rng.uniform(0.85, 1.15)),
        "marker": (letter, corner, width * float(rng.uniform(0.05, 0.1))),
    }

    lesions: list[Lesion] = []
    for finding in shown:
        # A stream of its own for each finding, so that showing another one doesn't move it.
        own = np.random.default_rng([seed, _IMAGE, index, 1 + _NAMES.index(finding)])
        side = -1 if own.random() < 0.5 else 1
        if finding in OTHER_FINDINGS:
            anatomy = _remodel(anatomy, finding, own)
            continue
        if finding == "Atelectasis":  # first in the alphabet: the others are placed in the lung it leaves
            anatomy = _lose_volume(anatomy, side, own)
        lesions += _MAKERS[finding](anatomy, side, own)

    return Scene(
        slot=dataclasses.replace(place, findings=shown),
        age=patient.age + place.follow_up // 2,
        sex=patient.sex,
        view=view,
        anatomy=anatomy,
        lesions=tuple(lesions),
        width=width,
        seed=seed,
        **exposure,
    )


def boxes(scene: Scene, size: int) -> tuple[Box, ...]:
    """Return the true boxes of a scene in pixels of an image `size` pixels wide, cut at its edges."""
    scale = size / scene.width
    found = []
    for lesion in scene.lesions:
        left, top, width, height = lesion.box(scene.anatomy)
        x0, x1 = np.clip([left + scene.width / 2, left + width + scene.width / 2], 0, scene.width) * scale
        y0, y1 = np.clip([top, top + height], 0, scene.width) * scale
        found.append(Box(lesion.finding, float(x0), float(y0), float(x1 - x0), float(y1 - y0)))
    return tuple(found)


def render(scene: Scene, size: int, *, noise: bool = True) -> np.ndarray:
    """Take the radiograph of a scene.

    The water along every ray attenuates by Beer–Lambert; a share of what arrives is spread by scatter; the rest is
    blurred by focal spot and detector; quanta are counted (Poisson) and shown on a logarithmic scale, bone white.

    Args:
        scene: from `compose`.
        size: side of the image, pixels.
        noise: whether quanta are counted; without, the expected count is shown.

    Returns:
        (size, size) uint8.
    """
    spacing = scene.width / size
    x = ((np.arange(size) + 0.5) * spacing - scene.width / 2).astype(np.float32)[None, :]
    y = ((np.arange(size) + 0.5) * spacing).astype(np.float32)[:, None]
    water = _water(scene, x, y, spacing)

    primary = np.exp(-_WATER * water)
    if _DETECTOR_MM / spacing > 0.4:  # less than that is lost in the pixel
        primary = ndimage.gaussian_filter(primary, _DETECTOR_MM / spacing, truncate=3)
    arrived = primary + _SCATTER * _spread(primary * np.minimum(water / _SCATTER_BODY, 1), _SCATTER_MM / spacing)
    quanta = arrived * np.float32(scene.quanta * spacing**2)
    if noise:
        quanta = np.maximum(_rng(scene.seed, _NOISE, scene.slot.index).poisson(quanta), 0.5).astype(np.float32)
    seen = np.log(quanta / np.float32(scene.quanta * spacing**2)) / -_WATER

    dark, bright = scene.window
    shown = np.clip((seen - dark) / (bright - dark), 0, 1.25)
    # The curve's shoulder keeps the mediastinum and the abdomen from being one white.
    shown = shown**scene.gamma
    shown = np.where(shown > 0.75, 0.75 + 0.25 * np.tanh((shown - 0.75) / 0.25), shown)
    return (255 * shown + 0.5).astype(np.uint8)


def _spread(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a wide Gaussian, on a grid coarse enough that it costs next to nothing."""
    coarse = Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)
    blurred = ndimage.gaussian_filter(np.asarray(coarse), sigma * 32 / len(image), mode="nearest")
    return np.asarray(Image.fromarray(blurred).resize(image.shape[::-1], Image.Resampling.BICUBIC))


def _water(scene: Scene, x: np.ndarray, y: np.ndarray, spacing: float) -> np.ndarray:
    """Return the water along every ray, (H, W) float32 mm."""
    anatomy = scene.anatomy
    water = _body(anatomy, x, y)
    split = int(np.searchsorted(x[0], anatomy.middle))
    vessels = _vessels(anatomy, scene.width, x.shape[1])
    for side, columns in ((-1, np.s_[:split]), (1, np.s_[split:])):
        field = _field(anatomy, side, x[:, columns], y)
        for lesion in scene.lesions:
            if lesion.side == side:
                lesion.apply(field)
        part = water[:, columns]
        part -= (1 - _LUNG) * anatomy.lucency * field.air
        part += vessels[:, columns] * field.markings * field.lung
        part += field.extra
    water += _ribs(anatomy, x, y, spacing)
    _spine(anatomy, water, x, y)
    _clavicles(anatomy, water, x, y, spacing)
    water += _overlay(scene, x.shape[1])
    return np.maximum(water, 0, out=water).astype(np.float32, copy=False)


def _body(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Soft tissue of neck, shoulders and trunk, with breasts, windpipe and stomach bubble."""
    middle, apex = anatomy.middle, anatomy.apex
    trunk = anatomy.lung + anatomy.fat
    neck, shoulder = 0.42 * anatomy.lung, trunk + 42
    wide = neck + (shoulder - neck) / (1 + np.exp(-(y - apex + 2) / 9))
    wide = wide - (shoulder - trunk) / (1 + np.exp(-(y - apex - 105) / 16))
    across = np.minimum(np.abs(x - middle) / wide, 1)
    deep = anatomy.depth * (0.62 + 0.38 / (1 + np.exp(-(y - apex - 45) / 22)))
    water = deep * np.sqrt(1 - across**5)

    if anatomy.breast:
        r = anatomy.breast
        cy = anatomy.dome(1) - 38
        for side in (-1, 1):
            cx = middle + side * 0.56 * anatomy.lung
            below = np.maximum(y - cy, 0) / (0.95 * r)
            above = np.maximum(cy - y, 0) / (1.9 * r)
            inside = 1 - ((x - cx) / r) ** 2 - below**2 - above**2
            water += 30 * np.sqrt(np.maximum(inside, 0))

    carina = anatomy.hilum - 18
    windpipe = np.clip(1 - ((x - middle - 0.5 * anatomy.shift - 2) / 8.5) ** 2, 0, 1)
    water -= 16 * np.sqrt(windpipe) * np.clip((carina - y) / 6, 0, 1)
    for side in (-1, 1):
        along = side * (x - middle - 0.5 * anatomy.shift - 2)
        off = (y - carina) - 0.75 * along
        bronchus = np.clip(1 - (off / 7.5) ** 2, 0, 1) * np.clip(along / 4, 0, 1) * np.clip((38 - along) / 6, 0, 1)
        water -= 10 * np.sqrt(bronchus)
    if anatomy.bubble:
        bx, by = middle + 0.5 * anatomy.lung, anatomy.dome(1) + 9 + 0.8 * anatomy.bubble
        inside = 1 - ((x - bx) / (1.5 * anatomy.bubble)) ** 2 - ((y - by) / (0.8 * anatomy.bubble)) ** 2
        water -= 38 * np.sqrt(np.clip(inside, 0, 1))
    return water


def _ribs(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, spacing: float) -> np.ndarray:
    """Bone of all ribs: each is a loop that leaves the spine, arches down the wall and returns lower in front.

    All loops are level lines of one height field, so that one pass over the image draws them all.
    """
    out = np.abs(x - anatomy.middle)
    across = np.minimum(out / (anatomy.outer(y) + 4), 0.985)
    arch = np.sqrt(1 - across * across)
    steep = across / (arch * (anatomy.outer(y) + 4))
    inside = np.clip((anatomy.outer(y) + 7 - out) / 3, 0, 1)
    strong = 1 + 0.9 * across**8
    grow = 0.5 + 0.6 * np.clip((y - anatomy.apex) / 200, 0, 1)
    fall = 62 * grow
    half = 0.23 * anatomy.pitch

    back = y - (anatomy.apex - 6) - fall * (1 - arch)
    front = y - (anatomy.apex - 6) - fall - 46 * arch
    bone = _bars(back, fall * steep, anatomy, half, spacing, 0, 11) * np.clip((out - 16) / 6, 0, 1)
    ends = np.clip((across - 0.42) / 0.12, 0, 1)  # where bone turns into cartilage, which casts no shadow
    bone += 0.6 * ends * _bars(front, 46 * steep, anatomy, 1.1 * half, spacing, 12, 7)
    # Below the domes the ribs are short, and the belly's thickness drowns them.
    belly = np.clip((y - max(anatomy.domes) - 4) / 26, 0, 1)
    short = 1 - belly * (0.55 + 0.45 * np.clip((0.62 - across) / 0.2, 0, 1))
    return 15 * anatomy.bone * bone * inside * strong * short


def _bars(
    height: np.ndarray, slope: np.ndarray, anatomy: Anatomy, half: float, spacing: float, first: int, count: int
) -> np.ndarray:
    """Profile, 0 to 1, of tubes with a dense rim along the levels 0, pitch, 2 pitch … of `height`."""
    number = np.rint(height / anatomy.pitch)
    jitter = anatomy.rib_jitter[first + np.clip(number, 0, count - 1).astype(np.intp)].astype(np.float32)
    off = np.abs(height - number * anatomy.pitch - jitter) / np.sqrt(1 + slope * slope)
    tube = np.clip((half - off) / max(spacing, 1.2) + 0.5, 0, 1)
    rim = off / half
    return tube * (0.5 + 0.5 * rim * rim * rim) * ((number >= 0) & (number < count))


def _spine(anatomy: Anatomy, water: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Add vertebral bodies with discs between them, and the spinous processes, in place."""
    columns = np.flatnonzero(np.abs(x[0] - anatomy.middle) < 24)
    part = np.s_[:, columns[0] : columns[-1] + 1]
    off = np.abs(x[part] - anatomy.middle)
    phase = np.cos(2 * np.pi * (y - anatomy.apex) / (0.98 * anatomy.pitch))
    body = np.clip((19 - off) / 3, 0, 1) * (0.72 + 0.28 * (off / 19) ** 2)
    bone = body * (21 + 8 * np.clip(2.2 * phase, -1, 1))
    pedicle = np.exp(-(((off - 11.5) / 2.8) ** 2)) * np.clip(phase, 0, 1) ** 2
    spinous = np.exp(-((off / 2.6) ** 2)) * np.clip(-phase, 0, 1) ** 2
    water[part] += anatomy.bone * (bone + 8 * pedicle + 9 * spinous)


def _clavicles(anatomy: Anatomy, water: np.ndarray, x: np.ndarray, y: np.ndarray, spacing: float) -> None:
    """Add both collar bones, in place: an S from the breast bone up and out to the shoulder."""
    rows = np.flatnonzero(np.abs(y[:, 0] - anatomy.clavicle + 12) < 42)
    part = np.s_[rows[0] : rows[-1] + 1]
    along = (np.abs(x - anatomy.middle) - 17) / (anatomy.lung + 12)
    inside = np.clip(along / 0.03, 0, 1) * np.clip((1.02 - along) / 0.03, 0, 1)
    lift = 30 * along - 9 * np.sin(2 * np.pi * np.clip(along, 0, 1))
    slope = (30 - 18 * np.pi * np.cos(2 * np.pi * np.clip(along, 0, 1))) / (anatomy.lung + 12)
    off = np.abs(y[part] - anatomy.clavicle + lift) / np.sqrt(1 + slope * slope)
    half = 6.2 + 2.5 * np.clip(1 - along / 0.15, 0, 1)
    tube = np.clip((half - off) / max(spacing, 1.2) + 0.5, 0, 1)
    water[part] += anatomy.bone * inside * tube * (13 + 12 * np.minimum(off / half, 1) ** 3)


def _canvas(size: int) -> int:
    """Side of the canvas that fine lines are drawn on before they are averaged into pixels."""
    return max(256, 2 * size) if size < 512 else size


def _vessels(anatomy: Anatomy, width: float, size: int) -> np.ndarray:
    """Blood vessels of both lungs, (size, size) mm of water: trees that branch and thin out from the hila."""
    rng = _rng(anatomy.tree[0], _VESSELS, anatomy.tree[1])
    canvas = _canvas(size)
    scale = canvas / width
    image = Image.new("F", (canvas, canvas))
    pen = ImageDraw.Draw(image)
    generations: list[np.ndarray] = []
    for side in (-1, 1):
        count = 9
        angle = np.linspace(-1.35, 1.45, count) + rng.normal(0, 0.08, count)
        start_y = anatomy.hilum + np.linspace(-8, 20, count)
        start_x = np.full(count, anatomy.middle + 0.6 * anatomy.shift + side * 27.0)
        bore = rng.uniform(5.2, 7.5, count)
        length = rng.uniform(17, 27, count) * anatomy.lung / 134
        for _ in range(5):
            end_x = start_x + side * length * np.cos(angle)
            end_y = start_y + length * np.sin(angle)
            generations.append(np.stack([start_x, start_y, end_x, end_y, bore], axis=1))
            turn = np.stack([rng.uniform(0.06, 0.5, len(angle)), -rng.uniform(0.06, 0.5, len(angle))])
            angle = (angle + turn).ravel()
            start_x, start_y = np.tile(end_x, 2), np.tile(end_y, 2)
            bore = np.tile(bore, 2) * rng.uniform(0.56, 0.8, len(angle))
            length = np.tile(length, 2) * rng.uniform(0.72, 1.0, len(angle))
    segments = np.concatenate(generations)
    segments = segments[np.argsort(segments[:, 4], kind="stable")]  # the widest last, over their branches
    ends = (segments[:, :4] + [width / 2, 0, width / 2, 0]) * scale
    pixels = np.maximum(np.rint(segments[:, 4] * scale), 1)
    depth = (1 - _LUNG) * segments[:, 4] * np.minimum(segments[:, 4] * scale / pixels, 1) * 4.6
    for (x0, y0, x1, y1), thick, water in zip(ends.tolist(), pixels.astype(int).tolist(), depth.tolist(), strict=True):
        pen.line((x0, y0, x1, y1), fill=water, width=thick)
    fine = np.asarray(image.reduce(canvas // size)) if canvas > size else np.asarray(image)
    softness = 0.6 * size / width
    return ndimage.gaussian_filter(fine, softness, truncate=2.5) if softness > 0.4 else fine


def _overlay(scene: Scene, size: int) -> np.ndarray:
    """Shoulder blades, heads of the upper arms and the side marker, (size, size) mm of water."""
    anatomy, width = scene.anatomy, scene.width
    canvas = max(256, size)
    scale = canvas / width
    image = Image.new("F", (canvas, canvas))
    pen = ImageDraw.Draw(image)

    def place(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((px + width / 2) * scale, py * scale) for px, py in points]

    wall, top = anatomy.lung, anatomy.apex
    for side in (-1, 1):
        edge = anatomy.middle + side * (wall + 2 - anatomy.scapula)
        blade = place(
            [
                (edge - side * 14, top + 34),
                (edge + side * 34, top + 22),
                (edge + side * 44, top + 52),
                (edge + side * 6, top + 128),
                (edge - side * 2, top + 120),
            ]
        )
        pen.polygon(blade, fill=6.0 * anatomy.bone)
        pen.line([*blade, blade[0]], fill=12.0 * anatomy.bone, width=max(round(2.2 * scale), 1))
        shoulder = anatomy.middle + side * (wall + 46)
        (left, up), (right, down) = sorted(place([(shoulder - 21, top + 12), (shoulder + 21, top + 54)]))
        pen.ellipse((left, up, right, down), fill=20.0 * anatomy.bone)
        pen.polygon(
            place([(shoulder - 11, top + 45), (shoulder + 13, top + 45), (shoulder + side * 26, top + 190)]),
            fill=14.0 * anatomy.bone,
        )
    soft = ndimage.gaussian_filter(np.asarray(image), 1.1 * scale, truncate=2)

    lead = Image.new("F", (canvas, canvas))
    pen = ImageDraw.Draw(lead)
    letter, mx, my = scene.marker
    stroke = max(round(2.4 * scale), 1)
    if letter == "L":
        lines = [[(0, 0), (0, 14), (8, 14)]]
    else:
        lines = [[(0, 14), (0, 0), (6, 0), (8.5, 2), (8.5, 5), (6, 7), (0, 7)], [(4.5, 7), (9, 14)]]
    for line in lines:
        pen.line(place([(mx + px - 4, my + py) for px, py in line]), fill=170.0, width=stroke)
    total = np.maximum(soft, np.asarray(lead))
    return np.asarray(Image.fromarray(total).reduce(canvas // size)) if canvas > size else total


def draw(index: int, size: int, seed: int) -> Phantom:
    """Draw one radiograph.

    Args:
        index: number of the image in the data set, from 0.
        size: side of the image, 64 to 1024 pixels.
        seed: seed of the data set.

    Raises:
        StudyError: the index is negative or the size out of range.
    """
    _check(index, size)
    scene = compose(index, seed)
    return _phantom(scene, size, render(scene, size))


def _phantom(scene: Scene, size: int, image: np.ndarray) -> Phantom:
    place = scene.slot
    return Phantom(
        image=image,
        file=place.file,
        patient=place.patient,
        follow_up=place.follow_up,
        age=scene.age,
        sex=scene.sex,
        view=scene.view,
        findings=place.findings,
        boxes=boxes(scene, size),
        spacing=scene.width / size,
        test=place.test,
    )


def _check(index: int, size: int) -> None:
    if index < 0:
        raise StudyError(f"phantom index {index}: give a number from 0")
    if not SIZES[0] <= size <= SIZES[1]:
        raise StudyError(f"phantom size {size} px is out of range; give {SIZES[0]} to {SIZES[1]}")


# --- the data set ----------------------------------------------------------------------------------------------------


def write_dataset(raw: Path, images: int, size: int, seed: int, workers: int | None = None) -> None:
    """Draw a data set into `raw`, in the NIH layout.

    Writes `images/<patient>_<follow-up>.png` (8-bit grey), the data entries and box list with the NIH's own headers,
    the two official lists (no patient in both), and `phantom.json`, which records what was drawn. The tables come
    last: where the data entries are, the images are complete. Boxes are in pixels of the image as written (the NIH's
    are in pixels of its 1024-px images); pixel spacing is true at that size, so boxes times spacing are millimetres.

    An interrupted run is continued: images already there under the same parameters are kept. Images drawn under
    other parameters are replaced.

    Args:
        raw: folder to write, made if need be.
        images: how many images, from 1.
        size: side of an image, 64 to 1024 pixels.
        seed: seeds everything; the result doesn't depend on `workers`.
        workers: processes; all processors if None.

    Raises:
        StudyError: a number is out of range, `raw` holds data that is not a phantom's, or the disk takes no more.
    """
    if images < 1:
        raise StudyError(f"phantom images {images}: give a number from 1")
    _check(images - 1, size)
    try:
        _write_dataset(Path(raw), images, size, seed, workers)
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise StudyError(f"{raw}: phantoms cannot be written there ({reason}); free space or choose another") from error


def _write_dataset(raw: Path, images: int, size: int, seed: int, workers: int | None) -> None:
    parameters = {"recipe": RECIPE, "images": images, "size": size, "seed": seed}
    if _claim(raw, parameters):
        return
    folder = raw / "images"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {slot(index, seed).file for index in range(images)}
    for path in sorted(folder.iterdir()):
        if path.name not in wanted:  # left by a larger set, or half-written when a run was killed
            path.unlink()

    processes = min(workers or cpu_count(), images)
    tasks = (delayed(_write_image)(folder, index, size, seed) for index in range(images))
    drawn = Parallel(n_jobs=processes, return_as="generator", batch_size="auto")(tasks)
    rows = list(tqdm(drawn, total=images, desc=f"phantom radiographs, {size} px", unit="image", disable=None))

    _write(raw / BBOX_LIST, _table(BBOX_HEADER, [box for _, found in rows for box in found]))
    for name, test in ((TRAIN_VAL_LIST, False), (TEST_LIST, True)):
        files = [slot(index, seed).file for index in range(images) if slot(index, seed).test == test]
        _write(raw / name, "".join(f"{file}\n" for file in files).encode())
    _write(raw / DATA_ENTRY, _table(DATA_ENTRY_HEADER, [entry for entry, _ in rows]))
    _write(raw / STATE, json.dumps({**parameters, "complete": True}, indent=1).encode())


def _claim(raw: Path, parameters: dict[str, Any]) -> bool:
    """Make `raw` ready for these parameters; True where it already holds exactly this data set, complete.

    Raises:
        StudyError: `raw` is a link, or holds images that no phantom run recorded.
    """
    state = _read_state(raw)
    if raw.is_symlink() or (state is None and (raw / "images").exists() and any((raw / "images").iterdir())):
        raise StudyError(f"{raw}: holds images that are not phantoms; move them away or choose another dataset name")
    tables = [raw / name for name in (DATA_ENTRY, BBOX_LIST, TRAIN_VAL_LIST, TEST_LIST)]
    if state == {**parameters, "complete": True} and all(path.exists() for path in tables):
        present = sum(1 for _ in (raw / "images").glob("*.png"))
        if present == parameters["images"]:
            return True
    for path in tables:
        path.unlink(missing_ok=True)
    same = state is not None and all(state.get(key) == parameters[key] for key in ("recipe", "size", "seed"))
    if state is not None and not same:
        for path in (raw / "images").glob("*"):
            path.unlink()
    raw.mkdir(parents=True, exist_ok=True)
    _write(raw / STATE, json.dumps({**parameters, "complete": False}, indent=1).encode())
    return False


def _read_state(raw: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((raw / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _write_image(folder: Path, index: int, size: int, seed: int) -> tuple[list[Any], list[list[Any]]]:
    """Draw one image unless it is there, and return its row of the data entries and its rows of the box list."""
    scene = compose(index, seed)
    place = scene.slot
    path = folder / place.file
    if not path.exists():
        buffer = io.BytesIO()
        Image.fromarray(render(scene, size)).save(buffer, "PNG", compress_level=1)
        _write(path, buffer.getvalue())
    spacing = round(scene.width / size, 6)
    labels = "|".join(place.findings) or NO_FINDING_NIH
    entry = [place.file, labels, place.follow_up, place.patient, scene.age, scene.sex, scene.view]
    entry += [size, size, spacing, spacing]
    found = [
        [place.file, _BBOX_SPELLING.get(b.finding, b.finding), *(round(v, 3) for v in (b.x, b.y, b.width, b.height))]
        for b in boxes(scene, size)
    ]
    return entry, found


def _table(header: str, rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    text.write(header + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file complete or not at all; `atomic_write` lies above this module, which may not import it."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
