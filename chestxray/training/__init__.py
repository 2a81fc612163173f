"""Training: samples and batches, recipes, fits that resume where they stopped, and the choice of an ensemble.

It owns how prepared radiographs reach a model, how it is fitted, and the model folder that a fit leaves. It takes
any Keras model; which layers it has is `networks`' business. Notebooks import the names below from here.
"""

from chestxray.config import lazy

_OWNERS = {
    "recipe": "Recipe",
    "run": "Run describe_run start",
    "samples": "class_log_odds class_targets load_augmented load_findings load_split multilabel_classes",
    "fitting": "predict_batches reestimate_batch_norm",
}
__getattr__ = lazy(__name__, _OWNERS)
