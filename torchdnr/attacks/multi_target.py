"""One targeted attack for each of the other classes, the most promising first."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_like
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.points import (
    Points,
    better,
    call_attack,
    keep_better,
    make_judge,
    put,
    unsolved,
)
from torchdnr.attacks.target import Target
from torchdnr.decisions import evaluation_mode, split_scores


def multi_target(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    attack: Callable[..., Tensor] = pgd,
    classes: int | None = None,
    norm: float = 2,
    start: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    **options: object,
) -> Tensor:
    """Attack towards every other class in turn, and keep the best point.

    An untargeted attack follows the class that is ahead where it stands, and may end in a corner
    where that class is never accepted. Here each sample is pulled towards the other classes one by
    one, in the order of their scores at the input, until it evades.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        attack: ``attack(model, inputs, labels, eps, targets=..., norm=..., ...) -> points``.
        classes: Classes tried per sample, at most c - 1; ``None``: all of them.
        norm: Norm of the perturbation; 1, 2 or infinity.
        start: Where each attack starts, ``(n, ...)``.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        **options: Further options of the attack: ``objective``, ``steps``, ``init_inputs``,
            ``restarts``, ``seed``, ...

    Returns:
        Adversarial inputs, like ``inputs``: by the untargeted decision objective never worse than
        the input and the start.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", 2019.
    """
    if "targets" in options:
        raise ValueError("targets are chosen by multi_target; call the attack itself for one class")
    shared = {"norm": norm, "bounds": bounds, "batch_size": batch_size}
    if classes is not None:
        check_count("classes", classes, 1)
    with evaluation_mode(model), torch.no_grad():
        judge = make_judge(model, inputs, labels, eps, targets=None, reject=reject, **shared)
        best = judge.points(inputs)
        if start is not None:
            check_like("start", start, inputs, same_length=True)
            best = keep_better(best, judge.points(start))
        best = Points(*(field.clone() for field in best))
        order = _other_classes(judge.target, inputs, labels)
        for wanted in order[:, :classes].unbind(dim=1):
            if len(rows := unsolved(best)) == 0:  # waits for the device, once per class
                break
            points = call_attack(
                attack,
                model,
                inputs[rows],
                labels[rows],
                judge.region.eps[rows],
                targets=wanted[rows],
                start=None if start is None else start[rows],
                reject=judge.target.reject,
                **shared,
                **options,
            )
            found = judge.points(points, rows)
            put(best, rows, found, better(found, best.rows(rows)))
    return best.inputs


def _other_classes(target: Target, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the classes other than the label, by falling score, ``(n, c - 1)``."""
    chunks = inputs.split(target.batch_size)
    scores = torch.cat([split_scores(target.model(chunk), target.reject)[0] for chunk in chunks])
    least = torch.finfo(scores.dtype).min  # NaN would come first; the true class comes last
    scores = scores.nan_to_num(nan=least, neginf=least)
    return scores.scatter(1, labels[:, None], -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )[:, :-1]
