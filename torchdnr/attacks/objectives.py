"""What an attack minimises, and when it has succeeded.

An attacked model returns scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold theta in
the last column. An input is accepted iff its best score is above theta, so a tie rejects. Evasion
means accepted and wrong: a rejected input is no success for the attacker.

Every objective maps ``(scores (n, c), threshold (n,) or None, classes (n,), targeted)`` to
``(n,)``. ``None`` stands for a model that never rejects. ``classes`` are the true ones, to be left;
or, targeted, the wanted ones. "paper", "decision" and "secml" need no scale; the others are smooth.
"""

from typing import Protocol

import torch
from torch import Tensor

from torchdnr.decisions import accepted, opposing_scores

TEMPERATURE = 0.1
"""Of the log-sum-exp objective, as a share of the spread of the scores."""


class ObjectiveFunction(Protocol):
    """What an attack minimises, from scores to one number per row."""

    def __call__(
        self, scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
    ) -> Tensor:
        """Compute the objective, ``(n,)``."""


def paper_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute Eq. (2), ``s_y - max_{j != y} s_j``, in which theta takes no part.

    Negative iff another class scores higher, rejected or not; targeted: ``max_{j != t} s_j - s_t``.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples", Eq. (2).
    """
    against, toward = opposing_scores(scores, classes, targeted)
    return against - toward


def decision_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute ``max(s_y, theta) - max_{j != y} s_j``: negative iff accepted and wrong.

    Without a threshold it equals Eq. (2). Targeted it is negative iff accepted as the target.
    """
    against, toward = opposing_scores(scores, classes, targeted)
    return (against if threshold is None else torch.maximum(against, threshold)) - toward


def secml_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute ``theta - max_{j != y} s_j`` where the input is rejected, Eq. (2) elsewhere.

    It jumps where the decision changes between reject and accept. Without a threshold it equals
    Eq. (2).

    Source: the objective that the authors' library ``secml`` minimises.
    """
    against, toward = opposing_scores(scores, classes, targeted)
    if threshold is None:
        return against - toward
    best = torch.maximum(against, toward)
    answered = accepted(best, threshold) | best.isnan()  # a NaN must show
    return torch.where(answered, against, threshold) - toward


def cross_entropy_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute the log-probability of staying right or rejected under a softmax.

    That of ``max(s_y, theta)`` among it and the scores of the other classes; targeted: minus the
    log-probability of the target among all scores and theta. It saturates where the margin is far
    above 1 and hardly moves where all scores are close: it is here to be compared with.
    """
    if targeted:
        logits = scores if threshold is None else torch.cat([scores, threshold[:, None]], dim=1)
        return -logits.log_softmax(dim=1).gather(1, classes[:, None])[:, 0]
    true = scores.gather(1, classes[:, None])[:, 0]
    stay = true if threshold is None else torch.maximum(true, threshold)
    logits = scores.scatter(1, classes[:, None], stay[:, None])
    return logits.log_softmax(dim=1).gather(1, classes[:, None])[:, 0]


def log_sum_exp_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute the "decision" objective with each maximum replaced by a log-sum-exp.

    The temperature is ``TEMPERATURE`` times the spread of the scores at that point, held fixed for
    the gradient: several classes pull at once, and the scale of the scores does not matter.
    """
    columns = scores if threshold is None else torch.cat([scores, threshold[:, None]], dim=1)
    values = columns.detach()
    spread = values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    tau = (TEMPERATURE * spread).clamp_min(torch.finfo(scores.dtype).tiny ** 0.5)
    chosen = torch.zeros_like(columns, dtype=torch.bool).scatter(1, classes[:, None], True)
    toward = chosen if targeted else ~chosen
    if threshold is not None:  # theta is never what an attacker wants
        last = torch.arange(columns.shape[1], device=columns.device) == scores.shape[1]
        toward = toward & ~last

    def smooth_max(which: Tensor) -> Tensor:
        return torch.where(which, columns / tau, -torch.inf).logsumexp(dim=1) * tau[:, 0]

    return smooth_max(~toward) - smooth_max(toward)


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "paper": paper_objective,
    "decision": decision_objective,
    "secml": secml_objective,
    "cross-entropy": cross_entropy_objective,
    "log-sum-exp": log_sum_exp_objective,
}
"""Objectives by name."""

NEGATIVE_IF_SUCCESSFUL = frozenset([decision_objective])
"""Objectives whose sign tells success, to the last bit: the classes need not be compared again."""


def find_objective(name: str) -> ObjectiveFunction:
    """Look up an objective by name; ValueError if there is none of that name."""
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; choose from: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
