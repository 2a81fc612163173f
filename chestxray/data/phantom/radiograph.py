"""Radiographs of phantoms: tissue along each ray, X-ray attenuation, scatter and noise, as grey values with true boxes.

Lengths are millimetres in the plane of the detector: x grows to the right of the image (the patient's left) from the
middle of the image, y grows downwards from its top edge. Thicknesses are millimetres of water along the ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from chestxray.data.phantom.anatomy import IMAGE, LUNG, NAMES, NOISE, VESSELS, WATER, Anatomy, expose, remodel
from chestxray.data.phantom.lesions import MAKERS, Lesion, field_of
from chestxray.data.phantom.patients import Slot, patient_of, slot

_SCATTER = 0.28  # scattered quanta for each primary one behind a thick body and an anti-scatter grid
_SCATTER_BODY = 120.0  # mm of water beyond which thicker tissue adds no more scatter
_SCATTER_MM = 28.0  # standard deviation of the scattered quanta's spread
_DETECTOR_MM = 0.45  # standard deviation of the detector's and the focal spot's blur
_MARKERS = {  # lines of each letter, mm
    "L": [[(0, 0), (0, 14), (8, 14)]],
    "R": [[(0, 14), (0, 0), (6, 0), (8.5, 2), (8.5, 5), (6, 7), (0, 7)], [(4.5, 7), (9, 14)]],
}


class Box(NamedTuple):
    """The true place of a finding: NIH name, then left, top, width and height in pixels of the image as written."""

    finding: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Scene:
    """All parameters of one image, whatever its size."""

    slot: Slot
    age: int  # years
    sex: str  # M or F
    view: str  # PA or AP
    anatomy: Anatomy  # the patient in this exposure
    lesions: tuple[Lesion, ...]  # the signs of the findings
    width: float  # side of the square field of view, mm
    quanta: float  # X-ray quanta a mm² that would reach the detector without the patient
    window: tuple[float, float]  # thicknesses of water shown black and white, mm
    gamma: float  # exponent of the display's curve
    marker: tuple[str, float, float]  # letter, x and y in mm of the side marker
    seed: int  # of the data set


def compose(index: int, seed: int, *, findings: Sequence[str] | None = None, view: str | None = None) -> Scene:
    """Decide everything about one image.

    Args:
        index: number of the image, from 0.
        seed: seed of the data set.
        findings: of `NAMES`, to show in place of this image's own; `()` for none. The patient and the exposure stay
            the same.
        view: `PA` or `AP` in place of the one drawn by lot.
    """
    place = slot(index, seed)
    shown = place.findings if findings is None else tuple(sorted(findings))
    sex, age, anatomy = patient_of(place.patient, seed)
    rng = np.random.default_rng([seed, IMAGE, index])
    drawn_view = "PA" if rng.random() < 0.6 else "AP"
    view = view or drawn_view
    anatomy = expose(anatomy, view, rng)
    width = float(rng.uniform(342, 378))
    letter = "L" if rng.random() < 0.6 else "R"
    corner = (1 if letter == "L" else -1) * width * float(rng.uniform(0.38, 0.44))
    dark, bright = float(rng.uniform(0.14, 0.22)), float(rng.uniform(0.98, 1.1))

    lesions: list[Lesion] = []
    for finding in shown:
        # A stream of its own for each finding, so that showing another one doesn't move it.
        own = np.random.default_rng([seed, IMAGE, index, 1 + NAMES.index(finding)])
        side = -1 if own.random() < 0.5 else 1
        anatomy = remodel(anatomy, finding, side, own)  # atelectasis comes first: others lie in the lung that it leaves
        lesions += MAKERS[finding](anatomy, side, own) if finding in MAKERS else []

    return Scene(
        slot=dataclasses.replace(place, findings=shown),
        age=age + place.follow_up // 2,
        sex=sex,
        view=view,
        anatomy=anatomy,
        lesions=tuple(lesions),
        width=width,
        quanta=rng.uniform(1.5e4, 3e4) * (0.8 if view == "AP" else 1.0),
        window=(dark * anatomy.depth, bright * anatomy.depth),
        gamma=rng.uniform(0.85, 1.15),
        marker=(letter, corner, width * rng.uniform(0.05, 0.1)),
        seed=seed,
    )


def boxes(scene: Scene, size: int) -> tuple[Box, ...]:
    """Return the true boxes of a scene, cut at the image's edges.

    Args:
        scene: from `compose`.
        size: side of the image in pixels, in which boxes are given.
    """
    scale = size / scene.width
    found = []
    for lesion in scene.lesions:
        left, top, width, height = lesion.box(scene.anatomy)
        x0, x1 = np.clip([left + scene.width / 2, left + width + scene.width / 2], 0, scene.width) * scale
        y0, y1 = np.clip([top, top + height], 0, scene.width) * scale
        found.append(Box(lesion.finding, float(x0), float(y0), float(x1 - x0), float(y1 - y0)))
    return tuple(found)


def render(scene: Scene, size: int, *, noise: bool = True) -> np.ndarray:
    """Take the radiograph of a scene: (size, size) uint8.

    The water along every ray attenuates by Beer–Lambert; a share of what arrives is spread by scatter; the rest is
    blurred by focal spot and detector; quanta are counted (Poisson) and shown on a logarithmic scale, bone white.

    Args:
        scene: from `compose`.
        size: side of the image, 64 to 1,024 pixels.
        noise: whether quanta are counted; without, the expected count is shown.
    """
    spacing = scene.width / size
    x = ((np.arange(size) + 0.5) * spacing - scene.width / 2).astype(np.float32)[None, :]
    y = ((np.arange(size) + 0.5) * spacing).astype(np.float32)[:, None]
    water = _water(scene, x, y, spacing)

    primary = np.exp(-WATER * water)
    if _DETECTOR_MM / spacing > 0.4:  # less than that is lost in the pixel
        primary = ndimage.gaussian_filter(primary, _DETECTOR_MM / spacing, truncate=3)
    arrived = primary + _SCATTER * _spread(primary * np.minimum(water / _SCATTER_BODY, 1), _SCATTER_MM / spacing)
    quanta = arrived * np.float32(scene.quanta * spacing**2)
    if noise:
        rng = np.random.default_rng([scene.seed, NOISE, scene.slot.index])
        quanta = np.maximum(rng.poisson(quanta), 0.5).astype(np.float32)
    thickness = np.log(quanta / np.float32(scene.quanta * spacing**2)) / -WATER

    dark, bright = scene.window
    shown = np.clip((thickness - dark) / (bright - dark), 0, 1.25)
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
        field = field_of(anatomy, side, x[:, columns], y)
        for lesion in scene.lesions:
            if lesion.side == side:
                lesion.apply(field)
        part = water[:, columns]
        part -= (1 - LUNG) * anatomy.lucency * field.air
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


def _vessels(anatomy: Anatomy, width: float, size: int) -> np.ndarray:
    """Blood vessels of both lungs, (size, size) mm of water: trees that branch and thin out from the hila."""
    rng = np.random.default_rng([anatomy.tree[0], VESSELS, anatomy.tree[1]])
    # Fine lines are drawn on a canvas of 256 pixels or more, a multiple of the image's, and averaged afterwards.
    finer = max(-(-256 // size), 2 if size < 512 else 1)
    canvas = finer * size
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
    depth = (1 - LUNG) * segments[:, 4] * np.minimum(segments[:, 4] * scale / pixels, 1) * 4.6
    for (x0, y0, x1, y1), thick, water in zip(ends.tolist(), pixels.astype(int).tolist(), depth.tolist(), strict=True):
        pen.line((x0, y0, x1, y1), fill=water, width=thick)
    fine = np.asarray(image.reduce(finer))
    softness = 0.6 * size / width
    return ndimage.gaussian_filter(fine, softness, truncate=2.5) if softness > 0.4 else fine


def _overlay(scene: Scene, size: int) -> np.ndarray:
    """Shoulder blades, heads of the upper arms and the side marker, (size, size) mm of water."""
    anatomy, width = scene.anatomy, scene.width
    finer = -(-256 // size)  # as in `_vessels`
    canvas = finer * size
    scale = canvas / width
    image = Image.new("F", (canvas, canvas))
    pen = ImageDraw.Draw(image)

    def place(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((px + width / 2) * scale, py * scale) for px, py in points]

    wall, top = anatomy.lung, anatomy.apex
    for side in (-1, 1):
        edge = anatomy.middle + side * (wall + 2 - anatomy.scapula)
        corners = ((-14, 34), (34, 22), (44, 52), (6, 128), (-2, 120))
        blade = place((edge + side * across, top + down) for across, down in corners)
        pen.polygon(blade, fill=6.0 * anatomy.bone)
        pen.line([*blade, blade[0]], fill=12.0 * anatomy.bone, width=max(round(2.2 * scale), 1))
        shoulder = anatomy.middle + side * (wall + 46)
        (left, up), (right, down) = sorted(place([(shoulder - 21, top + 12), (shoulder + 21, top + 54)]))
        pen.ellipse((left, up, right, down), fill=20.0 * anatomy.bone)
        arm = place([(shoulder - 11, top + 45), (shoulder + 13, top + 45), (shoulder + side * 26, top + 190)])
        pen.polygon(arm, fill=14.0 * anatomy.bone)
    soft = ndimage.gaussian_filter(np.asarray(image), 1.1 * scale, truncate=2)

    lead = Image.new("F", (canvas, canvas))
    pen = ImageDraw.Draw(lead)
    letter, mx, my = scene.marker
    stroke = max(round(2.4 * scale), 1)
    for line in _MARKERS[letter]:
        pen.line(place([(mx + px - 4, my + py) for px, py in line]), fill=170.0, width=stroke)
    total = np.maximum(soft, np.asarray(lead))
    return np.asarray(Image.fromarray(total).reduce(finer))
