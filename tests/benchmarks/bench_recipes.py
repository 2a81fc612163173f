"""Measure what each part of the fine-tuning recipe is worth on validation, one change at a time.

`python -m tests.benchmarks.bench_recipes --dataset nih_sample [--only NAME ...]` fits every recipe of `RECIPES` on a
small budget (`SIZE`, `EPOCHS`) and every answer to class imbalance of `IMBALANCE` on the features of the first one. A
row is added to `4_models/ablation/recipes.csv` or `imbalance.csv` when it is measured; rows that are there are kept,
so a run that was stopped goes on. Validation alone is looked at; no test image is read.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from chestxray import config
from chestxray.data import augmentation
from chestxray.evaluation import comparison, predictions
from chestxray.networks import transfer
from chestxray.training import distillation, fitting, ridge
from chestxray.training.run import Recipe, Run, write_csv
from chestxray.training.samples import Samples, load_augmented, load_findings, load_split, log_odds

SIZE, EPOCHS, HEAD_EPOCHS, PENALTY, SEEDS = 80, 3, 20, 8000, (2024, 2025)


@dataclasses.dataclass(frozen=True)
class Change:
    """One recipe: what it says to a reader, and where it departs from the reference.

    Attributes:
        text: the table's words.
        idea: beyond what the study set out to compare.
        seeds: one fit a seed.
        network: arguments of `models.transfer`; `strength` and `flip` go to the augmentation.
        recipe: fields of the preliminary stage's `Recipe`.
        held: how many of the backbone's blocks that stage leaves as they are.
        views: how many versions of each radiograph those blocks see beforehand; 0 lets them see a new one each epoch.
        preliminary: False trains all layers on the seven classes alone, for the same number of steps.
        taught: soften the labels of the preliminary stage by what other visits let expect, with this weight.
        begun: begin it at a findings' head fitted in closed form, with BatchNorm's statistics taken anew; where labels
            are softened, what is seen in the radiograph joins the other visits, as in 3a.
        then: epochs with all layers trainable on the seven classes at the end, at a tenth of the rate.
    """

    text: str
    idea: bool = False
    seeds: tuple[int, ...] = SEEDS[:1]
    network: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    held: int = 0
    views: int = 0
    preliminary: bool = True
    taught: float = 0.0
    begun: bool = False
    then: int = 0


PRESENT = Change(
    "3a as it is: both, no mixup, epochs go on",
    idea=True,
    seeds=SEEDS,
    network={"pooling": "blocks"},
    recipe={"mixup": 0.0, "ema_restart": False},
    taught=0.7,
    begun=True,
)
RECIPES = {
    "reference": Change("the reference", seeds=SEEDS),
    "classes_only": Change("without the preliminary stage: seven classes only", seeds=SEEDS, preliminary=False),
    "batch_norm_frozen": Change("BatchNorm frozen as ImageNet left it", recipe={"batch_norm": "freeze"}),
    "batch_norm_anew": Change("BatchNorm re-estimated for the averaged weights", recipe={"batch_norm": "reestimate"}),
    "no_average": Change("no running mean of the weights", recipe={"ema": 0.0}),
    "no_mixing": Change("no mixup", recipe={"mixup": 0.0}),
    "milder": Change("augmentation half as strong", network={"strength": 1.0}),
    "no_augmentation": Change("no augmentation", network={"strength": 0.0, "flip": False}),
    "no_warm_up": Change("no warm-up", recipe={"warmup": 0.0}),
    "smoothing": Change("labels smoothed by .1", recipe={"label_smoothing": 0.1}),
    "running_average": Change(
        "epochs go on from the last step, not the mean", idea=True, recipe={"ema_restart": False}
    ),
    "blocks_held": Change("the first two blocks held as ImageNet left them", idea=True, seeds=SEEDS, held=2),
    "three_held": Change("the first three blocks held", idea=True, held=3),
    "maps_kept": Change("three blocks held: maps of six versions kept", idea=True, held=3, views=6),
    "maps_anew": Change(
        "three held, maps kept, BatchNorm on plain images",
        idea=True,
        recipe={"batch_norm": "reestimate"},
        held=3,
        views=6,
    ),
    "stronger": Change("augmentation half as strong again", idea=True, network={"strength": 3.0}),
    "focal": Change("focal loss on the findings", idea=True, recipe={"loss": "binary_focal"}),
    "slower_statistics": Change("BatchNorm momentum .99", idea=True, network={"bn_momentum": 0.99}),
    "taught": Change("labels softened by other visits", idea=True, taught=0.7),
    "depths": Change(
        "pooled behind every block, head in closed form",
        idea=True,
        network={"pooling": "blocks"},
        begun=True,
    ),
    "present": PRESENT,
    "classes_after": dataclasses.replace(
        PRESENT, text="3a, then an epoch of all layers on seven classes", idea=False, then=1
    ),
    "no_dropping": Change(
        "no dropout, no stochastic depth", idea=True, network={"dropout": 0.0, "drop_connect_rate": 0.0}
    ),
}

IMBALANCE = {
    "augmented files": {},
    "nothing": {},
    "balanced sampling": {"balanced": True},
    "class weights": {"class_weight": True},
    "focal loss": {"loss": "categorical_focal"},
    "logit-adjusted loss": {"loss": "logit_adjusted"},
}
"""Answers to class imbalance: fields of the head's recipe. The first takes the tree of stage 2.2, the rest `train`."""


def main() -> None:
    """Measure what is missing and print both tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--dataset", default="nih_sample", help="a dataset prepared by stages 2.1 and 2.2")
    arguments.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    chosen = arguments.parse_args()
    for name in chosen.only:
        for seed in RECIPES[name].seeds:
            measure(config.open_study(chosen.dataset, "cpu", seed), name)
    for table in ("recipes", "imbalance"):
        print(pd.read_csv(place(table)).to_string(index=False))


def place(table: str) -> Path:
    """Where a table is kept."""
    return config.ABLATION / f"{table}.csv"


def measure(study: config.Study, name: str) -> None:
    """Fit one recipe with one seed and add its row, unless it is there."""
    change = RECIPES[name]
    if has("recipes", name=name, seed=study.seed):
        return
    everyone, valid = (load_findings(study, split) for split in ("train", "valid"))
    settings = {"strength": 2.0, "flip": True, "dropout": 0.3, "drop_connect_rate": 0.2, "bn_momentum": 0.9}
    settings |= change.network
    run = Run(study, f"recipes/{name}-{study.seed}", settings)
    layers = augmentation.layers(settings.pop("strength"), study.seed, flip=settings.pop("flip"))
    odds = log_odds(everyone) if change.preliminary else None
    net = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, layers, log_odds=odds, **settings)
    classes, classes_valid = load_augmented(study), load_split(study, "valid")
    changed = {"loss": "binary", "ema": study.profile.ema, "mixup": 0.3, **change.recipe}
    head = Recipe("head", HEAD_EPOCHS, learning_rate=3e-3, label_smoothing=0.1)
    taught = everyone
    if change.begun:
        taught = begin(study, net, everyone, change.taught)
    elif change.taught:
        taught = distillation.soften(everyone, distillation.expect(study, everyone), change.taught)
    if change.preliminary:
        recipe = Recipe("all_findings", EPOCHS, study.profile.learning_rate, **changed)
        net.train_backbone(True, change.held)
        if change.views:
            held, above = net.divide(change.held)
            run.fit_head(held, above, recipe, taught, valid, net.augment, change.views)
        else:
            run.fit(net.findings, recipe, taught, valid)
    if change.begun:
        tree = fitting.predict_batches(net.features, classes)
        net.head.get_layer("classes").set_weights(ridge.fit(tree, classes.y, PENALTY, balanced=True))
    else:
        run.fit_head(net.features, net.head, head, classes, classes_valid)
    if not change.preliminary:
        epochs = round(EPOCHS * len(everyone) / len(classes))
        recipe = Recipe("fine_tune", epochs, study.profile.learning_rate, **{**changed, "loss": "categorical"})
        run.fit(net.classifier, recipe, classes, classes_valid)
    if change.then:
        rate = study.profile.learning_rate / 10
        recipe = Recipe("fine_tune", change.then, rate, label_smoothing=0.1, ema=study.profile.ema)
        run.fit(net.classifier, recipe, classes, classes_valid)
    row = {"name": name, "recipe": change.text, "idea": change.idea, "seed": study.seed}
    add("recipes", {**row, **scores(net.classifier, study)})
    if name == "reference" and study.seed == SEEDS[0]:
        compare_imbalance(study, net)


def begin(study: config.Study, net: transfer.Transfer, everyone: Samples, weight: float) -> Samples:
    """Begin at a findings' head in closed form, as 3a does; returns what the preliminary stage learns from."""
    fitting.settle(net.seen, net.backbone, everyone, study.seed)
    seen = [fitting.predict_batches(net.features, samples) for samples in (everyone, everyone.mirrored())]
    features = net.standardise(np.concatenate(seen))
    taught = distillation.teach(study, everyone, features, PENALTY, weight)[1] if weight else everyone
    net.findings.get_layer("findings").set_weights(ridge.fit(features, np.tile(taught.y, (2, 1)), PENALTY))
    return taught


def compare_imbalance(study: config.Study, net: transfer.Transfer) -> None:
    """Fit the class head anew with each answer to class imbalance, on the same features and for as many steps."""
    classes, plain = load_augmented(study), load_split(study, "train")
    valid = load_split(study, "valid")
    start = net.head.get_weights()
    for name, fields in IMBALANCE.items():
        train = classes if name == "augmented files" else plain
        epochs = round(HEAD_EPOCHS * len(classes) / len(train))
        net.head.set_weights([0 * weight for weight in start])
        run = Run(study, f"recipes/imbalance-{name.replace(' ', '-')}", fields)
        recipe = Recipe("head", epochs, learning_rate=3e-3, label_smoothing=0.0, **fields)
        run.fit_head(net.features, net.head, recipe, train, valid)
        alone = keras.Model(net.features.input, net.head(net.features.output))
        add("imbalance", {"answer": name, "seed": study.seed, "epochs": epochs, **scores(alone, study)})


def scores(model: keras.Model, study: config.Study) -> dict[str, float]:
    """Validation metrics of a classifier."""
    valid = load_split(study, "valid", selected=False)
    table = predictions.prediction_table(valid.table, fitting.predict_batches(model, valid))
    found = comparison.evaluate(table, draws=200, seed=0)["estimate"]
    return {name: round(found[name], 4) for name in ("six_finding_auroc", "macro_auroc", "balanced_accuracy")}


def has(table: str, **values: Any) -> bool:
    """Whether a table has a row with these values."""
    if not place(table).exists():
        return False
    rows = pd.read_csv(place(table))
    return bool((rows[list(values)] == pd.Series(values)).all(axis=1).any())


def add(table: str, row: dict[str, Any]) -> None:
    """Add a row to a table on disk."""
    before = [pd.read_csv(place(table))] if place(table).exists() else []
    write_csv(pd.concat([*before, pd.DataFrame([row])], ignore_index=True), place(table))


if __name__ == "__main__":
    main()
