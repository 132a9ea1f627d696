"""PGD on smoothed views of a model first, then on the model: for gradients that vanish.

The gradient of an RBF score underflows far from the support vectors where gamma is large. With a
smaller gamma it does not, and mostly points to the same classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_steps
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective, paper_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.pgd import descend_steadily
from torchdnr.attacks.problem import problem
from torchdnr.attacks.target import Points, evaluate, keep_better
from torchdnr.decisions import evaluation_mode, method_of

FACTORS = tuple(4.0**-k for k in (6, 5, 4, 3, 2, 1, 0))
"""What gamma is multiplied by, one after the other."""

View = Callable[[Tensor], Tensor]


def smoothed_pgd(
    model: View,
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    factors: Sequence[float] = FACTORS,
    smoothed: Callable[[float], View] | None = None,
    objective: str = "decision",
    steps: int = 50,
    step_size: float | None = None,
    random_start: bool = False,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Descend on ever less smoothed views of the model, each from the points of the one before.

    Points from every view are evaluated on the model itself; the best of all is returned. The
    threshold does not fit smoothed scores, so a view is descended on the class margin of Eq. (2),
    the model on the objective. Each factor costs ``steps`` forwards and backwards.

    The smoothest view has to reach from one class to another: its gamma times the squared distance
    between their features should be a few at the most.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        factors: Of gamma, > 0, from the smoothest view on; 1 stands for the model itself.
        smoothed: Maps a factor to a view of the model, with the same output; None: the method
            ``model.smoothed``. Pass it where ``model`` is a wrapper that has no such method.
        objective: Name in ``OBJECTIVES``, for the model itself.
        steps: Number of steps on each view.
        step_size: Length of a step in ``norm``; None: 2.5 eps / steps, per input.
        random_start: Whether the first run starts at a random point too.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: never worse than the input and the start.

    Raises:
        ValueError: If the model has no smoothed view, an argument is out of range, or shapes,
            dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: graduated optimisation: Blake and Zisserman, "Visual reconstruction", MIT Press 1987.
    """
    options = resolve(smoothed_pgd, shared)
    check_steps(steps, step_size)
    check_count("factors", len(factors), 1)
    if not all(0 < factor < torch.inf for factor in factors):
        raise ValueError(f"factors must be > 0 and finite, got {tuple(factors)}")
    views = _views(model, factors, smoothed)
    descend = partial(_descend_on, views=views, steps=steps, step_size=step_size)
    total = steps * len(views)
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        return best_within(
            attacked, descend, steps=total, name="smoothed PGD", random_start=random_start
        )


def _views(
    model: View, factors: Sequence[float], smoothed: Callable[[float], View] | None
) -> list[View]:
    """Return the view for each factor."""
    if all(factor == 1 for factor in factors):
        return [model] * len(factors)
    smoothed = method_of(model, "smoothed") if smoothed is None else smoothed
    if smoothed is None:
        raise ValueError(
            f"model must have a method smoothed(factor), got {type(model).__name__} without one; "
            "pass smoothed=, a function from a factor to a smoother view of the model; for a "
            "wrapped DNR or NR that is the method of the one inside"
        )
    return [model if factor == 1 else smoothed(factor) for factor in factors]


def _descend_on(run: Run, *, views: Sequence[View], steps: int, step_size: float | None) -> Points:
    """Descend on each view from the points of the last one; return the best on the model."""
    best = points = run.first
    for view in views:
        with evaluation_mode(view):
            target = run.target
            if view is not target.model:
                target = target._replace(model=view, objective=paper_objective)
            first = evaluate(target, points.inputs, run.labels)
            stage = run._replace(target=target, first=first)
            points = descend_steadily(stage, steps=steps, step_size=step_size)
        best = keep_better(best, evaluate(run.target, points.inputs, run.labels))
    return best
