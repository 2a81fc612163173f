"""Training: samples and batches, recipes, fits that resume where they stopped, and the choice of an ensemble.

The room owns how prepared radiographs reach a model, how it is fitted, and the model folder that a fit leaves. It takes
any Keras model; which layers it has is `networks`' business. Notebooks import the names below from here.
"""

from chestxray.config import lazy

_OWNERS = {
    "Recipe": "recipe",
    "Run": "run",
    "class_log_odds": "samples",
    "class_targets": "samples",
    "describe_run": "run",
    "load_augmented": "samples",
    "load_findings": "samples",
    "load_split": "samples",
    "multilabel_classes": "samples",
    "predict_batches": "fitting",
    "reestimate_batch_norm": "fitting",
    "start": "run",
}
__getattr__ = lazy(__name__, _OWNERS)
