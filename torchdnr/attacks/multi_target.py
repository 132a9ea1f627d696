"""One run of an attack towards each other class; per sample the best point of all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.ensemble import improve
from torchdnr.attacks.options import only_shared
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.problem import problem
from torchdnr.attacks.target import Target
from torchdnr.decisions import split_scores


def multi_target(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    attack: Callable[..., Tensor] = pgd,
    classes: int | None = None,
    **options: Any,  # noqa: ANN401 - documented below
) -> Tensor:
    """Attack towards every other class in turn, and keep the best point.

    An untargeted attack follows the class that is ahead where it stands, and may end in a corner
    where that class is never accepted. Here each sample is pulled towards the other classes one by
    one, in the order of their scores at the input, until it evades.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        attack: ``attack(model, inputs, labels, eps, targets=..., norm=..., ...) -> points``.
        classes: Classes tried per sample, at most c - 1; None: all of them.
        **options: Options of the attack, except ``targets``: the shared ones, see
            ``FixedEpsOptions``, and its own.

    Returns:
        Adversarial inputs, like ``inputs``: by the untargeted decision objective never worse than
        the input and the start.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", 2019.
    """
    if "targets" in options:
        raise ValueError("targets are chosen by multi_target; call the attack itself for one class")
    if classes is not None:
        check_count("classes", classes, 1)
    with problem(model, inputs, labels, eps, only_shared(options)) as attacked:
        best, labels = attacked.best_given(), attacked.labels
        order = _other_classes(attacked.target, attacked.region.center, labels)
        for wanted in order[:, :classes].unbind(dim=1):
            improve(attacked, best, attack, labels, options, targets=wanted)
    return best.inputs


def _other_classes(target: Target, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the classes other than the label, by falling score, ``(n, c - 1)``."""
    chunks = inputs.split(target.batch_size)
    scores = torch.cat([split_scores(target.output(chunk), target.reject)[0] for chunk in chunks])
    least = torch.finfo(scores.dtype).min  # NaN would come first; the true class comes last
    scores = scores.nan_to_num(nan=least, neginf=least).scatter(1, labels[:, None], -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :-1]
