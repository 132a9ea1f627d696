"""Projected gradient descent at a given eps, with a constant step."""

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import steepest, step_sizes
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import per_row, project
from torchdnr.attacks.target import Points, evaluate, keep_better, put, slope_at, unsolved

CHECK_EVERY = 5
"""Steps between which ``until_evasion`` keeps the rows that evade: dropping them waits."""


def pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objective: str = "decision",
    steps: int = 50,
    step_size: float | None = None,
    random_start: bool = False,
    until_evasion: bool = False,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Take steps of steepest descent within ``eps`` of each input; keep the best point.

    Steps have unit length in the norm of the attack times the step size, whatever the length of the
    gradient. A step costs one forward and one backward; nothing in it waits for the device.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objective: Name in ``OBJECTIVES``.
        steps: Number of steps of each run.
        step_size: Length of a step in ``norm``; None: 2.5 eps / steps, per input.
        random_start: Whether the first run starts at a random point too.
        until_evasion: Whether a row is done once it evades: the same rows evade, at less cost and
            with less confidence. It leaves the batch within ``CHECK_EVERY`` steps.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated. One that evades (accepted and
        wrong, or accepted as the target) beats any other, then the lower objective counts.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR
    2018.
    """
    options = resolve(pgd, shared)
    check_steps(steps, step_size)
    descend = partial(
        descend_steadily, steps=steps, step_size=step_size, until_evasion=until_evasion
    )
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        return best_within(attacked, descend, steps=steps, name="PGD", random_start=random_start)


def descend_steadily(
    run: Run, *, steps: int, step_size: float | None, until_evasion: bool = False
) -> Points:
    """Take steps of constant length and return the best point evaluated, row by row."""
    target, region, labels = run.target, run.region, run.labels
    best, points = run.first, run.first.inputs
    sizes = per_row(step_sizes(step_size, steps, region), points)
    done = best.clone()
    rows = torch.arange(len(labels), device=labels.device)
    for step in range(steps):
        slope = slope_at(target, points, labels, region.bounds)
        best = keep_better(best, slope.points)
        direction = steepest(slope.direction, points, region.norm, region.bounds)
        points = project(torch.addcmul(points, sizes, direction), *region)
        run.bar.update()
        if until_evasion and step % CHECK_EVERY == CHECK_EVERY - 1:
            put(done, rows, best, best.evading)
            left = unsolved(best)  # waits for the device
            if len(left) == 0:
                return done
            rows, labels, points, sizes = rows[left], labels[left], points[left], sizes[left]
            best, region = best.rows(left), region.rows(left)
    best = keep_better(best, evaluate(target, points, labels))
    if not until_evasion:
        return best
    put(done, rows, best, torch.ones_like(best.evading))
    return done
