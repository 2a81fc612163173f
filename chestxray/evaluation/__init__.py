"""Evaluation: predictions tables, metrics with intervals, comparisons, calibration, operating points, subgroups.

Everything is computed from predictions tables, and every interval resamples patients. Notebooks take what they share
from here, as `evaluation.summary`, and the rest from its modules, as `operating_points.choose`.
"""

from chestxray.config import lazy

_OWNERS = {
    "predictions": "read_predictions read_models prediction_table balanced average one_class",
    "metrics": "macro_auroc confusion roc_points confident_errors label_suspects",
    "comparison": "METRICS resample evaluate summary per_class compare_with compare_all ranking beside_published",
    "localisation": "targets",
}
__getattr__ = lazy(__name__, _OWNERS)
