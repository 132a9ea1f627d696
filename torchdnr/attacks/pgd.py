"""Projected gradient descent at a given eps, with a constant step."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.points import Points, evaluated, keep_better, put
from torchdnr.attacks.projections import project, steepest
from torchdnr.attacks.target import slope_at

LOOK_EVERY = 5
"""Steps between two looks at which rows evade: each waits for the device."""


def pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
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
    until_evasion: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Take steps of steepest descent within ``eps`` of each input; keep the best point.

    Steps have unit length in the norm of the attack times the step size, whatever the length of the
    gradient. A step costs one forward and one backward; nothing in it waits for the device.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``; several sizes can share a batch.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        steps: Number of steps of each run.
        step_size: Length of a step in ``norm``; ``None``: 2.5 eps / steps, per input.
        start: Where to start, ``(n, ...)``, for instance the result at a smaller eps; projected,
            and used where it is better than the input itself.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of those that did not evade.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Further runs, from random points of the ball, of those that did not evade.
        random_start: Whether the first run starts at a random point too.
        until_evasion: Whether a row is done once it evades: the same rows evade, at less cost and
            with less confidence. It is looked for every ``LOOK_EVERY`` steps.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated. One that evades (accepted and
        wrong, or accepted as the target) beats any other, then the lower objective counts.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR
    2018.
    """
    check_count("steps", steps, 1)
    check_step_size(step_size)
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
        return descend_steadily(run, steps, step_size, until_evasion)

    return common.run(loop, steps=steps, name="PGD", random_start=random_start)


def descend_steadily(
    run: Run, steps: int, step_size: float | None, until_evasion: bool = False
) -> Points:
    """Take steps of constant length and return the best point evaluated, row by row.

    Args:
        run: What is attacked, and from where.
        steps: Number of steps.
        step_size: Length of a step; None: 2.5 eps / steps, or that of the box's width for an
            infinite eps.
        until_evasion: Whether rows that evade leave the batch.

    Returns:
        Best points, in the order of ``better``.
    """
    target, region, labels = run.target, run.region, run.labels
    best, points = run.first, run.first.inputs
    if step_size is None:
        width = run.region.bounds[1] - run.region.bounds[0]
        sizes = 2.5 / steps * torch.where(region.eps.isfinite(), region.eps, width)
    else:
        sizes = torch.full_like(region.eps, step_size)
    sizes = sizes.view(-1, *[1] * (points.ndim - 1))
    done = Points(*(field.clone() for field in best)) if until_evasion else None
    rows = torch.arange(len(labels), device=labels.device)
    for step in range(steps):
        slope = slope_at(target, points, labels)
        best = keep_better(best, Points(points, slope.values, slope.evading))
        direction = steepest(slope.direction, points, region.norm, region.bounds)
        points = project(torch.addcmul(points, sizes, direction), *region)
        run.bar.update()
        if until_evasion and step % LOOK_EVERY == LOOK_EVERY - 1:
            put(done, rows, best, best.evading)
            left = (~best.evading).nonzero()[:, 0]  # waits for the device
            if len(left) == 0:
                return done
            rows, labels, points, sizes = rows[left], labels[left], points[left], sizes[left]
            best, region = best.rows(left), region.rows(left)
    best = keep_better(best, evaluated(target, points, labels))
    if done is None:
        return best
    put(done, rows, best, torch.ones_like(best.evading))
    return done
