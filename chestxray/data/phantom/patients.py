"""Patients of phantoms: age, sex and anatomy, and which findings and official list each image has."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from chestxray.config import SIX_FINDINGS
from chestxray.data.phantom.anatomy import BLOCK, OTHER_FINDINGS, PATIENT, Anatomy

_BLOCK = 100  # images planned together: every block holds each finding equally often in both lists
_BLOCK_TEST = 25
_TRAIN_PATIENTS = (1,) * 18 + (2,) * 9 + (3,) * 6 + (4,) * 4 + (5,)  # images a patient: 75 in 38 patients
_TEST_PATIENTS = (1,) * 6 + (2,) * 3 + (3,) * 3 + (4,)  # 25 images in 13 patients
_BLOCK_PATIENTS = len(_TRAIN_PATIENTS) + len(_TEST_PATIENTS)


@dataclass(frozen=True)
class Slot:
    """One image's place in the data set, before anything is drawn."""

    index: int  # number of the image, from 0
    patient: int  # number of the patient, from 1
    follow_up: int  # number of the image among this patient's, from 0
    test: bool  # whether the patient is in the official test list
    findings: tuple[str, ...]  # NIH names in alphabetical order; empty for No Finding

    @property
    def file(self) -> str:
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


@functools.lru_cache(maxsize=64)
def _slots(block: int, seed: int) -> tuple[Slot, ...]:
    """Patients and findings of the 100 images of a block.

    Findings follow shuffled sets of twelve (six images with one finding each, six without), apart for the two lists,
    so that each class is equally common in both, however few blocks are drawn, and is independent of patient, age, sex
    and view.
    """
    rng = np.random.default_rng([seed, BLOCK, block])
    groups: list[tuple[float, bool, int]] = []
    for test, sizes in ((False, _TRAIN_PATIENTS), (True, _TEST_PATIENTS)):
        images = rng.permutation(sizes)
        middle = (np.cumsum(images) - images / 2) / images.sum()  # spreads the test patients over the block
        groups += [(float(m), test, int(n)) for m, n in zip(middle, images, strict=True)]
    findings = {False: _findings(rng, _BLOCK - _BLOCK_TEST, block), True: _findings(rng, _BLOCK_TEST, block)}

    slots: list[Slot] = []
    for rank, (_, test, images) in enumerate(sorted(groups)):
        for follow_up in range(images):
            patient = block * _BLOCK_PATIENTS + rank + 1
            slots.append(Slot(block * _BLOCK + len(slots), patient, follow_up, test, findings[test].pop(0)))
    return tuple(slots)


def _findings(rng: np.random.Generator, images: int, block: int) -> list[tuple[str, ...]]:
    """The findings of each of `images` images; beyond whole sets, two findings, or one outside the classes."""
    single: list[tuple[str, ...]] = [(finding,) for finding in SIX_FINDINGS] + [()] * len(SIX_FINDINGS)
    findings: list[tuple[str, ...]] = []
    for _ in range(images // len(single)):
        findings += [single[i] for i in rng.permutation(len(single))]
    for extra in range(images - len(findings)):
        if (block + extra) % 4 == 3:
            shown: tuple[str, ...] = (OTHER_FINDINGS[int(rng.integers(len(OTHER_FINDINGS)))],)
        else:
            shown = tuple(sorted(str(f) for f in rng.choice(SIX_FINDINGS, size=2, replace=False)))
        findings.insert(int(rng.integers(len(findings) + 1)), shown)
    return findings


def slot(index: int, seed: int) -> Slot:
    """Return an image's place in the data set.

    Args:
        index: number of the image, from 0.
        seed: of the data set.
    """
    return _slots(index // _BLOCK, seed)[index % _BLOCK]


def patient_of(number: int, seed: int) -> tuple[str, int, Anatomy]:
    """Draw a patient by lot: sex, M or F; age at the first image, years; anatomy in a PA exposure in deep inspiration.

    Args:
        number: of the patient, from 1.
        seed: of the data set.
    """
    rng = np.random.default_rng([seed, PATIENT, number])
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
    return sex, age, anatomy
