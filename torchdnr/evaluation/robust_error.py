"""Error among the accepted inputs, clean or under attack, at any threshold."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchdnr.evaluation.decisions import check_labels, decide, stacked
from torchdnr.evaluation.detection import CLEAN_TPR
from torchdnr.evaluation.intervals import Estimate, share
from torchdnr.evaluation.roc import needed_rank


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
        return torch.nextafter(lowest, lowest.new_tensor(-math.inf)).item()
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
        calibration: Output and labels of further clean inputs, on which the thresholds are found.
        tpr: Shares of them to accept.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        ``Estimate`` by share.

    Raises:
        ValueError: If an argument is not as described.
    """
    thresholds = {value: threshold_at_tpr(*calibration, reject, value) for value in tpr}
    return {
        value: robust_error(
            clean, adversarial, labels, reject, threshold=threshold, confidence=confidence
        )
        for value, threshold in thresholds.items()
    }
