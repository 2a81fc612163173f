"""Tables of predictions for tests that judge what is computed from them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from chestxray.config import CLASSES, PRESENT, SIX_FINDINGS

NIH_NAMES = {name: "No Finding" if name == "No_finding" else name for name in CLASSES}


def predictions_table(images=420, patients=150, skill=1.2, seed=1, decimals=None):
    """Predictions with several images a patient, some images with two findings, and, rounded, many ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(len(CLASSES), size=images)
    truth[: 2 * len(CLASSES)] = np.tile(np.arange(len(CLASSES)), 2)
    findings = [NIH_NAMES[CLASSES[k]] for k in truth]
    for i in range(2 * len(CLASSES), images, 4):
        second = SIX_FINDINGS[rng.integers(len(SIX_FINDINGS))]
        if findings[i] not in ("No Finding", second):
            findings[i] += f"|{second}"
    scores = rng.normal(size=(images, len(CLASSES)))
    scores[np.arange(images), truth] += skill
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    single = ["|" not in text for text in findings]
    table = pd.DataFrame(
        {
            "image": [f"{i:08d}_000.png" for i in range(images)],
            "patient": [f"{p:05d}" for p in rng.integers(patients, size=images)],
            "label": [CLASSES[k] if one else "" for k, one in zip(truth, single, strict=True)],
            "selected": single,
            "findings": findings,
            "view": np.where(rng.random(images) < 0.4, "AP", "PA"),
        }
    )
    shown = [[name in text.split("|") for name in SIX_FINDINGS] for text in findings]
    odds = rng.normal(size=(images, len(SIX_FINDINGS))) + skill * np.array(shown) - 1
    columns = np.hstack([shares, 1 / (1 + np.exp(-odds))])
    table[[*CLASSES, *PRESENT]] = columns if decimals is None else columns.round(decimals)
    return table
