"""Evaluation of classifiers that may reject, under attack."""

from torchdnr.decisions import predict_labels
from torchdnr.evaluation.curve import (
    AttackCurve,
    Refinement,
    SecurityCurve,
    median_evasion_norm,
)
from torchdnr.evaluation.detection import (
    Detection,
    Measures,
    detection_scores,
    measure,
    measure_detection,
    rejection_scores,
    robust_error,
    robust_errors,
    threshold_at_tpr,
)
from torchdnr.evaluation.figures import (
    plot_curves,
    plot_examples,
    plot_risk_coverage,
    plot_roc,
    plot_stratified,
    plot_threshold_sweep,
)
from torchdnr.evaluation.images import save_images
from torchdnr.evaluation.line_up import (
    ATTACKS,
    BOUNDARY_WALK,
    LINE_SEARCH_PGD,
    Attack,
    build_line_up,
    default_line_up,
)
from torchdnr.evaluation.metrics import (
    DecisionRates,
    Estimate,
    accuracy_under_attack,
    decision_rates,
    evasion_rate,
    median_of,
    rejection_rate,
    share,
    wilson_interval,
)
from torchdnr.evaluation.report.html import save_html
from torchdnr.evaluation.report.table import (
    attack_costs,
    attack_rates,
    format_table,
    load_results,
    save_csv,
    save_results,
)
from torchdnr.evaluation.risk_coverage import RiskCoverage, risk_coverage
from torchdnr.evaluation.roc import ROC, auroc, auroc_difference, fpr_at_tpr, roc_curve
from torchdnr.evaluation.security import security_evaluation, security_evaluations
from torchdnr.evaluation.stratified import ALPHAS, StratifiedCurve, stratified_curve
from torchdnr.evaluation.threshold_sweep import (
    ThresholdSweep,
    WithThreshold,
    threshold_sweep,
    thresholds_at_rates,
)

__all__ = [
    "ALPHAS",
    "ATTACKS",
    "BOUNDARY_WALK",
    "LINE_SEARCH_PGD",
    "ROC",
    "Attack",
    "AttackCurve",
    "DecisionRates",
    "Detection",
    "Estimate",
    "Measures",
    "Refinement",
    "RiskCoverage",
    "SecurityCurve",
    "StratifiedCurve",
    "ThresholdSweep",
    "WithThreshold",
    "accuracy_under_attack",
    "attack_costs",
    "attack_rates",
    "auroc",
    "auroc_difference",
    "build_line_up",
    "decision_rates",
    "default_line_up",
    "detection_scores",
    "evasion_rate",
    "format_table",
    "fpr_at_tpr",
    "load_results",
    "measure",
    "measure_detection",
    "median_evasion_norm",
    "median_of",
    "plot_curves",
    "plot_examples",
    "plot_risk_coverage",
    "plot_roc",
    "plot_stratified",
    "plot_threshold_sweep",
    "predict_labels",
    "rejection_rate",
    "rejection_scores",
    "risk_coverage",
    "robust_error",
    "robust_errors",
    "roc_curve",
    "save_csv",
    "save_html",
    "save_images",
    "save_results",
    "security_evaluation",
    "security_evaluations",
    "share",
    "stratified_curve",
    "threshold_at_tpr",
    "threshold_sweep",
    "thresholds_at_rates",
    "wilson_interval",
]
