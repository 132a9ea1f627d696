"""What an attack minimises, and when it has succeeded.

An attacked model returns scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold theta in
the last column. An input is accepted iff its best score is above theta, so a tie rejects. Evasion
means accepted and wrong: a rejected input is no success for the attacker.

Every objective maps ``(scores (n, c), threshold (n,) or None, labels (n,))`` to ``(n,)``, and
``None`` stands for a model that never rejects.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ObjectiveFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def split_scores(output: Tensor, reject: bool) -> tuple[Tensor, Tensor | None]:
    """Split a model output into class scores and rejection threshold.

    Args:
        output: ``(n, c)``, or ``(n, c + 1)`` with theta in the last column.
        reject: Whether the last column is theta.

    Returns:
        Scores ``(n, c)`` and the threshold of every row ``(n,)``, ``None`` without a reject column.
    """
    return (output[:, :-1], output[:, -1]) if reject else (output, None)


def paper_objective(scores: Tensor, threshold: Tensor | None, labels: Tensor) -> Tensor:
    """Compute Eq. (2), ``s_y - max_{j != y} s_j``, in which theta takes no part.

    Negative iff another class scores higher, rejected or not.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples", Eq. (2).
    """
    true, other = true_and_best_other(scores, labels)
    return true - other


def decision_objective(scores: Tensor, threshold: Tensor | None, labels: Tensor) -> Tensor:
    """Compute ``max(s_y, theta) - max_{j != y} s_j``: negative iff accepted and wrong.

    Without a threshold it equals Eq. (2).
    """
    true, other = true_and_best_other(scores, labels)
    return (true if threshold is None else torch.maximum(true, threshold)) - other


def secml_objective(scores: Tensor, threshold: Tensor | None, labels: Tensor) -> Tensor:
    """Compute ``theta - max_{j != y} s_j`` where the input is rejected, Eq. (2) elsewhere.

    It jumps where the decision changes between reject and accept. Without a threshold it equals
    Eq. (2).

    Source: the objective that the authors' library ``secml`` minimises.
    """
    true, other = true_and_best_other(scores, labels)
    if threshold is None:
        return true - other
    rejected = torch.maximum(true, other) <= threshold
    return torch.where(rejected, threshold, true) - other


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "paper": paper_objective,
    "decision": decision_objective,
    "secml": secml_objective,
}
"""Objectives by name."""


def find_objective(name: str) -> ObjectiveFunction:
    """Look up an objective by name.

    Raises:
        ValueError: If there is no objective of that name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; choose from: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def evades(output: Tensor, labels: Tensor, reject: bool) -> Tensor:
    """Tell which inputs are accepted and assigned to a wrong class.

    Equal scores of the true and another class count as right, a tie with theta as rejected, a NaN
    as no evasion.

    Args:
        output: Model output, ``(n, c)``, or ``(n, c + 1)`` with theta in the last column.
        labels: True classes, ``(n,)``.
        reject: Whether the last column is theta.

    Returns:
        Evasions, bool ``(n,)``.
    """
    scores, threshold = split_scores(output, reject)
    true, other = true_and_best_other(scores, labels)
    wrong = other > true
    return wrong if threshold is None else wrong & (other > threshold)


def true_and_best_other(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of the true class and the best score of another class, each ``(n,)``."""
    labels = labels[:, None]
    true = scores.gather(1, labels)[:, 0]
    return true, scores.scatter(1, labels, -torch.inf).max(dim=1).values
