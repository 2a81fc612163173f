"""Plots: the figures of the notebooks, in one style.

Notebooks take them from here, as `plots.forest`. Every figure has a `title` that says what is shown, and a `note` that
says on which data (`Study.data_note`). Colours differ for colour-blind readers too; no metric is computed here.
"""

from chestxray.config import lazy

_OWNERS = {
    "save": "style",
    "interval": "style",
    "image_grid": "style",
    "decimal": "style",
    "shares": "style",
    "signed": "style",
    "patients": "data",
    "co_occurrence": "data",
    "grey_levels": "data",
    "distributions": "data",
    "mean_images": "data",
    "effects": "data",
    "learning_curves": "training",
    "confusion_matrices": "evaluation",
    "roc_curves": "evaluation",
    "forest": "evaluation",
    "ranks": "evaluation",
    "pairs": "evaluation",
    "reliability": "evaluation",
    "decision_curves": "evaluation",
    "groups": "evaluation",
    "pointing": "explanation",
    "randomisation": "explanation",
    "robustness": "explanation",
}
__getattr__ = lazy(__name__, _OWNERS)
