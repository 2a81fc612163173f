"""Evaluation: predictions tables, metrics with intervals, comparisons, calibration, operating points, subgroups.

Everything is computed from predictions tables, and every interval resamples patients. Notebooks take what they share
from here, as `evaluation.summary`, and the rest from its modules, as `operating_points.choose`.
"""

from chestxray.config import lazy

_OWNERS = {
    "read_predictions": "predictions",
    "read_models": "predictions",
    "prediction_table": "predictions",
    "balanced": "predictions",
    "average": "predictions",
    "one_class": "predictions",
    "macro_auroc": "metrics",
    "confusion": "metrics",
    "roc_points": "metrics",
    "confident_errors": "metrics",
    "label_suspects": "metrics",
    "METRICS": "comparison",
    "resample": "comparison",
    "evaluate": "comparison",
    "summary": "comparison",
    "per_class": "comparison",
    "compare_with": "comparison",
    "compare_all": "comparison",
    "ranking": "comparison",
    "beside_published": "comparison",
    "targets": "localisation",
}
__getattr__ = lazy(__name__, _OWNERS)
