"""Evaluation: predictions, metrics and their intervals, comparisons, calibration, operating points, subgroups."""
