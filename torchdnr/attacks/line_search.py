"""Maximum-confidence evasion at a given eps: Algorithm 1 with a line search on every step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.points import Points, best_column, better, evaluated, put
from torchdnr.attacks.projections import Region, project, steepest
from torchdnr.attacks.target import Target, slope_at

_PATIENCE = 3  # consecutive small changes that end a descent


def descend(run: Run, sizes: tuple[Tensor, Tensor], *, steps: int, tol: float) -> Points:
    """Descend from the first points and return the best point evaluated, row by row.

    Args:
        run: What is attacked, and from where.
        sizes: Step sizes tried at once, and those tried where none of them improves.
        steps: Largest number of steps.
        tol: Change that counts as small, relative to the descent below the reference.

    Returns:
        Best points, in the order of ``better``.
    """
    target, labels = run.target, run.labels
    path, best = (Points(*(field.clone() for field in run.first)) for _ in range(2))
    small = torch.zeros_like(labels)  # small changes in a row
    running = torch.arange(len(labels), device=labels.device)
    for _ in range(steps):
        if len(running) == 0:
            break
        here, row_labels, region = path.rows(running), labels[running], run.region.rows(running)
        direction = slope_at(target, here.inputs, row_labels).direction
        direction = steepest(direction, here.inputs, region.norm, region.bounds)
        lowest, found = _line_search(target, region, row_labels, here, direction, sizes)
        put(best, running, found, better(found, best.rows(running)))
        moved = lowest.values < here.values
        put(path, running, lowest, moved)
        # Relative to its own descent: a combiner may live within 0.1 of its intercept.
        scale = (run.reference[running] - lowest.values).abs()
        slow = here.values - lowest.values <= tol * scale
        small[running] = torch.where(slow, small[running] + 1, 0)
        # A row that did not move would repeat this step. Selecting the others waits for the
        # device, once per step, and saves a dozen forwards of every row that has stopped.
        running = running[moved & (small[running] < _PATIENCE)]
        run.bar.update()
    return best


def _line_search(
    target: Target,
    region: Region,
    labels: Tensor,
    here: Points,
    direction: Tensor,
    sizes: tuple[Tensor, Tensor],
) -> tuple[Points, Points]:
    """Try all steps; return the point of lowest objective and the best in the order of ``better``.

    Both are ``here`` or an evaluated trial.
    """
    lowest, found = _try_steps(target, region, labels, here.inputs, direction, sizes[0])
    stuck = (~(lowest.values < here.values)).nonzero()[:, 0]  # waits for the device, once per step
    if len(stuck) and len(sizes[1]):
        shorter, shorter_found = _try_steps(
            target,
            region.rows(stuck),
            labels[stuck],
            here.inputs[stuck],
            direction[stuck],
            sizes[1],
        )
        put(lowest, stuck, shorter, shorter.values < lowest.values[stuck])
        put(found, stuck, shorter_found, better(shorter_found, found.rows(stuck)))
    return lowest, found


def _try_steps(
    target: Target, region: Region, labels: Tensor, inputs: Tensor, direction: Tensor, sizes: Tensor
) -> tuple[Points, Points]:
    """Evaluate all steps of all rows in batches; return the lowest and the best of each row."""
    at_once = max(1, target.batch_size // len(sizes))
    if len(inputs) <= at_once:
        return _try_batch(target, region, labels, inputs, direction, sizes)
    parts = [
        _try_batch(target, region.rows(part), labels[part], inputs[part], direction[part], sizes)
        for part in torch.arange(len(inputs), device=inputs.device).split(at_once)
    ]
    lowest, found = zip(*parts, strict=True)
    return tuple(Points(*map(torch.cat, zip(*points, strict=True))) for points in (lowest, found))


def _try_batch(
    target: Target, region: Region, labels: Tensor, inputs: Tensor, direction: Tensor, sizes: Tensor
) -> tuple[Points, Points]:
    count = len(sizes)
    rows = torch.arange(len(inputs), device=inputs.device).repeat_interleave(count)
    step = sizes.repeat(len(inputs)).view(-1, *[1] * (inputs.ndim - 1))
    center, eps, norm, bounds = region.rows(rows)
    trials = project(inputs[rows] + step * direction[rows], center, eps, norm, bounds)
    tried = evaluated(target, trials, labels[rows])
    values, evading = tried.values.view(-1, count), tried.evading.view(-1, count)
    offset = torch.arange(len(inputs), device=inputs.device) * count
    return (
        tried.rows(offset + values.argmin(dim=1)),
        tried.rows(offset + best_column(values, evading)),
    )


STEP_SIZES = {1: 1.0, 2: 0.1, math.inf: 0.005}
"""Smallest step tried at first, by norm, for images in [0, 1]."""


def line_search_pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    objective: str = "paper",
    targets: Tensor | None = None,
    steps: int = 20,
    step_size: float | None = None,
    doublings: int = 10,
    halvings: int = 5,
    tol: float = 1e-3,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Minimise the objective within ``eps`` of each input.

    Each step follows the normalised gradient and tries ``step_size * 2^k`` for k = 0..doublings,
    and halved steps where none of them improves; every trial is projected on ball and box and the
    best one is the next point. A sample stops when no trial improves, or when three steps in a row
    change its objective by no more than ``tol`` of all its descent. It then leaves the batch, and,
    without restarts, its result does not depend, but for rounding, on which samples shared it.

    What is returned is the best point evaluated: an evading point (accepted and wrong) beats any
    other, then the lower objective counts. More steps, or a start, never make it worse.

    RBF scores are flat far from the training data, so a descent from the input alone stalls and
    flatters the defence: pass ``init_inputs`` for a second descent from accepted samples of other
    classes, and ``start`` when eps grows.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, floating point.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``: "paper", "decision", "secml", ...
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        steps: Largest number of steps of a descent.
        step_size: Smallest step tried at first, length in ``norm``; ``None``: ``STEP_SIZES``.
        doublings: Times the step is doubled.
        halvings: Times the step is halved where no larger one improves.
        tol: Change of the objective that counts as small, relative to the descent so far.
        start: Where to start, ``(n, ...)``, for instance the result at a smaller eps; projected,
            and used where it is better than the input itself.
        init_inputs: Samples of any class to take a second start from, ``(m, ...)``.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, int64
            ``(m,)``; saves one forward over them. Their true classes serve as well.
        restarts: Further descents, from random points of the ball.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples", Algorithm 1; step
    sizes and second start as in the authors' library ``secml``.
    """
    _check_options(steps, step_size, doublings, halvings, tol)
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
        exponents = torch.arange(-halvings, doublings + 1, device=run.labels.device)
        smallest = STEP_SIZES[norm] if step_size is None else step_size
        sizes = smallest * torch.exp2(exponents.to(run.reference.dtype))
        return descend(run, (sizes[halvings:], sizes[:halvings]), steps=steps, tol=tol)

    return common.run(loop, steps=steps, name="line search", go_on=True)


def _check_options(
    steps: int, step_size: float | None, doublings: int, halvings: int, tol: float
) -> None:
    for name, value in (("steps", steps), ("doublings", doublings), ("halvings", halvings)):
        check_count(name, value, 0)
    check_step_size(step_size)
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
