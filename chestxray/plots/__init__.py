"""Plots: the figures of the notebooks, in one style.

Notebooks take them from here, as `plots.forest`. Every figure has a `title` that says what is shown, and a `note` that
says on which data (`Study.data_note`). Colours differ for colour-blind readers too; no metric is computed here.
"""

from chestxray.config import lazy

_OWNERS = {
    "style": "save interval image_grid decimal shares signed",
    "data": "patients co_occurrence grey_levels distributions mean_images effects",
    "training": "learning_curves",
    "evaluation": "confusion_matrices roc_curves forest pairs reliability decision_curves groups",
    "explanation": "pointing peaks robustness",
}
__getattr__ = lazy(__name__, _OWNERS)
