"""Rejection: the threshold, what its error is bound to be, and detectors that reject."""

from torchdnr.rejection.detector import WithReject
from torchdnr.rejection.threshold import CalibrationWarning, Threshold, rejection_threshold

__all__ = ["CalibrationWarning", "Threshold", "WithReject", "rejection_threshold"]
