"""Evaluation: predictions tables, metrics with intervals, comparisons, calibration, operating points, subgroups.

`predictions` reads the tables; `metrics` computes AUROC and its values in resampled patients; `bootstrap` draws the
patients and makes intervals and p-values of such values; `comparison` joins them to the tables of results.
`posterior` names a class at given class shares. `calibration`, `operating_points`, `subgroups`, `robustness`,
`localisation` and `associations` each answer one more question in the same way. Notebooks take what they share from
here, as `evaluation.summary`, and the rest from its modules, as `operating_points.choose`.
"""

from chestxray.config import lazy

_OWNERS = {
    "predictions": "read_predictions read_models prediction_table average",
    "metrics": "macro_auroc confusion roc_points confident_errors",
    "comparison": "METRICS resample evaluate summary per_class compare_with compare_all at_shares beside_published",
    "posterior": "SHARES read_shares",
    "localisation": "targets",
}
__getattr__ = lazy(__name__, _OWNERS)
