"""Ablation: what each part of the fine-tuning recipe is worth on validation, one change at a time.

`python -m tests.benchmarks.bench_recipes --dataset nih_9k [--only NAME ...]` fits every recipe of `RECIPES` on a
small budget (`SIZE`, `EPOCHS`) and every remedy for class imbalance of `IMBALANCE` on the features of the first one. A
row is added to `4_models/ablation/recipes.csv` or `imbalance.csv` when it is measured; rows that are there stay, so an
interrupted run resumes. Only validation images are used; no test image is read.
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
from chestxray.training.recipe import Recipe
from chestxray.training.run import Run, write_csv
from chestxray.training.samples import Samples, class_log_odds, load_augmented, load_findings, load_split

SIZE, EPOCHS, HEAD_EPOCHS, PENALTY, SEEDS = 80, 3, 20, 8000, (2024, 2025)


@dataclasses.dataclass(frozen=True)
class Change:
    """One recipe: its name in the table, and where it departs from the reference.

    Attributes:
        text: the name in the table.
        idea: beyond what the study set out to compare.
        seeds: one fit per seed.
        network: arguments of `transfer.transfer`; `strength` and `flip` go to the augmentation.
        recipe: fields of the preliminary stage's `Recipe`.
        frozen: how many of the backbone's blocks that stage freezes.
        views: how many augmented versions of each radiograph have cached feature maps; 0 augments anew each epoch.
        preliminary: False trains all layers on the seven classes alone, for the same number of steps.
        soft: soften the labels of the preliminary stage by the prior from other visits, with this weight.
        closed_form: begin it with a findings' head fitted in closed form and re-estimated BatchNorm; where labels are
            softened, predictions from image features are combined with the prior, as in 3a.
        then: epochs with all layers trainable on the seven classes at the end, at a tenth of the rate.
    """

    text: str
    idea: bool = False
    seeds: tuple[int, ...] = SEEDS[:1]
    network: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    frozen: int = 0
    views: int = 0
    preliminary: bool = True
    soft: float = 0.0
    closed_form: bool = False
    then: int = 0


PRESENT = Change(
    "3a as it is: both, no mixup, epochs go on",
    idea=True,
    seeds=SEEDS,
    network={"pooling": "blocks"},
    recipe={"mixup": 0.0, "ema_restart": False},
    soft=0.7,
    closed_form=True,
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
    "blocks_held": Change("the first two blocks held as ImageNet left them", idea=True, seeds=SEEDS, frozen=2),
    "three_held": Change("the first three blocks held", idea=True, frozen=3),
    "maps_kept": Change("three blocks held: maps of six versions kept", idea=True, frozen=3, views=6),
    "maps_anew": Change(
        "three held, maps kept, BatchNorm on plain images",
        idea=True,
        recipe={"batch_norm": "reestimate"},
        frozen=3,
        views=6,
    ),
    "stronger": Change("augmentation half as strong again", idea=True, network={"strength": 3.0}),
    "focal": Change("focal loss on the findings", idea=True, recipe={"loss": "binary_focal"}),
    "slower_statistics": Change("BatchNorm momentum .99", idea=True, network={"bn_momentum": 0.99}),
    "taught": Change("labels softened by other visits", idea=True, soft=0.7),
    "depths": Change(
        "pooled behind every block, head in closed form",
        idea=True,
        network={"pooling": "blocks"},
        closed_form=True,
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
"""Remedies for class imbalance: fields of the head's recipe. The first takes stage 2.2's tree, the rest `train`."""


def main() -> None:
    """Measure what is missing and print both tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--dataset", default="nih_9k", help="a dataset prepared by stages 2.1 and 2.2")
    arguments.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    chosen = arguments.parse_args()
    for name in chosen.only:
        for seed in RECIPES[name].seeds:
            measure(config.open_study(chosen.dataset, "cpu", seed), name)
    for table in ("recipes", "imbalance"):
        print(pd.read_csv(place(table)).to_string(index=False))


def place(table: str) -> Path:
    """The file of a table, `recipes` or `imbalance`."""
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
    odds = class_log_odds(everyone) if change.preliminary else None
    net = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, layers, log_odds=odds, **settings)
    classes, classes_valid = load_augmented(study), load_split(study, "valid")
    changed = {"loss": "binary", "ema": study.profile.ema, "mixup": 0.3, **change.recipe}
    head = Recipe("head", HEAD_EPOCHS, learning_rate=3e-3, label_smoothing=0.1)
    softened = everyone
    if change.closed_form:
        softened = fit_closed_form(study, net, everyone, change.soft)
    elif change.soft:
        softened = distillation.soften(everyone, distillation.load_prior(study, everyone), change.soft)
    if change.preliminary:
        recipe = Recipe("all_findings", EPOCHS, study.profile.learning_rate, **changed)
        net.train_backbone(True, change.frozen)
        if change.views:
            first, last = net.divide(change.frozen)
            run.fit_head(first, last, recipe, softened, valid, net.augment, change.views)
        else:
            run.fit(net.findings, recipe, softened, valid)
    if change.closed_form:
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


def fit_closed_form(study: config.Study, net: transfer.Transfer, everyone: Samples, weight: float) -> Samples:
    """Fit the findings' head in closed form, as 3a does; returns the samples of the preliminary stage."""
    fitting.reestimate_batch_norm(net.preprocess, net.backbone, everyone, study.seed)
    versions = [fitting.predict_batches(net.features, samples) for samples in (everyone, everyone.mirrored())]
    features = net.standardise(np.concatenate(versions))
    softened = distillation.distil(study, everyone, features, PENALTY, weight)[1] if weight else everyone
    net.findings.get_layer("findings").set_weights(ridge.fit(features, np.tile(softened.y, (2, 1)), PENALTY))
    return softened


def compare_imbalance(study: config.Study, net: transfer.Transfer) -> None:
    """Fit the class head anew with each remedy for class imbalance, on the same features and for as many steps."""
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
