"""Whether a probability means what it says, and putting it right where it doesn't.

It owns reliability diagrams, calibration errors, temperature scaling fitted on validation, and the correction for
classes that are rarer in the clinic than in training. It knows predictions tables and nothing of networks or figures.

Two questions are asked of a model. Of a **finding**, on the natural test: of the radiographs given 20 %, do 20 % show
it? Each finding is a question of its own, and nothing needs to sum to one. Of the **classes**, on the radiographs with
exactly one of them: is the most probable class right as often as its probability says? There the seven probabilities
are first brought to sum to one (`evaluation.one_class`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special

from chestxray.config import CLASSES, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.predictions import checked, one_class, shows

BINS = 10
_TINY = 1e-7
_HOTTEST = 100.0


def bin_edges(scores: np.ndarray, bins: int = BINS, strategy: str = "quantile") -> np.ndarray:
    """Where the bins of a reliability diagram end.

    Args:
        scores: (n,) probabilities.
        bins: how many.
        strategy: `quantile`, bins of equally many images, or `uniform`, bins of equal width.

    Returns:
        (bins + 1,) from lowest to highest, fewer where scores coincide; an image belongs to the bin whose upper edge
        is the first not below its score.

    Raises:
        StudyError: the strategy is unknown.
    """
    if strategy == "uniform":
        return np.linspace(0, 1, bins + 1)
    if strategy == "quantile":
        return np.unique(np.percentile(scores, np.linspace(0, 100, bins + 1)))
    raise StudyError(f"strategy {strategy!r} is unknown; there are: quantile, uniform")


def _bin_totals(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int, strategy: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, sum of scores, and positives of each bin in every draw, each (1 + draws, bins)."""
    edges = bin_edges(scores, bins, strategy)
    inside = np.searchsorted(edges[1:-1], scores)
    cells = np.eye(max(1, len(edges) - 1))[inside]
    return draws.totals(cells), draws.totals(cells * scores[:, None]), draws.totals(cells * truth[:, None])


def reliability(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int = BINS, strategy: str = "quantile"
) -> pd.DataFrame:
    """The points of a reliability diagram.

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool, whether what they foretell is so.
        draws: draws over the same images.
        bins: how many.
        strategy: as for `bin_edges`.

    Returns:
        One row a bin that has images: `predicted` (mean probability), `observed` (share that is so) with its interval
        `low` and `high`, and `images`.
    """
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=bool)
    images, foretold, found = _bin_totals(scores, truth, draws, bins, strategy)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = found / images
    rows = []
    for place in np.flatnonzero(images[0]):
        low, high, _ = bootstrap.interval(observed[:, place])
        point = {"predicted": foretold[0, place] / images[0, place], "observed": observed[0, place]}
        rows.append(point | {"low": low, "high": high, "images": int(images[0, place])})
    return pd.DataFrame(rows)


def error_draws(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int = BINS, strategy: str = "quantile"
) -> np.ndarray:
    """Expected calibration error in every draw: the mean gap of a reliability diagram (Naeini et al., AAAI 2015).

    Even a perfect model shows some error on few images, and a draw shows more; give its interval by
    `resampling.interval(…, basic=True)`.

    Returns:
        (1 + draws,), 0 to 1.
    """
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=bool)
    images, foretold, found = _bin_totals(scores, truth, draws, bins, strategy)
    return np.abs(foretold - found).sum(axis=1) / images.sum(axis=1)


def brier_draws(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> np.ndarray:
    """Brier score in every draw: the mean squared error of probabilities (Brier, Mon Weather Rev 1950).

    Args:
        scores: (n,) probabilities of one question, or (n, K) of classes that sum to one.
        truth: the same shape, 0 or 1.
        draws: draws over the same images.

    Returns:
        (1 + draws,), 0 to 1 of one question, 0 to 2 of classes.
    """
    squares = (np.asarray(scores, dtype=float) - np.asarray(truth, dtype=float)) ** 2
    return draws.means(squares.reshape(len(squares), -1).sum(axis=1))


@dataclass(frozen=True)
class Scaling:
    """Temperature scaling of classes (Guo et al., ICML 2017), with a bias for each class where one was fitted.

    Attributes:
        temperature: above 1 makes the probabilities more even.
        bias: (K,) added to each class's scaled log-probability.
    """

    temperature: float
    bias: np.ndarray

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Scale (n, K) scores, which need not sum to one; what comes back does."""
        logits = np.log(one_class(probabilities)) / self.temperature + self.bias
        return special.softmax(logits, axis=1)


def fit_classes(probabilities: np.ndarray, labels: np.ndarray, bias: bool = False, even: bool = False) -> Scaling:
    """Fit a temperature, and on request a bias for each class, by the log-likelihood of the true classes.

    Args:
        probabilities: (n, K) scores of validation images.
        labels: (n,) class indices.
        bias: fit a bias for each class too; they sum to zero.
        even: let every class weigh the same, as if all were equally common.

    Raises:
        StudyError: no image.
    """
    labels = np.asarray(labels, dtype=int)
    if not len(labels):
        raise StudyError("calibration: no validation image with a single class; use a dataset with more images")
    logits = np.log(one_class(probabilities))
    number = logits.shape[1]
    weights = 1 / np.bincount(labels, minlength=number)[labels] if even else np.ones(len(labels))
    weights = weights / weights.sum()
    truth = np.eye(number)[labels]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = logits * np.exp(-parameters[0]) + (parameters[1:] if bias else 0)
        surprise = special.logsumexp(scaled, axis=1) - scaled[range(len(labels)), labels]
        slope = (special.softmax(scaled, axis=1) - truth) * weights[:, None]
        by_heat = -(slope * logits).sum() * np.exp(-parameters[0])
        return float(weights @ surprise), np.r_[by_heat, slope.sum(axis=0) if bias else []]

    reach = np.log(_HOTTEST)
    limits = [(-reach, reach)] + [(-20, 20)] * (number if bias else 0)
    found = optimize.minimize(loss, np.zeros(len(limits)), jac=True, method="L-BFGS-B", bounds=limits)
    shifts = found.x[1:] - found.x[1:].mean() if bias else np.zeros(number)
    return Scaling(float(np.exp(found.x[0])), shifts)


def fit_findings(valid: pd.DataFrame) -> pd.DataFrame:
    """Fit a temperature and a bias for each class's log-odds on all validation images (Platt, 1999).

    A rare finding's probability, learned where it was made common, becomes the share of such radiographs that show it.

    Args:
        valid: predictions for validation.

    Returns:
        Index `class`; columns `temperature` (above 0, so that no order of images changes), `bias`, `n_images` and
        `n_positive`. A class that no image, or every image, shows keeps temperature 1 and bias 0.
    """
    valid = checked(valid)
    rows = {}
    for name in CLASSES:
        truth = shows(valid, name)
        temperature, bias = fit_finding(valid[name].to_numpy(dtype=float), truth)
        rows[name] = {"temperature": temperature, "bias": bias, "n_images": len(truth), "n_positive": int(truth.sum())}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")
    return table.astype({"n_images": int, "n_positive": int})


def fit_finding(scores: np.ndarray, truth: np.ndarray, bias: bool = True) -> tuple[float, float]:
    """Temperature and bias of one finding's log-odds: `expit(logit(score) / temperature + bias)` fits `truth` best."""
    truth = np.asarray(truth, dtype=bool)
    if truth.all() or not truth.any():
        return 1.0, 0.0
    odds = _log_odds(scores)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = np.exp(-parameters[0]), parameters[1] if bias else 0.0
        scaled = odds * slope + shift
        surprise = np.logaddexp(0, np.where(truth, -scaled, scaled)).mean()
        gap = (special.expit(scaled) - truth) / len(truth)
        return float(surprise), np.r_[-(gap * odds).sum() * slope, [gap.sum()] if bias else []]

    limits = [(-np.log(_HOTTEST), np.log(_HOTTEST)), (-20, 20)][: 1 + bias]
    found = optimize.minimize(loss, np.zeros(len(limits)), jac=True, method="L-BFGS-B", bounds=limits)
    return float(np.exp(found.x[0])), float(found.x[1]) if bias else 0.0


def apply_findings(predictions: pd.DataFrame, fitted: pd.DataFrame) -> pd.DataFrame:
    """Predictions with each class's probability calibrated by what `fit_findings` found on validation."""
    calibrated = predictions.copy()
    for name, row in fitted.iterrows():
        odds = _log_odds(predictions[name].to_numpy(dtype=float))
        calibrated[name] = special.expit(odds / row["temperature"] + row["bias"])
    return calibrated


def _log_odds(scores: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(scores, _TINY, 1 - _TINY))


def shift(probabilities: np.ndarray, trained: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Correct for classes being commoner or rarer than in training (Saerens, Latinne & Decaestecker, 2002, eq. 2.4).

    It holds where only the classes' shares differ, and not what a class looks like.

    Args:
        probabilities: (n, K) scores.
        trained: (K,) shares of the classes that the model was trained on.
        there: (K,) shares where it is used.

    Returns:
        (n, K), each row sums to one.
    """
    moved = one_class(probabilities) * (np.asarray(there, dtype=float) / np.asarray(trained, dtype=float))
    return moved / moved.sum(axis=1, keepdims=True)


def estimate_shares(
    probabilities: np.ndarray, trained: np.ndarray, steps: int = 1000, tolerance: float = 1e-8
) -> np.ndarray:
    """The classes' shares among images without any label, by expectation-maximisation (Saerens et al., 2002, eq. 2.9).

    Args:
        probabilities: (n, K) scores of the images in question; the better calibrated, the better the estimate.
        trained: (K,) shares of the classes that the model was trained on.
        steps: at most so many.
        tolerance: stop when no share changes by more.

    Returns:
        (K,) shares that sum to one.
    """
    shares = np.asarray(trained, dtype=float)
    for _ in range(steps):
        before, shares = shares, shift(probabilities, trained, shares).mean(axis=0)
        if np.abs(shares - before).max() < tolerance:
            break
    return shares


def findings_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of each class on the natural test, before and after what validation teaches.

    Args:
        valid: predictions for validation, on which temperature and bias are fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`class`, `stage`, `metric`): stages `as trained`, `temperature`, `temperature and bias`; metrics `ece`
        (bins of equally many images) and `brier`. Columns `estimate`, `low`, `high`, `draws`.
    """
    valid, test = checked(valid), checked(test)
    drawn = Draws.of(test["patient"], draws, seed)
    rows = {}
    for name in CLASSES:
        truth, learned = shows(test, name), shows(valid, name)
        scores, held_out = (table[name].to_numpy(dtype=float) for table in (test, valid))
        stages = {"as trained": scores}
        for stage, bias in (("temperature", False), ("temperature and bias", True)):
            temperature, moved = fit_finding(held_out, learned, bias)
            stages[stage] = special.expit(_log_odds(scores) / temperature + moved)
        for stage, values in stages.items():
            rows[name, stage, "ece"] = _error_entry(values, truth, drawn)
            rows[name, stage, "brier"] = bootstrap.entry(brier_draws(values, truth, drawn))
    return _frame(rows, ["class", "stage", "metric"])


def classes_table(
    valid: pd.DataFrame, test: pd.DataFrame, trained: np.ndarray | None = None, draws: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibration of the most probable class among the radiographs with exactly one of the seven.

    Args:
        valid: predictions for validation; temperature and shares come from it.
        test: predictions for test.
        trained: (7,) shares of the classes in training; equal if None, as in the study's balanced training set.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Two tables. Calibration: index (`stage`, `metric`), stages `as trained`, `temperature`, `temperature and bias`,
        `shares of validation` and `shares estimated` (prior correction after a temperature and biases fitted with all
        classes weighing the same), metrics `ece` (of the most probable class), `brier` (0 to 2) and `accuracy`.
        Shares: index `class`, columns `training`, `validation`, `estimated` (on test without labels) and `test`.
    """
    tables = [table[table["label"].ne("")] for table in (checked(valid), checked(test))]
    (held_out, learned), (scores, truth) = (
        (
            table[list(CLASSES)].to_numpy(dtype=float),
            pd.Categorical(table["label"], categories=list(CLASSES)).codes.astype(int),
        )
        for table in tables
    )
    number = len(CLASSES)
    trained = np.full(number, 1 / number) if trained is None else np.asarray(trained, dtype=float)
    there = np.bincount(learned, minlength=number) / max(1, len(learned))
    # Without the biases the estimate goes astray (Alexandari, Kundaje & Shrikumar, ICML 2020).
    even = fit_classes(held_out, learned, bias=True, even=True).apply(scores)
    estimated = estimate_shares(even, trained)
    stages = {
        "as trained": one_class(scores),
        "temperature": fit_classes(held_out, learned).apply(scores),
        "temperature and bias": fit_classes(held_out, learned, bias=True).apply(scores),
        "shares of validation": shift(even, trained, there),
        "shares estimated": shift(even, trained, estimated),
    }
    drawn = Draws.of(tables[1]["patient"], draws, seed)
    rows = {}
    for stage, values in stages.items():
        right = values.argmax(axis=1) == truth
        rows[stage, "ece"] = _error_entry(values.max(axis=1), right, drawn)
        rows[stage, "brier"] = bootstrap.entry(brier_draws(values, np.eye(number)[truth], drawn))
        rows[stage, "accuracy"] = bootstrap.entry(drawn.means(right))
    real = np.bincount(truth, minlength=number) / max(1, len(truth))
    shares = pd.DataFrame(
        {"training": trained, "validation": there, "estimated": estimated, "test": real},
        index=pd.Index(CLASSES, name="class"),
    )
    return _frame(rows, ["stage", "metric"]), shares


def reliability_table(
    stages: dict[str, pd.DataFrame], draws: int = 2000, seed: int = 0, bins: int = BINS
) -> pd.DataFrame:
    """Reliability diagrams of each class on the natural test, for several versions of the same predictions.

    Args:
        stages: predictions tables of the same images, such as before and after calibration.
        draws: how many times the patients are drawn.
        seed: seeds the draws.
        bins: how many, each of equally many images.

    Returns:
        Columns `class`, `stage`, and those of `reliability`.
    """
    parts = []
    for stage, predictions in stages.items():
        table = checked(predictions)
        drawn = Draws.of(table["patient"], draws, seed)
        for name in CLASSES:
            points = reliability(table[name].to_numpy(dtype=float), shows(table, name), drawn, bins)
            parts.append(points.assign(**{"class": name, "stage": stage}))
    table = pd.concat(parts, ignore_index=True)
    return table[["class", "stage", *(name for name in table if name not in ("class", "stage"))]]


def _error_entry(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> dict[str, float]:
    """The calibration error with its basic interval, kept within 0 to 1 and around the estimate."""
    entry = bootstrap.entry(error_draws(scores, truth, draws), basic=True)
    return entry | {"low": max(0.0, entry["low"]), "high": min(1.0, max(entry["high"], entry["estimate"]))}


def _frame(rows: dict[tuple[str, ...], dict[str, float]], names: list[str]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=names)
    return table
