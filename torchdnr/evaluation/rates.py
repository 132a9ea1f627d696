"""Rates of a set of decisions, each with its confidence interval, and tables of them per attack."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from torchdnr.evaluation.curve import Predictions, SecurityCurve
from torchdnr.evaluation.intervals import Estimate, median_of, share
from torchdnr.evaluation.metrics import evaded
from torchdnr.rejection import REJECT


class DecisionRates(NamedTuple):
    """Rates of the decisions on the same samples.

    Attributes:
        accuracy: Accuracy under attack, in which a reject counts as correct iff eps > 0.
        rejection: Share rejected.
        evasion: Share accepted and wrong.
        error_if_accepted: Share of the accepted that is wrong.
        rejection_if_not_right: Share of those not given their true class that is rejected.
    """

    accuracy: Estimate
    rejection: Estimate
    evasion: Estimate
    error_if_accepted: Estimate
    rejection_if_not_right: Estimate


def decision_rates(
    predictions: Tensor, labels: Tensor, eps: float, *, confidence: float = 0.95
) -> DecisionRates:
    """Measure every rate of decisions on inputs perturbed within ``eps``.

    Args:
        predictions: Labels or ``REJECT``, ``(n,)``.
        labels: True labels, ``(n,)``.
        eps: Perturbation size, >= 0.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        ``DecisionRates``.

    Raises:
        ValueError: If the shapes differ, there is no sample, or ``eps`` is negative.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation", for the first two.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            "predictions and labels must both be (n,), "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    right, rejected = predictions == labels, predictions == REJECT
    wrong = evaded(predictions, labels)
    options = {"confidence": confidence}
    return DecisionRates(
        accuracy=share(right | rejected if eps > 0 else right, **options),
        rejection=share(rejected, **options),
        evasion=share(wrong, **options),
        error_if_accepted=share(wrong, ~rejected, **options),
        rejection_if_not_right=share(rejected, ~right, **options),
    )


def attack_rates(
    curves: Mapping[str, SecurityCurve], *, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Tabulate every rate, per classifier, attack and eps.

    Args:
        curves: Classifier name to its curve.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Rows with the classifier, the attack (None: the worst case over all), eps, and a dictionary
        with value, low, high and n for each of ``DecisionRates``.
    """
    rows = []
    for name, curve in curves.items():
        several: dict[str | None, Predictions] = {**curve.attacks, None: curve}
        for attack, alone in several.items():
            for eps, predictions in zip(alone.eps, alone.predictions, strict=True):
                rates = decision_rates(predictions, alone.labels, eps, confidence=confidence)
                row = {key: rate.to_dict() for key, rate in rates._asdict().items()}
                rows.append({"classifier": name, "attack": attack, "eps": eps, **row})
    return rows


def attack_costs(curves: Mapping[str, SecurityCurve]) -> list[dict[str, Any]]:
    """Tabulate what each attack cost over all eps, and what it reached alone.

    Args:
        curves: Classifier name to its curve.

    Returns:
        Rows with the classifier, the attack, its number of samples and of positive eps, seconds,
        forwards and backwards in total and per sample, points that left their constraints, and
        ``evasion``: the share accepted and wrong at the largest eps, with its interval.
    """
    rows = []
    for name, curve in curves.items():
        for attack, alone in curve.attacks.items():
            samples = len(alone.labels)
            spent = {key: sum(getattr(alone, key)) for key in ("seconds", "forwards", "backwards")}
            largest = decision_rates(alone.predictions[-1], alone.labels, alone.eps[-1])
            rows.append(
                {
                    "classifier": name,
                    "attack": attack,
                    "samples": samples,
                    "positive_eps": sum(eps > 0 for eps in alone.eps),
                    **spent,
                    **{f"{key}_per_sample": value / samples for key, value in spent.items()},
                    "violations": sum(alone.violations),
                    "largest_eps": alone.eps[-1],
                    "evasion": largest.evasion.to_dict(),
                }
            )
    return rows


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
