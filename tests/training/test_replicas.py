"""Several devices: a fit on two logical CPU devices goes on where it was killed, and predicts as one device's does.

Logical devices have to be set up before TensorFlow starts, so each fit has a process of its own.
"""

import shutil

import numpy as np
import pandas as pd
from fits import in_turn, study_at


def test_two_devices_do_what_one_does(prepared_root, tmp_path):
    root = shutil.copytree(prepared_root, tmp_path / "root", symlinks=True)
    in_turn("fit_on_devices", root, ("one", 1, "never"), ("two", 2, "killed"), ("two", 2, "never"))
    one, two = (study_at(root).paths.saved(name) for name in ("one", "two"))
    for name in ("history.csv", "predictions_test.csv"):
        # The oldest Keras allowed reports the training loss of several devices in another way, and of few radiographs
        # two in another order are already a thousandth of the AUROC.
        unlike = ["seconds", "loss", "val_six_finding_auroc"]
        tables = [pd.read_csv(folder / name).drop(columns=unlike, errors="ignore") for folder in (one, two)]
        assert len(tables[0]) == len(tables[1]) > 1
        assert np.allclose(*(table.select_dtypes("number") for table in tables), atol=1e-4, equal_nan=True), name
