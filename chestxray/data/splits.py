"""Splits: which patients are in train, valid and test, which images the study selects, and the tables of both.

A patient is in one split only. Everything here works on the image table: no file or image is read.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pandas as pd

from chestxray.config import CLASSES, SPLITS, StudyError
from chestxray.data.nih_tables import LABELS, LIST_NAMES, Entries, Lists
from chestxray.data.own_tables import summary

TEST_SHARE = 0.2
"""Share of the images held out for test where the source has no official lists."""

BALANCED_TEST = 290
"""Images of each class in the balanced test, where there are so many: as many as in the published study."""

FEWEST_PATIENTS = 5
"""A class with fewer patients than this cannot be spread over three splits meaningfully."""


def check_lists(table: pd.DataFrame, lists: Lists | None) -> None:
    """Make sure that the official lists decide the split of every image.

    Args:
        table: the image table of the images that are here, columns `image` and `patient`.
        lists: as `nih_tables.read_lists` gives, spelt as in the table.

    Raises:
        StudyError: an image is in neither list, all are in one, or a patient has images in both.
    """
    if lists is None:
        return
    way = "or remove both lists to split by patient"
    listed = [table["image"].isin(names) for names in lists[:2]]
    if len(neither := table["image"][~(listed[0] | listed[1])]):
        raise StudyError(
            f"the official lists: {len(neither):,} of {len(table):,} images here are in neither, such as "
            f"{', '.join(sorted(neither)[:3])}; add them to a list, {way}"
        )
    for name, there in zip(LIST_NAMES, listed, strict=True):
        if not there.any():
            raise StudyError(f"{name}: lists none of the {len(table):,} images here; add images of it, {way}")
    train_val, test = (set(table.loc[there, "patient"].tolist()) for there in listed)
    if both := train_val & test:
        raise StudyError(
            f"the test list: patient {min(both)} and {len(both) - 1} more have images in the train_val list too; "
            "move all of a patient's images to one list"
        )


def _strata(table: pd.DataFrame) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The patients (sorted), the strata, and how many images of each stratum a patient has, (patients, strata) int64.

    Strata are label × view, each label, each view, the images and the patients. Images without a single-class label
    form a stratum of their own.
    """
    label = table["label"].where(table["label"].ne(""), "other")
    patient, patients = pd.factorize(table["patient"], sort=True)
    names, columns = [], []
    for stratum in (label + " " + table["view"], label, "view " + table["view"]):
        code, values = pd.factorize(stratum, sort=True)
        cells = np.bincount(patient * len(values) + code, minlength=len(patients) * len(values))
        names += list(values)
        columns.append(cells.reshape(len(patients), len(values)))
    columns += [np.bincount(patient)[:, None], np.ones((len(patients), 1), np.int64)]
    return np.asarray(patients), [*names, "images", "patients"], np.concatenate(columns, axis=1).astype(np.int64)


def hold_out(table: pd.DataFrame, share: float, seed: int) -> set[str]:
    """Choose the patients of a held-out split, so that every stratum gives it the same share of its images.

    Patients are taken one by one, those with most images first and in seeded order among equals, and each goes to the
    side that keeps the strata closest to their share, counted relative to the stratum's size. It is the greedy rule of
    scikit-learn's `StratifiedGroupKFold` for one cut at any share, in a twentieth of the time and closer to the share
    (`tests/benchmarks/bench_splits.py`). A class that ends with no image on one side, though it has several patients,
    gives that side its patient with the fewest images.

    Args:
        table: the image table.
        share: share of the images to hold out, 0 to 1.
        seed: seeds the order of patients; that of the table's rows does not matter.
    """
    patients, strata, counts = _strata(table)
    order = np.random.default_rng(seed).permutation(len(patients))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    # Whole numbers throughout, so that ties fall the same way on every machine.
    part = Fraction(share).limit_denominator(1000)
    weights = (1 << 20) // counts.sum(axis=0)
    excess = np.zeros(counts.shape[1], np.int64)  # (held out − share × assigned) × denominator
    held_out = np.zeros(len(patients), bool)
    for patient in order:
        row = counts[patient]
        gain = part.denominator - 2 * part.numerator
        held_out[patient] = int((weights * row * (2 * excess + gain * row)).sum()) < 0
        excess += row * ((part.denominator if held_out[patient] else 0) - part.numerator)
    for column in (strata.index(label) for label in CLASSES if label in strata):
        has = counts[:, column] > 0
        for side in (True, False):
            if share > 0 and has.sum() > 1 and not (has & (held_out == side)).any():
                movable = np.flatnonzero(has)
                held_out[movable[np.argmin(counts[movable].sum(axis=1))]] = side
        if has.sum() == 1:
            held_out[has] = False  # a single patient is more useful for training than for a test
    return set(patients[held_out])


def assign(table: pd.DataFrame, lists: Lists | None, valid_share: float, seed: int) -> pd.Series:
    """Give every image its split, by patient: `train`, `valid` or `test`, on the table's index.

    The official lists decide train_val and test where there are any. Without lists, `TEST_SHARE` of the images are held
    out by patient. Validation is the patients of its list where there is one; else it is carved out of train_val by
    patient, stratified by label and view.

    Args:
        table: the image table, with `image`, `patient`, `view` and `label`.
        lists: as `nih_tables.read_lists` gives.
        valid_share: share of the train_val images held out for validation, 0 to 1.
        seed: seeds the draw.

    Raises:
        StudyError: as `check_lists`; there are too few patients to split, or no image has one of the seven labels.
    """
    if (patients := table["patient"].nunique()) < FEWEST_PATIENTS:
        remedy = f"add images, at least {FEWEST_PATIENTS} are needed"
        raise StudyError(f"the image table: images of {patients} patients; {remedy}")
    if table["label"].eq("").all():
        fault = "no image shows one of the seven classes alone"
        raise StudyError(f"the image table: {fault}; add images, or map own labels")
    check_lists(table, lists)
    named = [set(table.loc[table["image"].isin(names), "patient"].tolist()) for names in lists or ()]
    test = table["patient"].isin(named[1] if named else hold_out(table, TEST_SHARE, seed))
    valid = table["patient"].isin(named[2] if named[2:] else hold_out(table[~test], valid_share, seed + 1))
    return pd.Series(np.select([test, valid], ["test", "valid"], "train"), index=table.index, name="split")


def select(table: pd.DataFrame, no_finding: int, seed: int) -> pd.Series:
    """Choose the study's images, all single-label ones of the six findings and some of No_finding: True for these.

    No_finding is thinned in the same proportion in every split, and over patients: first one image of each patient in
    a seeded order, then a second one of each, and so on. Neither the order of the rows nor of the file matters.

    Args:
        table: the image table with its `split`.
        no_finding: at most this many No_finding images over all splits.
        seed: seeds the order of patients and of each patient's images.
    """
    chosen = table["label"].ne("")
    healthy = table.loc[table["label"].eq("No_finding"), ["image", "patient", "split"]]
    if len(healthy) > no_finding:
        healthy = _in_rounds(healthy, np.random.default_rng([seed, 2]))
        exact = healthy["split"].value_counts().sort_index() * no_finding / len(healthy)
        quota = np.floor(exact).astype(int)
        # Largest remainders give whole numbers that add up to `no_finding`.
        largest = (exact - quota).sort_values(ascending=False, kind="stable").index[: no_finding - quota.sum()]
        quota[largest] += 1
        chosen[healthy.index[healthy.groupby("split").cumcount() >= healthy["split"].map(quota)]] = False
    return chosen.rename("selected")


def _in_rounds(images: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """Put images in a random order in which every patient gives one before any gives a second."""
    images = images.sort_values("image")
    images = images.iloc[random.permutation(len(images))]
    names = np.sort(images["patient"].unique())
    turn = images["patient"].map(dict(zip(names, random.permutation(len(names)), strict=True)))
    return images.assign(round=images.groupby("patient").cumcount(), turn=turn).sort_values(["round", "turn"])


def balanced_test(planned: pd.DataFrame, seed: int) -> pd.Series:
    """Choose the images of the balanced test among the test split's: True for these, on the table's index.

    It has the same number of single-label images of each class, `BALANCED_TEST` as in the published study, or as many
    as the rarest class has. A class is drawn over patients in rounds, as `select` draws No_finding.

    Args:
        planned: the image table with `split` and `selected`.
        seed: seeds the draw, which does not depend on the order of the rows.
    """
    tested = planned["split"].eq("test")
    single = planned[tested & planned["selected"]]
    size = min(BALANCED_TEST, int(single["label"].value_counts().reindex(CLASSES, fill_value=0).min()))
    balanced = pd.Series(False, index=planned.index)
    for number, label in enumerate(CLASSES):
        random = np.random.default_rng([seed, 3, number])
        drawn = _in_rounds(single.loc[single["label"].eq(label), ["image", "patient"]], random)
        balanced[drawn.index[:size]] = True
    return balanced


def plan(table: pd.DataFrame, lists: Lists | None, valid_share: float, no_finding: int, seed: int) -> pd.DataFrame:
    """Decide every image's split, and whether it is selected and in the balanced test: columns added to the table.

    Args:
        table: the image table, one row per image.
        lists: the official lists, as `nih_tables.read_lists` gives; None where there are none.
        valid_share: share of the train_val images held out for validation, 0 to 1.
        no_finding: at most this many No_finding images are selected.
        seed: seeds every draw.
    """
    planned = table.assign(split=assign(table, lists, valid_share, seed))
    planned["selected"] = select(planned, no_finding, seed)
    return planned.assign(balanced_test=balanced_test(planned, seed))


def selection(planned: pd.DataFrame) -> pd.DataFrame:
    """Selected images by `split` and `class`, with a row `Total` for each split: `images`, `patients`, views and sexes.

    An image whose view or sex is unknown is in none of these.
    """
    rows = []
    for split in SPLITS:
        part = planned[planned["selected"] & planned["split"].eq(split)]
        for label in (*CLASSES, "Total"):
            group = part if label == "Total" else part[part["label"].eq(label)]
            cells = [int(group["view"].eq(view).sum()) for view in ("PA", "AP")]
            cells += [int(group["sex"].eq(sex).sum()) for sex in ("F", "M")]
            rows.append((label, split, len(group), group["patient"].nunique(), *cells))
    return pd.DataFrame(rows, columns=["class", "split", "images", "patients", "PA", "AP", "F", "M"])


def _by_class(rows: pd.DataFrame) -> pd.DataFrame:
    """`images` and `patients` of each class; `Total` counts an image once, however many rows it has."""
    table = rows.groupby("label")["patient"].agg(images="size", patients="nunique").reindex(CLASSES, fill_value=0)
    table.loc["Total"] = [rows.index.nunique(), rows["patient"].nunique()]
    return table


def test_counts(planned: pd.DataFrame) -> pd.DataFrame:
    """Images and patients of both tests, by class and in total: columns (`all` | `balanced`, `images` | `patients`).

    Among all test images (`all`) an image counts for each of its findings, so the rows do not add up to the total.
    """
    tested = planned[planned["split"].eq("test")]
    findings = tested["findings"].str.split("|").explode().map(LABELS)
    each_finding = tested.loc[findings.index].assign(label=findings)
    return pd.concat({"all": _by_class(each_finding), "balanced": _by_class(planned[planned["balanced_test"]])}, axis=1)


def shortage(table: pd.DataFrame) -> str:
    """Why no model can be trained on the images of a table, in a line; "" where one can.

    Where there are `split` and `selected`, the selected images of each split count.
    """
    images = table[table["selected"]] if "selected" in table else table
    lacking = []
    for label in CLASSES:
        own = images[images["label"].eq(label)]
        patients = own["patient"].nunique()
        absent = [split for split in SPLITS if "split" in own and split not in set(own["split"])]
        if patients < FEWEST_PATIENTS or absent:
            nowhere = f", none in {' and '.join(absent)}" if patients and absent else ""
            lacking.append(f"{label} ({patients} patient{'s' * (patients != 1)}{nowhere})")
    if not lacking:
        return ""
    return (
        f"training needs all seven classes, each of {FEWEST_PATIENTS} patients or more and in every split, and lacks "
        f"{', '.join(lacking)}; add images, or leave out stages 2.2, 4 and 5 (--only 1 2.1 3)"
    )


def no_model(table: pd.DataFrame) -> list[str]:
    """The note that no model can be trained on these images, as `shortage` says; none where one can."""
    lacking = shortage(table)
    return [f"No model: {lacking}"] if lacking else []


def require_trainable(planned: pd.DataFrame, name: str) -> None:
    """Make sure that a model can be trained.

    Args:
        planned: the manifest, or what `plan` gives.
        name: of the table, for the message.

    Raises:
        StudyError: a class lacks patients, or images of a split.
    """
    if lacking := shortage(planned):
        raise StudyError(f"{name}: {lacking}")


def describe(entries: Entries, planned: pd.DataFrame, lists: Lists | None) -> list[str]:
    """What was read and how it was split, one line each.

    Args:
        entries: the image table as read.
        planned: what `plan` made of it.
        lists: the official lists that `plan` was given.
    """
    table = entries.table
    read = (
        f"{entries.source.name}: {entries.rows:,} rows, {len(table):,} images of {table['patient'].nunique():,} "
        f"patients, {len(entries.rejected):,} things left out or emptied"
    )
    given = "No lists given or beside the table: test is held out here, by patient"
    if lists:
        given = f"Official lists: {len(lists[0]):,} and {len(lists[1]):,} images"
    crossing = int((planned.groupby("patient")["split"].nunique() > 1).sum())
    chosen = f"{int(planned['selected'].sum()):,} images selected; {crossing} patients in two splits"
    return [read, *entries.notes, *summary(entries.rejected), given, chosen, *no_model(planned)]


def tables(planned: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title → table to print: single-label images, the selection, and both tests."""
    single = planned[planned["label"].ne("")]
    is_test = single["split"].eq("test")
    sides = pd.concat({"train_val": _by_class(single[~is_test]), "test": _by_class(single[is_test])}, axis=1)

    def flat(table: pd.DataFrame) -> pd.DataFrame:
        return table.set_axis([" ".join(names) for names in table.columns], axis=1).rename_axis("class").reset_index()

    return {
        "Images with one of the seven labels": flat(sides),
        "Selected images": selection(planned),
        "All test images, each counted for each of its findings, and the balanced test": flat(test_counts(planned)),
    }
