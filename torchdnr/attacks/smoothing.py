"""PGD on smoothed views of a model first, then on the model: for gradients that vanish.

The gradient of an RBF score underflows far from the support vectors where gamma is large. With a
smaller gamma it does not, and mostly points to the same classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.objectives import paper_objective
from torchdnr.attacks.pgd import descend_steadily
from torchdnr.attacks.points import Points, evaluated, keep_better
from torchdnr.decisions import evaluation_mode

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
    norm: float = 2,
    objective: str = "decision",
    targets: Tensor | None = None,
    steps: int = 50,
    step_size: float | None = None,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    random_start: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Descend on ever less smoothed views of the model, each from the points of the one before.

    What a view leads to is judged on the model itself; the best point of all is returned. The
    threshold does not fit smoothed scores, so a view is descended on the class margin of Eq. (2),
    the model on the objective. Each factor costs ``steps`` forwards and backwards.

    The smoothest view has to reach from one class to another: its gamma times the squared distance
    between their features should be a few at the most.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        factors: Of gamma, > 0, from the smoothest view on; 1 stands for the model itself.
        smoothed: Maps a factor to a view of the model, with the same output; ``None``: the method
            ``model.smoothed``. Pass it where ``model`` is a wrapper that has no such method.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``, for the model itself.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        steps: Number of steps on each view.
        step_size: Length of a step in ``norm``; ``None``: 2.5 eps / steps, per input.
        start: Where to start, ``(n, ...)``; projected, and used where it is better than the input.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of those that did not evade.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Further runs, from random points of the ball, of those that did not evade.
        random_start: Whether the first run starts at a random point too.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: never worse than the input and the start.

    Raises:
        ValueError: If the model has no smoothed view, an argument is out of range, or shapes,
            dtypes or devices disagree.

    Source: graduated optimisation: Blake and Zisserman, "Visual reconstruction", MIT Press 1987.
    """
    check_count("steps", steps, 1)
    check_step_size(step_size)
    check_count("factors", len(factors), 1)
    if not all(0 < factor < torch.inf for factor in factors):
        raise ValueError(f"factors must be > 0 and finite, got {tuple(factors)}")
    views = _views(model, factors, smoothed)
    common = FixedEps(
        model=model,
        inputs=inputs,
        labels=labels,
        eps=eps,
        norm=norm,
        objective=objective,
        targets=targets,
        start=start,
        init_inputs=init_inputs,
        init_labels=init_labels,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )

    def loop(run: Run) -> Points:
        return _descend_on(views, run, steps, step_size)

    return common.run(
        loop, steps=steps * len(views), name="smoothed PGD", random_start=random_start
    )


def _views(
    model: View, factors: Sequence[float], smoothed: Callable[[float], View] | None
) -> list[View]:
    """Return the view for each factor.

    Raises:
        ValueError: If there is none.
    """
    smoothed = getattr(model, "smoothed", None) if smoothed is None else smoothed
    if smoothed is None and any(factor != 1 for factor in factors):
        raise ValueError(
            f"model must have a method smoothed(factor), got {type(model).__name__} without one; "
            "pass smoothed=, a function from a factor to a smoother view of the model; for a "
            "wrapped DNR or NR that is the method of the one inside"
        )
    return [model if factor == 1 else smoothed(factor) for factor in factors]


def _descend_on(views: Sequence[View], run: Run, steps: int, step_size: float | None) -> Points:
    """Descend on each view from the points of the last one; return the best on the model."""
    best = points = run.first
    for view in views:
        with evaluation_mode(view):
            target = run.target
            if view is not target.model:
                target = target._replace(model=view, objective=paper_objective)
            first = evaluated(target, points.inputs, run.labels)
            stage = Run(
                target,
                run.region,
                run.labels,
                first,
                run.reference,
                run.generator,
                run.bar,
            )
            points = descend_steadily(stage, steps, step_size)
        best = keep_better(best, evaluated(run.target, points.inputs, run.labels))
    return best
