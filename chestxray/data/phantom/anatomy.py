"""Anatomy of phantoms: body, lungs, heart and diaphragm in millimetres, and how exposure and findings change them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from chestxray.config import SIX_FINDINGS

SIZES = (64, 1024)
"""Smallest and largest side of an image, in pixels."""

OTHER_FINDINGS = ("Cardiomegaly", "Emphysema")
"""Findings outside the seven classes that a few images show, as in the NIH set."""

NAMES = (*SIX_FINDINGS, *OTHER_FINDINGS)

WATER = 0.02  # linear attenuation of water at a chest tube's mean energy, per mm
LUNG = 0.27  # density of inflated lung, water = 1
PIXEL_SLACK_MM = 1.0  # how far outside its outline a lesion's soft edge may reach

BLOCK, PATIENT, IMAGE, NOISE, VESSELS = range(5)  # random numbers: seed [the data set's, one of these, number]


@dataclass(frozen=True)
class Anatomy:
    """One patient in one exposure. Lengths in mm; sides are -1 (image left) and 1."""

    apex: float  # y of the lung apices
    domes: tuple[float, float]  # y of the top of the right and the left diaphragm dome
    lung: float  # half the width of the rib cage, inside, at its widest
    drop: float  # how far the costophrenic angle lies below the dome
    depth: float  # thickness of the chest from front to back
    middle: float  # x of the spine
    shift: float  # how far heart and mediastinum are displaced to the image's right
    heart: float  # half-width of the heart's shadow
    aorta: float  # radius of the aortic knob
    fat: float  # soft tissue outside the ribs
    pitch: float  # distance from rib to rib
    rib_jitter: np.ndarray  # (24,) offset of each rib
    bone: float  # strength of bone, 1 for a young adult
    clavicle: float  # y of the inner ends of the clavicles
    scapula: float  # how far the shoulder blades overlap the lungs
    breast: float  # radius of the breast shadow, 0 for none
    bubble: float  # radius of the gas bubble of the stomach
    lucency: float  # factor on the aeration of the lungs
    tree: tuple[int, int]  # seed of the lung vessels

    def dome(self, side: int) -> float:
        return self.domes[0] if side < 0 else self.domes[1]

    @property
    def hilum(self) -> float:
        """Height of the lung roots."""
        return self.apex + 0.47 * (min(self.domes) - self.apex)

    def outer(self, y: np.ndarray) -> np.ndarray:
        """Distance of the rib cage's inside from the middle at heights `y`, both of one shape."""
        down = np.clip((y - self.apex) / (max(self.domes) + self.drop - self.apex), 0, 1)
        top = 0.40 * self.lung
        return top + (self.lung - top) * (1 - (1 - down) ** 2.4) ** 0.54

    def inner(self, y: np.ndarray, side: int) -> np.ndarray:
        """Distance of the lung's mediastinal border from the middle, mm.

        Args:
            y: heights in mm, any shape; the result has it too.
            side: -1 or 1.
        """
        down = np.clip((y - self.apex) / (0.30 * (max(self.domes) - self.apex)), 0, 1)
        top = 0.40 * self.lung
        return top - (top - 23 - side * self.shift) * np.sqrt(1 - (1 - down) ** 2)

    def diaphragm(self, out: np.ndarray, side: int) -> np.ndarray:
        """Height of the diaphragm, mm.

        Args:
            out: distances from the middle in mm, any shape; the result has it too.
            side: -1 or 1.
        """
        across = (out - 0.42 * self.lung) / (0.58 * self.lung)
        return self.dome(side) + np.where(across > 0, self.drop * np.abs(across) ** 2.4, 0.35 * self.drop * across**2)

    def air(self, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Length of the ray inside one lung, without heart or lesion, (H, W) mm.

        Args:
            x: columns on this side in mm, (1, W).
            y: rows in mm, (H, 1).
            side: -1 or 1.
        """
        out = side * (x - self.middle)
        inner, outer = self.inner(y, side), self.outer(y)
        across = np.abs((out - (inner + outer) / 2) / np.maximum((outer - inner) / 2, 1e-3))
        depth = 0.74 * self.depth * (0.55 + 0.45 * np.clip((y - self.apex) / 120, 0, 1))
        chord = np.sqrt(np.maximum(1 - across * across * across, 0)) * depth
        above = self.diaphragm(out, side) - y
        edge = PIXEL_SLACK_MM + 0.5
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


def expose(anatomy: Anatomy, view: str, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy as one exposure shows it.

    AP exposures are of lying or sitting patients near the tube: the heart is magnified, the breath is shallower, the
    clavicles stand higher and the shoulder blades overlap the lungs.

    Args:
        anatomy: the patient, in a PA exposure in deep inspiration.
        view: `PA` or `AP`.
        rng: the image's random numbers.
    """
    breath, middle, turn = rng.normal(0, 4), rng.uniform(-7, 7), rng.normal(0, 2)
    nearer, larger, higher = rng.uniform(14, 24), rng.uniform(1.13, 1.22), rng.uniform(10, 18)
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


def remodel(anatomy: Anatomy, finding: str, side: int, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy as a finding changes it, beside what it draws.

    Args:
        anatomy: the patient in this exposure.
        finding: one of `NAMES`.
        side: of the finding, -1 or 1.
        rng: the finding's random numbers.
    """
    right, left = anatomy.domes
    if finding == "Atelectasis":  # less volume: the dome is raised, heart and mediastinum are drawn to this side
        raised = float(rng.uniform(18, 30))
        domes = (right - raised * (side < 0), left - raised * (side > 0))
        return dataclasses.replace(anatomy, domes=domes, shift=anatomy.shift + side * float(rng.uniform(7, 12)))
    if finding == "Cardiomegaly":
        return dataclasses.replace(anatomy, heart=anatomy.heart * float(rng.uniform(1.3, 1.45)))
    if finding == "Emphysema":  # dark lungs, low flat domes, a narrow heart
        down = float(rng.uniform(12, 20))
        flat = {"domes": (right + down, left + down), "drop": 0.45 * anatomy.drop}
        return dataclasses.replace(anatomy, **flat, heart=0.85 * anatomy.heart, lucency=1.16 * anatomy.lucency)
    return anatomy
