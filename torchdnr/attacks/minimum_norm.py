"""The loop of the boundary walk: shrink the radius while evading, descend the margin, grow it back.

Source of the two-speed scheme: Pintor et al., "Fast minimum-norm adversarial attacks through
adaptive norm constraints", NeurIPS 2021.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.projections import project
from torchdnr.attacks.starts import bisect, keep_nearest
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


def walk(
    target: Target,
    center: Tensor,
    labels: Tensor,
    owner: Tensor,
    start: Tensor,
    *,
    steps: int,
    starts: int,
    norm: float,
    bounds: tuple[float, float],
    bar: tqdm,
) -> tuple[Tensor, Tensor]:
    """Walk from evading points to nearer ones.

    Args:
        target: Model with an objective that is negative iff a point evades.
        center: Attacked inputs, ``(n, ...)``.
        labels: Their true classes, ``(n,)``.
        owner: Input that each start belongs to, ``(r,)``.
        start: Evading points, ``(r, ...)``.
        steps: Steps of a walk, each one forward and backward.
        starts: Largest number of starts of one input.
        norm: Norm of the perturbation.
        bounds: Smallest and largest value of an input.
        bar: Progress, one per step.

    Returns:
        Inputs that have a start, and the nearest evading point found for each of them.
    """
    length = (start - center[owner]).flatten(1).norm(dim=1)
    state = Walkers(owner, start, length, torch.zeros_like(length), start, length)
    for step in range(steps):
        if step in _HALVE_AT:
            starts = (starts + 1) // 2
            state = state.rows(keep_nearest(state.owner, state.best_norm, starts))
        size, shrinkage, first, last = _schedule(step)
        if first:
            state = state._replace(point=state.best, radius=state.best_norm)
        near, near_labels = center[state.owner], labels[state.owner]
        state = _step(target, near, near_labels, state, size, shrinkage, norm, bounds)
        if last:
            state = _approach(target, near, near_labels, state)
        bar.update()
    nearest = state.rows(keep_nearest(state.owner, state.best_norm, 1))
    return nearest.owner, nearest.best


def _schedule(step: int) -> tuple[float, float, bool, bool]:
    """Return step size, shrinkage, and whether the step begins and ends a cycle."""
    begin, length = 0, _FIRST_CYCLE
    while step >= begin + length:
        begin, length = begin + length, 2 * length
    fade = (1 + math.cos(math.pi * (step - begin) / (length - 1))) / 2
    size, shrinkage = (low + (high - low) * fade for high, low in (_STEP_SIZE, _SHRINKAGE))
    return size, shrinkage, step == begin, step == begin + length - 1


def _step(
    target: Target,
    center: Tensor,
    labels: Tensor,
    state: Walkers,
    size: float,
    shrinkage: float,
    norm: float,
    bounds: tuple[float, float],
) -> Walkers:
    """Evaluate every point, note it if it is the nearest that evades, and move on."""
    owner, point, radius, streak, best, best_norm = state
    shape = (-1, *[1] * (point.ndim - 1))
    slope = slope_at(target, point, labels)
    direction, evading = slope.direction, slope.values < 0
    length = (point - center).flatten(1).norm(dim=1)
    nearer = evading & (length < best_norm)
    best = torch.where(nearer.view(shape), point, best)
    best_norm = torch.where(nearer, length, best_norm)
    # The rate doubles while the answer stays the same: far starts come near in a few steps.
    sign = torch.where(evading, 1.0, -1.0).to(length.dtype)
    streak = torch.where(streak * sign > 0, streak + sign, sign)
    rate = (shrinkage * torch.exp2(streak.abs() - 1)).clamp_max(_MAX_RATE)
    radius = torch.where(evading, best_norm * (1 - rate), radius * (1 + rate)).minimum(best_norm)
    point = point + (size * best_norm).view(shape) * direction
    point = project(point, center, radius, norm, bounds)
    return Walkers(owner, point, radius, streak, best, best_norm)


def _approach(target: Target, center: Tensor, labels: Tensor, state: Walkers) -> Walkers:
    """Move the best points straight towards the inputs while they evade."""
    best = bisect(
        lambda points: evaluate(target, points, labels)[0] < 0, center, state.best, _HALVINGS
    )
    return state._replace(best=best, best_norm=(best - center).flatten(1).norm(dim=1))
