"""Training: samples and batches, callbacks, fits that go on where they stopped, and the choice of an ensemble.

It owns how prepared radiographs reach a model, what happens between epochs, and the model folder that a fit leaves. It
takes any Keras model; which layers it has is `networks`' or the notebook's business. Notebooks import these names here.
"""

from chestxray.config import lazy

_OWNERS = {
    "run": "Run describe_run start",
    "samples": "Samples class_targets load_augmented load_findings load_split predict",
    "batch_norm": "reestimate_batch_norm",
    "ensembling": "rank",
}
__getattr__ = lazy(__name__, _OWNERS)
