"""Rejection as a detector of adversarial inputs: how well it does at every threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdnr.decisions import evaluation_mode, split_scores
from torchdnr.evaluation.curve import SecurityCurve, median_evasion_norm
from torchdnr.evaluation.judging import check_labels, decide, outputs, stacked
from torchdnr.evaluation.metrics import Estimate, Plain, share
from torchdnr.evaluation.roc import ROC, auroc, fpr_at_tpr, needed_rank, roc_curve
from torchdnr.resources import default_batch_size

CLEAN_TPR = 0.99, 0.98, 0.95
ADVERSARIALS = "successful", "all"
CLEANS = "correct", "all"


@dataclass(frozen=True, eq=False)
class Detection(Plain):
    """How well one classifier rejects adversarial inputs and accepts clean ones.

    Attributes:
        adversarials: Which adversarial inputs are counted: "successful" or "all".
        cleans: Which clean inputs are counted: "correct" or "all".
        auroc: Area under the ROC curve.
        fpr_at_tpr: Share of clean inputs rejected where 95 % of the adversarial ones are.
        accepted_at_tpr: Share of adversarial inputs accepted where a given share (the key) of the
            clean ones is; here, as in CCAT, accepted clean inputs are the true positives.
        detected: Share of adversarial inputs rejected at the classifier's theta; None if it has
            none.
        false_rejection: Share of clean inputs rejected at that theta; None if it has none.
        roc: ROC curve of the rejection score; adversarial inputs are positive.
    """

    adversarials: str
    cleans: str
    auroc: Estimate
    fpr_at_tpr: Estimate
    accepted_at_tpr: dict[float, Estimate]
    detected: Estimate | None
    false_rejection: Estimate | None
    roc: ROC


def rejection_scores(output: Tensor, reject: bool) -> Tensor:
    """Compute the rejection score ``theta - max_k s_k``: an input is rejected iff it is >= 0.

    Higher means more outlying, the convention of pytorch-ood.

    Args:
        output: Scores ``(..., n, c)``, or with ``reject`` ``(..., n, c + 1)`` with theta last.
        reject: Whether the last column is theta; without it the score is ``-max_k s_k``.

    Returns:
        Scores, ``(..., n)``.
    """
    confidence, theta = decide(output, reject).confidence, split_scores(output, reject)[1]
    return -confidence if theta is None else theta - confidence


def detection_scores(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    reject: bool,
    *,
    adversarials: str = "successful",
    cleans: str = "correct",
) -> tuple[Tensor, Tensor]:
    """Collect the rejection scores of the clean and of the adversarial inputs that are counted.

    By default, as in CCAT, an adversarial input counts if its best score is that of a wrong class,
    accepted or not, while the class of the clean input was right; and a clean input if its class is
    right. Of k attacks the counted point that is rejected least stands for its sample.

    Args:
        clean: Output for the clean inputs, ``(n, c)``, or with ``reject`` ``(n, c + 1)``.
        adversarial: Output for the perturbed ones, like ``clean`` or ``(k, ...)`` of k attacks.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta.
        adversarials: "successful" as described, or "all".
        cleans: "correct" as described, or "all".

    Returns:
        Scores of the clean ``(m,)`` and of the adversarial inputs ``(p,)``; higher means rejected.

    Raises:
        ValueError: If an argument is not as described, or one of the groups is empty.

    Source: Stutz et al., "Confidence-calibrated adversarial training", ICML 2020.
    """
    if adversarials not in ADVERSARIALS or cleans not in CLEANS:
        raise ValueError(
            f"adversarials must be one of {ADVERSARIALS} and cleans one of {CLEANS}, "
            f"got {adversarials!r} and {cleans!r}"
        )
    check_labels(labels, clean)
    attacks = stacked(adversarial, clean)
    right = decide(clean, reject).classes == labels
    negatives, positives = rejection_scores(clean, reject), rejection_scores(attacks, reject)
    if adversarials == "successful":
        counted = right & (decide(attacks, reject).classes != labels)
        positives = torch.where(counted, positives, torch.inf).amin(dim=0)
        positives = positives[counted.any(dim=0)]
    else:
        positives = positives.amin(dim=0)
    if cleans == "correct":
        negatives = negatives[right]
    if len(negatives) == 0 or len(positives) == 0:
        raise ValueError(
            f"{len(negatives)} clean and {len(positives)} adversarial inputs are counted: expected "
            'at least one of each; attack with a larger eps, or pass "all"'
        )
    return negatives, positives


def measure_detection(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    reject: bool,
    *,
    adversarials: str = "successful",
    cleans: str = "correct",
    tpr: float = 0.95,
    clean_tpr: Sequence[float] = CLEAN_TPR,
    confidence: float = 0.95,
) -> Detection:
    """Measure how well the rejection score separates adversarial from clean inputs.

    Args:
        clean: Output for the clean inputs, ``(n, c)``, or with ``reject`` ``(n, c + 1)``.
        adversarial: Output for the perturbed ones, like ``clean`` or ``(k, ...)`` of k attacks.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta.
        adversarials: Which adversarial inputs count, see ``detection_scores``.
        cleans: Which clean inputs count.
        tpr: Share of adversarial inputs to be rejected for ``fpr_at_tpr``.
        clean_tpr: Shares of clean inputs to be accepted for ``accepted_at_tpr``.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        ``Detection``.

    Raises:
        ValueError: If an argument is not as described, or one of the groups is empty.
    """
    negatives, positives = detection_scores(
        clean, adversarial, labels, reject, adversarials=adversarials, cleans=cleans
    )
    return Detection(
        adversarials=adversarials,
        cleans=cleans,
        auroc=auroc(negatives, positives, confidence=confidence),
        fpr_at_tpr=fpr_at_tpr(negatives, positives, tpr, confidence=confidence),
        accepted_at_tpr={
            value: fpr_at_tpr(-positives, -negatives, value, confidence=confidence)
            for value in clean_tpr
        },
        detected=share(positives >= 0, confidence=confidence) if reject else None,
        false_rejection=share(negatives >= 0, confidence=confidence) if reject else None,
        roc=roc_curve(negatives, positives),
    )


def robust_error(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    reject: bool,
    *,
    threshold: float | Tensor | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Compute the confidence-thresholded robust error RTE(theta), of CCAT.

    Of the samples that are accepted, clean or under at least one attack, the share that is accepted
    and wrong there. With the clean output as the adversarial one too it is the error among the
    accepted clean inputs.

    Args:
        clean: Output for the clean inputs, ``(n, c)``, or with ``reject`` ``(n, c + 1)``.
        adversarial: Output for the perturbed ones, like ``clean`` or ``(k, ...)`` of k attacks; the
            worst counts, per sample.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta.
        threshold: theta; None: that of the output, and if it has none everything is accepted.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate``; ``n`` is the number of samples accepted. If there are none it is NaN.

    Raises:
        ValueError: If an argument is not as described.

    Source: Stutz et al., "Confidence-calibrated adversarial training", ICML 2020, Sec. 4.
    """
    check_labels(labels, clean)
    points = torch.cat([clean[None], stacked(adversarial, clean)])
    decisions = decide(points, reject, threshold)
    wrong = decisions.accepted & (decisions.classes != labels)
    return share(wrong.any(dim=0), decisions.accepted.any(dim=0), confidence=confidence)


def threshold_at_tpr(output: Tensor, labels: Tensor, reject: bool, tpr: float) -> float:
    """Find the highest threshold that accepts at least a share of the inputs that are right.

    It lies halfway between the lowest best score accepted and the next below it, or just below the
    former where there is none.

    Args:
        output: Output for clean inputs that nothing else is measured on, ``(n, c)``, or with
            ``reject`` ``(n, c + 1)``.
        labels: Their true labels, ``(n,)``.
        reject: Whether the last column is theta; it is not used.
        tpr: Share to accept, in (0, 1].

    Returns:
        theta.

    Raises:
        ValueError: If an argument is not as described, or no input is right.

    Source: Stutz et al., "Confidence-calibrated adversarial training", ICML 2020.
    """
    check_labels(labels, output)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    decisions = decide(output, reject)
    best = decisions.confidence[decisions.classes == labels].sort(descending=True).values
    if len(best) == 0:
        raise ValueError("no clean input is given its true class: no threshold accepts any")
    lowest = best[needed_rank(len(best), tpr) - 1]
    below = best[best < lowest]
    if len(below) == 0:
        return torch.nextafter(lowest, torch.full_like(lowest, -math.inf)).item()
    middle = below[0] + (lowest - below[0]) / 2
    return torch.where(middle < lowest, middle, below[0]).item()


def robust_errors(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    reject: bool,
    *,
    calibration: tuple[Tensor, Tensor],
    tpr: Sequence[float] = CLEAN_TPR,
    confidence: float = 0.95,
) -> dict[float, Estimate]:
    """Compute the robust error at the thresholds that accept given shares of right clean inputs.

    Args:
        clean: Output for the clean inputs, ``(n, c)``, or with ``reject`` ``(n, c + 1)``.
        adversarial: Output for the perturbed ones, like ``clean`` or ``(k, ...)`` of k attacks.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta; it is replaced.
        calibration: Output and labels of further clean inputs that set the thresholds.
        tpr: Shares of them to accept.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        ``Estimate`` by share.

    Raises:
        ValueError: If an argument is not as described.
    """
    arguments = clean, adversarial, labels, reject
    return {
        value: robust_error(
            *arguments,
            threshold=threshold_at_tpr(*calibration, reject, value),
            confidence=confidence,
        )
        for value in tpr
    }


@dataclass(frozen=True, eq=False)
class Measures(Plain):
    """Measures of one classifier in the worst case over its attacks, with 95 % intervals.

    Attributes:
        median_evasion_norm: Norm at which half of the samples are evaded.
        detection: Per positive eps how well rejection separates adversarial from clean inputs; None
            where no clean input that is right becomes one that is wrong.
        robust_error: Per positive eps, by the threshold at which it is read ("own", or the share
            of right calibration inputs that it accepts), the error among the accepted.
        error_if_accepted: Per eps the share of the accepted that is wrong.
    """

    median_evasion_norm: Estimate
    detection: dict[float, Detection | None]
    robust_error: dict[float, dict[str, Estimate]]
    error_if_accepted: dict[float, Estimate]


def measure(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    curve: SecurityCurve,
    *,
    calibration: tuple[Tensor, Tensor] | None = None,
    batch_size: int | None = None,
) -> Measures:
    """Measure detection and error at every eps of an evaluation.

    Args:
        model: The classifier that ``curve`` is of.
        inputs: The clean inputs that were attacked, ``(n, ...)``.
        curve: Its security evaluation, with ``adversarial``.
        calibration: Further clean inputs and labels, on which thresholds are set that accept given
            shares of them; None: only the threshold of the classifier counts.
        batch_size: Inputs per batch; None: as many as suits their size.

    Returns:
        ``Measures``.

    Raises:
        ValueError: If the curve has been loaded from a file, without its adversarial points.
    """
    if curve.adversarial is None:
        raise ValueError("curve must hold its adversarial points, got one without: evaluate again")
    labels = curve.labels.to(inputs.device)
    batch_size = default_batch_size(inputs) if batch_size is None else batch_size
    detection: dict[float, Detection | None] = {}
    errors: dict[float, dict[str, Estimate]] = {}
    with evaluation_mode(model):
        clean = outputs(model, inputs, batch_size)
        right = decide(clean, curve.rejects).classes == labels
        calibrated = calibration and (outputs(model, calibration[0], batch_size), calibration[1])
        for eps, points in zip(curve.eps, curve.adversarial, strict=True):
            if eps == 0:
                continue
            output = outputs(model, points.to(inputs), batch_size)
            arguments = clean, output, labels, curve.rejects
            counted = right & (decide(output, curve.rejects).classes != labels)
            detection[eps] = measure_detection(*arguments) if counted.any() else None
            errors[eps] = {"own": robust_error(*arguments)}
            if calibrated is not None:
                by_tpr = robust_errors(*arguments, calibration=calibrated)
                errors[eps] |= {f"{tpr:.0%}": rate for tpr, rate in by_tpr.items()}
    among_accepted = [rates.error_if_accepted for rates in curve.estimates()]
    return Measures(
        median_evasion_norm(curve),
        detection,
        errors,
        dict(zip(curve.eps, among_accepted, strict=True)),
    )
