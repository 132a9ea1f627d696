"""How well a classifier's rejection does its work: all measures of one security evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchdnr.decisions import evaluation_mode
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.detection import (
    Detection,
    decide,
    measure_detection,
    robust_error,
    robust_errors,
)
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.metrics import Estimate, decision_rates, median_of


def median_evasion_norm(curve: SecurityCurve, *, confidence: float = 0.95) -> Estimate:
    """Measure the median norm at which samples are evaded, with its interval.

    Args:
        curve: Security evaluation; a sample that was never evaded counts as infinite.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate``; its value is ``curve.median_evasion_norm``, and infinite ends are possible.
    """
    if len(curve.evasion_norm) == 0:
        return Estimate(math.nan, 0.0, math.inf, 0)
    return median_of(curve.evasion_norm, confidence=confidence)


@dataclass(frozen=True, eq=False)
class Measures:
    """Measures of one classifier in the worst case over its attacks, with 95 % intervals.

    Attributes:
        median_evasion_norm: Norm at which half of the samples are evaded.
        detection: Per positive eps how well rejection tells adversarial from clean inputs; None
            where no adversarial input was given a wrong class, or no clean one its own.
        robust_error: Per positive eps, by the threshold at which it is read ("own", or the share
            of right calibration inputs that it accepts), the error among the accepted.
        error_if_accepted: Per eps the share of the accepted that is wrong.
    """

    median_evasion_norm: Estimate
    detection: dict[float, Detection | None]
    robust_error: dict[float, dict[str, Estimate]]
    error_if_accepted: dict[float, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries."""
        return {
            "median_evasion_norm": self.median_evasion_norm.to_dict(),
            "detection": {
                f"{eps:g}": found and found.to_dict() for eps, found in self.detection.items()
            },
            "robust_error": {
                f"{eps:g}": {key: rate.to_dict() for key, rate in rates.items()}
                for eps, rates in self.robust_error.items()
            },
            "error_if_accepted": {
                f"{eps:g}": rate.to_dict() for eps, rate in self.error_if_accepted.items()
            },
        }


def measure(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    curve: SecurityCurve,
    *,
    calibration: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 256,
) -> Measures:
    """Measure detection and error at every eps of an evaluation.

    Args:
        model: The classifier that ``curve`` is of.
        inputs: The clean inputs that were attacked, ``(n, ...)``.
        curve: Its security evaluation, with ``adversarial``.
        calibration: Further clean inputs and labels, on which thresholds are set that accept given
            shares of them; None: only the classifier's own threshold counts.
        batch_size: Inputs per batch.

    Returns:
        ``Measures``.

    Raises:
        ValueError: If the curve has been loaded from a file, without its adversarial points.
    """
    if curve.adversarial is None:
        raise ValueError("curve must hold its adversarial points, got one without: evaluate again")
    labels = curve.labels.to(inputs.device)
    detection: dict[float, Detection | None] = {}
    errors: dict[float, dict[str, Estimate]] = {}
    with evaluation_mode(model):
        clean = outputs(model, inputs, batch_size)
        right = decide(clean, curve.rejects).classes == labels
        known = None
        if calibration is not None:
            known = outputs(model, calibration[0], batch_size), calibration[1]
        for eps, points in zip(curve.eps, curve.adversarial, strict=True):
            if eps == 0:
                continue
            found = outputs(model, points.to(inputs), batch_size)
            arguments = clean, found, labels, curve.rejects
            counted = right & (decide(found, curve.rejects).classes != labels)
            detection[eps] = measure_detection(*arguments) if counted.any() else None
            errors[eps] = {"own": robust_error(*arguments)}
            if known is not None:
                several = robust_errors(*arguments, calibration=known)
                errors[eps] |= {f"{tpr:.0%}": rate for tpr, rate in several.items()}
    return Measures(
        median_evasion_norm(curve),
        detection,
        errors,
        {
            eps: decision_rates(row, curve.labels, eps).error_if_accepted
            for eps, row in zip(curve.eps, curve.predictions, strict=True)
        },
    )


def most_telling_eps(curve: SecurityCurve) -> float | None:
    """Return the positive eps at which accuracy is nearest to one half; None if there is none."""
    positive = [(abs(rate - 0.5), eps) for rate, eps in zip(curve.accuracy, curve.eps, strict=True)]
    positive = [entry for entry in positive if entry[1] > 0]
    return min(positive, default=(math.nan, None))[1]
