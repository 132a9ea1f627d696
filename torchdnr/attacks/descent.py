"""The loop of the line-search attack: descend, try many step sizes at once, keep the best."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.projections import project
from torchdnr.attacks.target import Target, descent_direction, evaluate

_PATIENCE = 3  # consecutive small changes that end a descent


class Region(NamedTuple):
    """Where the points of each row may lie: ball and box."""

    center: Tensor
    eps: Tensor
    norm: float
    bounds: tuple[float, float]

    def rows(self, rows: Tensor) -> "Region":
        """Return the regions of some rows."""
        return self._replace(center=self.center[rows], eps=self.eps[rows])


class Points(NamedTuple):
    """Points with their objective and success, one per row."""

    inputs: Tensor
    values: Tensor
    evading: Tensor

    def rows(self, rows: Tensor) -> "Points":
        """Return some rows."""
        return Points(*(field[rows] for field in self))


def better(new: Points, old: Points) -> Tensor:
    """Tell where ``new`` beats ``old``: evading first, then the lower objective, bool ``(n,)``."""
    lower = (new.evading == old.evading) & (new.values < old.values)
    return (new.evading & ~old.evading) | lower


def best_column(values: Tensor, evading: Tensor) -> Tensor:
    """Find the best of k points per row, in the order of ``better``, ``(n,)`` from ``(n, k)``."""
    ranked = torch.where(evading == evading.any(dim=1, keepdim=True), values, torch.inf)
    return ranked.argmin(dim=1)


def put(points: Points, rows: Tensor, new: Points, where: Tensor) -> None:
    """Overwrite ``points[rows]`` by ``new`` where told, in place."""
    rows = rows[where]
    for field, values in zip(points, new, strict=True):
        field[rows] = values[where]


def descend(
    target: Target,
    region: Region,
    labels: Tensor,
    first: Points,
    sizes: tuple[Tensor, Tensor],
    *,
    steps: int,
    tol: float,
    reference: Tensor,
    bar: tqdm,
) -> Points:
    """Descend from the first points and return the best point evaluated, row by row.

    Args:
        target: Model and objective.
        region: Ball and box of each row.
        labels: True classes, ``(n,)``.
        first: Where each row starts.
        sizes: Step sizes tried at once, and those tried where none of them improves.
        steps: Largest number of steps.
        tol: Change that counts as small, relative to the descent below ``reference``.
        reference: Objective at the centre of each region, ``(n,)``.
        bar: Progress, one per step.

    Returns:
        Best points, in the order of ``better``.
    """
    path, best = (Points(*(field.clone() for field in first)) for _ in range(2))
    small = torch.zeros_like(labels)  # small changes in a row
    running = torch.arange(len(labels), device=labels.device)
    for _ in range(steps):
        if len(running) == 0:
            break
        here, row_labels, row_region = path.rows(running), labels[running], region.rows(running)
        direction, _ = descent_direction(target, here.inputs, row_labels)
        lowest, found = _line_search(target, row_region, row_labels, here, direction, sizes)
        put(best, running, found, better(found, best.rows(running)))
        moved = lowest.values < here.values
        put(path, running, lowest, moved)
        # Relative to its own descent: a combiner may live within 0.1 of its intercept.
        scale = (reference[running] - lowest.values).abs()
        slow = here.values - lowest.values <= tol * scale
        small[running] = torch.where(slow, small[running] + 1, 0)
        # A row that did not move would repeat this step. Selecting the others waits for the
        # device, once per step, and saves a dozen forwards of every row that has stopped.
        running = running[moved & (small[running] < _PATIENCE)]
        bar.update()
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
    at_once = rows_at_once(target, len(sizes))
    if len(inputs) <= at_once:
        return _try_batch(target, region, labels, inputs, direction, sizes)
    parts = [
        _try_batch(target, region.rows(part), labels[part], inputs[part], direction[part], sizes)
        for part in torch.arange(len(inputs), device=inputs.device).split(at_once)
    ]
    lowest, found = zip(*parts, strict=True)
    return tuple(Points(*map(torch.cat, zip(*points, strict=True))) for points in (lowest, found))


def rows_at_once(target: Target, count: int) -> int:
    """Return for how many rows ``count`` points each fit into one forward."""
    return max(1, target.batch_size // count)


def _try_batch(
    target: Target, region: Region, labels: Tensor, inputs: Tensor, direction: Tensor, sizes: Tensor
) -> tuple[Points, Points]:
    count = len(sizes)
    rows = torch.arange(len(inputs), device=inputs.device).repeat_interleave(count)
    step = sizes.repeat(len(inputs)).view(-1, *[1] * (inputs.ndim - 1))
    center, eps, norm, bounds = region.rows(rows)
    trials = project(inputs[rows] + step * direction[rows], center, eps, norm, bounds)
    tried = Points(trials, *evaluate(target, trials, labels[rows]))
    values, evading = tried.values.view(-1, count), tried.evading.view(-1, count)
    offset = torch.arange(len(inputs), device=inputs.device) * count
    return (
        tried.rows(offset + values.argmin(dim=1)),
        tried.rows(offset + best_column(values, evading)),
    )
