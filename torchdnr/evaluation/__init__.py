"""Evaluation of classifiers that may reject, under attack."""

from torchdnr.evaluation.curve import AttackCurve, SecurityCurve
from torchdnr.evaluation.line_up import BOUNDARY_WALK, LINE_SEARCH_PGD, Attack, default_line_up
from torchdnr.evaluation.metrics import (
    accuracy_under_attack,
    evasion_rate,
    predict_labels,
    rejection_rate,
    wilson_interval,
)
from torchdnr.evaluation.plots import plot_curves, plot_examples
from torchdnr.evaluation.report import format_table, load_results, save_results
from torchdnr.evaluation.security import security_evaluation

__all__ = [
    "BOUNDARY_WALK",
    "LINE_SEARCH_PGD",
    "Attack",
    "AttackCurve",
    "SecurityCurve",
    "accuracy_under_attack",
    "default_line_up",
    "evasion_rate",
    "format_table",
    "load_results",
    "plot_curves",
    "plot_examples",
    "predict_labels",
    "rejection_rate",
    "save_results",
    "security_evaluation",
    "wilson_interval",
]
