"""The loop of the boundary walk: shrink the radius while evading, descend the margin, grow it back.

Source of the two-speed scheme: Pintor et al., "Fast minimum-norm adversarial attacks through
adaptive norm constraints", NeurIPS 2021.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.minimum_norm import Nearest, NearRun, lengths
from torchdnr.attacks.projections import project
from torchdnr.attacks.starts import bisect, keep_nearest
from torchdnr.attacks.steps import unit_step
from torchdnr.attacks.target import Target, evaluate, slope_at

# The schedule is a function of the step alone, never of their number: more steps only add to it.
_FIRST_CYCLE = 100  # steps of the first cosine cycle; each later one is twice as long
_STEP_SIZE = (0.4, 0.004)  # first and last step of a cycle, relative to the best norm so far
_SHRINKAGE = (0.05, 0.001)  # the same for the relative change of the radius
_MAX_RATE = 0.3  # largest relative change of the radius in one step
_HALVE_AT = (15, 30, 45)  # steps after which the farther half of each input's starts is dropped
_HALVINGS = 10  # bisections towards the input at the end of a cycle


class Walkers(NamedTuple):
    """Walks under way, one per row; an input may own several."""

    owner: Tensor
    point: Tensor
    radius: Tensor
    streak: Tensor  # evading steps in a row; not evading counts below zero
    best: Tensor
    best_norm: Tensor

    def rows(self, rows: Tensor) -> "Walkers":
        """Return some rows."""
        return Walkers(*(field[rows] for field in self))


def walk(run: NearRun, steps: int) -> Nearest:
    """Walk from evading points to nearer ones.

    Args:
        run: What is attacked, and where the walks start: at points that evade.
        steps: Steps of a walk, each one forward and backward.

    Returns:
        The nearest evading point of each input that has a start.
    """
    length = lengths(run.first, run.center[run.owner], run.norm)
    nothing = torch.zeros_like(length)
    state = Walkers(run.owner, run.first, length, nothing, run.first, length)
    starts = run.starts
    for step in range(steps if len(run.owner) else 0):
        if step in _HALVE_AT:
            starts = (starts + 1) // 2
            state = state.rows(keep_nearest(state.owner, state.best_norm, starts))
        size, shrinkage, first, last = _schedule(step)
        if first:
            state = state._replace(point=state.best, radius=state.best_norm)
        state = _step(run, state, size, shrinkage)
        if last:
            near = run.center[state.owner]
            state = _approach(run.target, near, run.labels[state.owner], state, run.norm)
        run.bar.update()
    nearest = state.rows(keep_nearest(state.owner, state.best_norm, 1))
    return Nearest(nearest.owner, nearest.best, nearest.best_norm)


def _schedule(step: int) -> tuple[float, float, bool, bool]:
    """Return step size, shrinkage, and whether the step begins and ends a cycle."""
    begin, length = 0, _FIRST_CYCLE
    while step >= begin + length:
        begin, length = begin + length, 2 * length
    fade = (1 + math.cos(math.pi * (step - begin) / (length - 1))) / 2
    size, shrinkage = (low + (high - low) * fade for high, low in (_STEP_SIZE, _SHRINKAGE))
    return size, shrinkage, step == begin, step == begin + length - 1


def _step(run: NearRun, state: Walkers, size: float, shrinkage: float) -> Walkers:
    """Evaluate every point, note it if it is the nearest that evades, and move on."""
    owner, point, radius, streak, best, best_norm = state
    center, shape = run.center[owner], (-1, *[1] * (point.ndim - 1))
    slope = slope_at(run.target, point, run.labels[owner])
    evading = slope.values < 0
    length = lengths(point, center, run.norm)
    nearer = evading & (length < best_norm)
    best = torch.where(nearer.view(shape), point, best)
    best_norm = torch.where(nearer, length, best_norm)
    # The rate doubles while the answer stays the same: far starts come near in a few steps.
    sign = torch.where(evading, 1.0, -1.0).to(length.dtype)
    streak = torch.where(streak * sign > 0, streak + sign, sign)
    rate = (shrinkage * torch.exp2(streak.abs() - 1)).clamp_max(_MAX_RATE)
    radius = torch.where(evading, best_norm * (1 - rate), radius * (1 + rate)).minimum(best_norm)
    point = point + (size * best_norm).view(shape) * unit_step(slope.direction, run.norm)
    point = project(point, center, radius, run.norm, run.bounds)
    return Walkers(owner, point, radius, streak, best, best_norm)


def _approach(
    target: Target, center: Tensor, labels: Tensor, state: Walkers, norm: float
) -> Walkers:
    """Move the best points straight towards the inputs while they evade."""
    best = bisect(
        lambda points: evaluate(target, points, labels)[0] < 0, center, state.best, _HALVINGS
    )
    return state._replace(best=best, best_norm=lengths(best, center, norm))
