"""The loop of the line-search attack: descend, try many step sizes at once, keep the best."""

import torch
from torch import Tensor

from torchdnr.attacks.fixed_eps import Run
from torchdnr.attacks.points import Points, Region, best_column, better, evaluated, put
from torchdnr.attacks.projections import project
from torchdnr.attacks.steps import steepest
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
