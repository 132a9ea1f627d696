"""What a classifier decides, from stored outputs and at any threshold, over several attacks."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.objectives import decision_objective
from torchdnr.evaluation.metrics import evaded
from torchdnr.rejection import REJECT


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
    return Decisions(confidence, classes, confidence > threshold)


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
    evading = evaded(predictions, labels)
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
