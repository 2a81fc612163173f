"""Ensembling: the trained models in the order of their validation score."""

from __future__ import annotations

import json

import pandas as pd

from chestxray.config import MODELS, Study, StudyError


def rank(study: Study) -> pd.DataFrame:
    """The trained models, highest mean validation AUROC of the six findings first.

    Args:
        study: the study.

    Returns:
        Columns `model`, `valid_six_finding_auroc`, `key` (of the fit), one row per model but the ensemble.

    Raises:
        StageMissing: a model has not been trained.
        StudyError: its `run.json` is damaged.
    """
    rows = []
    for name in MODELS:
        if name != "ensemble":
            path = study.require(study.paths.saved(name) / "run.json", f"stage 4 for {name}")
            try:
                run = json.loads(path.read_text("utf-8"))
                rows.append({"model": name, **{column: run[column] for column in ("valid_six_finding_auroc", "key")}})
            except (ValueError, KeyError) as error:
                raise StudyError(
                    f"{path}: damaged ({type(error).__name__}); delete it and train {name} again"
                ) from error
    return pd.DataFrame(rows).sort_values("valid_six_finding_auroc", ascending=False, ignore_index=True)
