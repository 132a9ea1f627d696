"""Rejection: the threshold, what its error is bound to be, and detectors that reject."""

from torchdnr.rejection.consistency import consistent_prediction_rejection
from torchdnr.rejection.detector import WithReject
from torchdnr.rejection.logits import LogitRejection
from torchdnr.rejection.threshold import CalibrationWarning, Threshold, rejection_threshold

__all__ = [
    "CalibrationWarning",
    "LogitRejection",
    "Threshold",
    "WithReject",
    "consistent_prediction_rejection",
    "rejection_threshold",
]
