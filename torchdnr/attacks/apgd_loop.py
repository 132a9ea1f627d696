"""The loops of Auto-PGD: for the l2 and l-infinity norms, and for the l1 norm."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.fixed_eps import Run
from torchdnr.attacks.points import Points, Region, evaluated, keep_better
from torchdnr.attacks.projections import project
from torchdnr.attacks.steps import steepest
from torchdnr.attacks.target import slope_at

_MOMENTUM = 0.75  # share of the new step; the rest is the last move
_WINDOWS = (0.22, 0.03, 0.06)  # first window, decrease of each, and the least, as shares of steps
_PROGRESS = 0.75  # share of the steps of a window that have to improve
# l1: window, share of coordinates at first, divisor of share and step, least share of the step,
# and the radii with the share of steps spent at each.
_L1_WINDOW, _L1_FIRST, _L1_SHRINK, _L1_LEAST = 0.04, 0.2, 1.5, 0.1
_L1_RADII = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


class _State(NamedTuple):
    """Where each row is, where it was, and the lowest point with its direction."""

    points: Tensor
    before: Tensor
    direction: Tensor
    values: Tensor
    lowest: Points
    lowest_direction: Tensor
    best: Points


def descend_adaptively(run: Run, steps: int) -> Points:
    """Descend with momentum and halve the step of a row at a checkpoint where it stalled.

    Args:
        run: What is attacked, and from where.
        steps: Number of steps.

    Returns:
        Best points evaluated, in the order of ``better``.
    """
    eps = torch.where(
        run.region.eps.isfinite(), run.region.eps, run.region.bounds[1] - run.region.bounds[0]
    )
    state, size = _begin(run, run.first), 2 * eps
    improved = torch.zeros_like(size)  # steps of this window that went down
    reduced = torch.ones_like(size, dtype=torch.bool)  # whether the last checkpoint halved
    level = state.lowest.values
    checks = set(_checkpoints(steps))
    window_begin = 0
    for step in range(steps):
        state, went_down = _advance(run, run.region, state, size, first=step == 0)
        improved = improved + went_down
        if step + 1 in checks:
            length, window_begin = step + 1 - window_begin, step + 1
            stuck = ~reduced & (state.lowest.values >= level)
            reduced = (improved <= _PROGRESS * length) | stuck
            size = torch.where(reduced, size / 2, size)
            state = _back_to_lowest(state, reduced)
            level, improved = state.lowest.values, torch.zeros_like(improved)
        run.bar.update()
    return state.best


def descend_adaptively_l1(run: Run, steps: int) -> Points:
    """Descend in the l1 norm: few coordinates a step, and fewer as the lowest point gets sparse.

    Args:
        run: What is attacked, and from where.
        steps: Number of steps, spread over the radii 3 eps, 2 eps and eps.

    Returns:
        Best points evaluated within eps, in the order of ``better``.
    """
    first = run.first
    best = first
    left = steps
    for factor, share in _L1_RADII:
        region = run.region._replace(eps=run.region.eps * factor)
        count = left if factor == 1 else min(left, int(steps * share))
        left -= count
        if count == 0:
            continue
        found = project(first.inputs, *region)
        lowest, reached = _sparse_descent(
            run, region, evaluated(run.target, found, run.labels), count
        )
        if factor == 1:
            best = keep_better(best, reached)
        first = lowest
    return best


def _sparse_descent(run: Run, region: Region, first: Points, steps: int) -> tuple[Points, Points]:
    eps = torch.where(region.eps.isfinite(), region.eps, region.center[0].numel())
    state, size = _begin(run, first), eps
    d = region.center[0].numel()
    share = torch.full_like(eps, _L1_FIRST)
    nonzero = torch.full_like(eps, d)
    window = max(1, int(_L1_WINDOW * steps))
    for step in range(steps):
        state, _ = _advance(run, region, state, size, first=step == 0, share=share)
        if (step + 1) % window == 0:
            now = (state.lowest.inputs != region.center).flatten(1).sum(dim=1).to(eps)
            sparser = now < 0.95 * nonzero
            share = (now / d / _L1_SHRINK).clamp_min(1 / d)
            smaller = (size / _L1_SHRINK).maximum(_L1_LEAST * eps)
            size = torch.where(sparser, eps, smaller)
            state = _back_to_lowest(state, sparser)
            nonzero = now
        run.bar.update()
    return state.lowest, state.best


def _checkpoints(steps: int) -> Iterator[int]:
    """Yield the steps after which stalled rows are looked for; they come closer and closer."""
    window, decrease, least = (max(1, int(share * steps)) for share in _WINDOWS)
    step = window
    while step < steps:
        yield step
        window = max(window - decrease, least)
        step += window


def _begin(run: Run, first: Points) -> _State:
    slope = slope_at(run.target, first.inputs, run.labels)
    return _State(
        first.inputs, first.inputs, slope.direction, slope.values, first, slope.direction, first
    )


def _advance(
    run: Run,
    region: Region,
    state: _State,
    size: Tensor,
    *,
    first: bool,
    share: Tensor | float = 1.0,
) -> tuple[_State, Tensor]:
    """Move every row; return the new state, and 1 where the objective fell, ``(n,)``."""
    points, shape = state.points, (-1, *[1] * (state.points.ndim - 1))
    direction = steepest(state.direction, points, region.norm, region.bounds, share)
    ahead = project(points + size.view(shape) * direction, *region)
    if not first and region.norm != 1:
        mixed = points + _MOMENTUM * (ahead - points) + (1 - _MOMENTUM) * (points - state.before)
        ahead = project(mixed, *region)
    slope = slope_at(run.target, ahead, run.labels)
    new = Points(ahead, slope.values, slope.evading)
    lower = slope.values < state.lowest.values
    lowest = Points(
        torch.where(lower.view(shape), ahead, state.lowest.inputs),
        torch.where(lower, slope.values, state.lowest.values),
        torch.where(lower, slope.evading, state.lowest.evading),
    )
    lowest_direction = torch.where(lower.view(shape), slope.direction, state.lowest_direction)
    went_down = (slope.values < state.values).to(size.dtype)
    best = keep_better(state.best, new)
    values = slope.values
    return _State(ahead, points, slope.direction, values, lowest, lowest_direction, best), went_down


def _back_to_lowest(state: _State, rows: Tensor) -> _State:
    """Put some rows, bool ``(n,)``, back to their lowest points."""
    wide = rows.view(-1, *[1] * (state.points.ndim - 1))
    points = torch.where(wide, state.lowest.inputs, state.points)
    return state._replace(
        points=points,
        before=torch.where(wide, points, state.before),
        direction=torch.where(wide, state.lowest_direction, state.direction),
        values=torch.where(rows, state.lowest.values, state.values),
    )
