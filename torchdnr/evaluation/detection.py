"""How well rejection tells adversarial from clean inputs, at every threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdnr.evaluation.decisions import check_labels, decide, stacked
from torchdnr.evaluation.intervals import Estimate, share
from torchdnr.evaluation.roc import ROC, auroc, fpr_at_tpr, roc_curve

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
