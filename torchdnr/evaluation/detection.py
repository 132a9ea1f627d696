"""How well rejection tells adversarial from clean inputs, at every threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.objectives import decision_objective
from torchdnr.decisions import REJECT, accepted, is_evasion
from torchdnr.evaluation.metrics import Estimate, share
from torchdnr.evaluation.roc import ROC, auroc, fpr_at_tpr, needed_rank, roc_curve


class Decisions(NamedTuple):
    """What the classifier says of each point; the last dimension runs over the samples.

    Attributes:
        confidence: Best score, ``(..., n)``.
        classes: Class of the best score, whether accepted or not, int64 ``(..., n)``.
        accepted: Whether the best score is above theta, bool ``(..., n)``.
    """

    confidence: Tensor
    classes: Tensor
    accepted: Tensor


def decide(output: Tensor, reject: bool, threshold: float | Tensor | None = None) -> Decisions:
    """Read the decisions from an output, at its own threshold or at another.

    Args:
        output: Scores ``(..., n, c)``, or with ``reject`` ``(..., n, c + 1)`` with theta last.
        reject: Whether the last column is theta.
        threshold: theta instead of that of the output; None: that of the output, and if it has
            none everything is accepted.

    Returns:
        ``Decisions``.

    Raises:
        ValueError: If there are fewer than two classes, or a score is NaN.
    """
    scores = output[..., :-1] if reject else output
    if output.ndim < 2 or scores.shape[-1] < 2:
        columns = "(..., n, c + 1) with theta last" if reject else "(..., n, c)"
        raise ValueError(f"output must be {columns} and c >= 2, got {tuple(output.shape)}")
    if output.isnan().any():
        raise ValueError("output holds NaN, no decision can be read from it: check the model")
    confidence, classes = scores.max(dim=-1)
    if threshold is None:
        threshold = output[..., -1] if reject else -torch.inf
    return Decisions(confidence, classes, accepted(confidence, threshold))


def worst_predictions(
    output: Tensor, labels: Tensor, reject: bool, threshold: float | Tensor | None = None
) -> Tensor:
    """Predict labels in the worst case, per sample, over several points of each sample.

    A point that evades is the worst, then that of the lowest ``max(s_y, theta) - max_{j != y}
    s_j``; among equals the first.

    Args:
        output: One output per attack, ``(k, n, c)``, or with ``reject`` ``(k, n, c + 1)``.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta.
        threshold: theta instead of that of the output.

    Returns:
        Labels 0..c-1, or ``REJECT``, int64 ``(n,)``.
    """
    decisions = decide(output, reject, threshold)
    scores = output[..., :-1] if reject else output
    if threshold is None and reject:
        theta = output[..., -1].flatten()
    elif threshold is None:
        theta = None
    else:
        theta = torch.as_tensor(threshold).to(scores).expand(decisions.classes.numel())
    margin = decision_objective(scores.flatten(0, 1), theta, labels.repeat(len(output))).view_as(
        decisions.confidence
    )
    predictions = torch.where(decisions.accepted, decisions.classes, REJECT)
    evading = is_evasion(predictions, labels)
    ranked = torch.where(evading == evading.any(dim=0), margin, torch.inf)
    return predictions.gather(0, ranked.argmin(dim=0, keepdim=True))[0]


def stacked(adversarial: Tensor, clean: Tensor) -> Tensor:
    """View outputs of one attack ``(n, ...)`` as those of one among several, ``(k, n, ...)``.

    Raises:
        ValueError: If they are not like the clean ones.
    """
    several = adversarial if adversarial.ndim == clean.ndim + 1 else adversarial[None]
    if several.shape[1:] != clean.shape or len(several) == 0:
        raise ValueError(
            f"adversarial must be like clean, {tuple(clean.shape)}, or several of these in one "
            f"tensor (k, ...), got {tuple(adversarial.shape)}"
        )
    return several


def check_labels(labels: Tensor, output: Tensor) -> None:
    """Refuse labels that are not one class per row of a clean output ``(n, ...)``.

    Raises:
        ValueError: If they are not.
    """
    if labels.shape != output.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        raise ValueError(
            f"labels must be int64 (n,) with n = {len(output)} >= 1 rows of clean, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )


CLEAN_TPR = 0.99, 0.98, 0.95
ADVERSARIALS = "successful", "all"
CLEANS = "correct", "all"


@dataclass(frozen=True, eq=False)
class Detection:
    """How well one classifier rejects adversarial inputs and accepts clean ones.

    Attributes:
        adversarials: Which adversarial inputs are counted: "successful" or "all".
        cleans: Which clean inputs are counted: "correct" or "all".
        roc: Curve of the rejection score; adversarial inputs are positive.
        auroc: Area under it.
        fpr_at_tpr: Share of clean inputs rejected where 95 % of the adversarial ones are.
        accepted_at_tpr: Share of adversarial inputs accepted where a given share (the key) of the
            clean ones is; here, as in CCAT, accepted clean inputs are the true positives.
        detected: Share of adversarial inputs rejected at the classifier's own theta; None if it
            has none.
        false_rejection: Share of clean inputs rejected at that theta; None if it has none.
    """

    adversarials: str
    cleans: str
    roc: ROC
    auroc: Estimate
    fpr_at_tpr: Estimate
    accepted_at_tpr: dict[float, Estimate]
    detected: Estimate | None
    false_rejection: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries."""
        return {
            "adversarials": self.adversarials,
            "cleans": self.cleans,
            "auroc": self.auroc.to_dict(),
            "fpr_at_tpr": self.fpr_at_tpr.to_dict(),
            "accepted_at_tpr": {
                f"{tpr:g}": rate.to_dict() for tpr, rate in self.accepted_at_tpr.items()
            },
            "detected": self.detected and self.detected.to_dict(),
            "false_rejection": self.false_rejection and self.false_rejection.to_dict(),
            "roc": {name: values.tolist() for name, values in self.roc._asdict().items()},
        }


def rejection_scores(output: Tensor, reject: bool) -> Tensor:
    """Compute the rejection score ``theta - max_k s_k``: an input is rejected iff it is >= 0.

    Higher means more outlying, the convention of pytorch-ood.

    Args:
        output: Scores ``(..., n, c)``, or with ``reject`` ``(..., n, c + 1)`` with theta last.
        reject: Whether the last column is theta; without it the score is ``-max_k s_k``.

    Returns:
        Scores, ``(..., n)``.
    """
    confidence = decide(output, reject).confidence
    return output[..., -1] - confidence if reject else -confidence


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
    right. Of several attacks the counted point that is rejected least stands for its sample.

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
    several = stacked(adversarial, clean)
    right = decide(clean, reject).classes == labels
    negatives, positives = rejection_scores(clean, reject), rejection_scores(several, reject)
    if adversarials == "successful":
        counted = right & (decide(several, reject).classes != labels)
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
    """Measure how well the rejection score tells adversarial from clean inputs.

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
    options = {"adversarials": adversarials, "cleans": cleans}
    negatives, positives = detection_scores(clean, adversarial, labels, reject, **options)
    at_theta = [
        share(scores >= 0, confidence=confidence) if reject else None
        for scores in (positives, negatives)
    ]
    return Detection(
        **options,
        roc=roc_curve(negatives, positives),
        auroc=auroc(negatives, positives, confidence=confidence),
        fpr_at_tpr=fpr_at_tpr(negatives, positives, tpr, confidence=confidence),
        accepted_at_tpr={
            value: fpr_at_tpr(-positives, -negatives, value, confidence=confidence)
            for value in clean_tpr
        },
        detected=at_theta[0],
        false_rejection=at_theta[1],
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
