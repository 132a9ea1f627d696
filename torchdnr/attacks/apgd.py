"""Auto-PGD at a given eps: momentum, and steps that shrink when progress stalls."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import steepest
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, project
from torchdnr.attacks.target import Points, Slope, choose, evaluate, keep_better, slope_at

_MOMENTUM = 0.75  # share of the new step; the rest is the last move
_WINDOWS = (0.22, 0.03, 0.06)  # first window, decrease of each, and the least, as shares of steps
_IMPROVING = 0.75  # share of the steps of a window that have to improve
# l1: window, share of coordinates at first, divisor of share and step, least share of the step,
# and the radii with the share of steps spent at each.
_L1_WINDOW, _L1_FIRST, _L1_SHRINK, _L1_LEAST = 0.04, 0.2, 1.5, 0.1
_L1_RADII = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


def apgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objective: str = "decision",
    steps: int = 100,
    random_start: bool = False,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Minimise the objective within ``eps`` of each input by Auto-PGD; keep the best point.

    A step goes 2 eps far, is projected, and mixed with the last move. At checkpoints that come
    closer and closer a row that stalls halves its step and goes back to its lowest point. In the l1
    norm a step moves a share of the coordinates that shrinks as well, and the radius falls from
    3 eps over 2 eps to eps. A step costs one forward and one backward; nothing in it waits for the
    device.

    The objective replaces the difference-of-logits ratio of the source: rejection is no success,
    and the length of the gradient does not matter here.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objective: Name in ``OBJECTIVES``.
        steps: Number of steps of each run.
        random_start: Whether the first run starts at a random point too.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated. One that evades (accepted and
        wrong, or accepted as the target) beats any other, then the lower objective counts.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020; l1: "Mind the box", ICML 2021.
    """
    options = resolve(apgd, shared)
    check_steps(steps)
    descend = partial(_descend_l1 if options.norm == 1 else _descend, steps=steps)
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        return best_within(attacked, descend, steps=steps, name="APGD", random_start=random_start)


class _State(NamedTuple):
    """Where each row is, where it was, its lowest point, and its best."""

    now: Slope
    before: Tensor
    lowest: Slope
    best: Points


def _descend(run: Run, *, steps: int) -> Points:
    """Descend with momentum, and halve the step of a row at a checkpoint where it stalled."""
    region = run.region
    state, size = _begin(run, run.first), 2 * region.eps
    improved = torch.zeros_like(size)  # steps of this window that went down
    reduced = torch.ones_like(size, dtype=torch.bool)  # whether the last checkpoint halved
    level = state.lowest.values
    checks = set(_checkpoints(steps))
    window_begin = 0
    for step in range(steps):
        state, went_down = _advance(run, region, state, size, first=step == 0)
        improved = improved + went_down
        if step + 1 in checks:
            length, window_begin = step + 1 - window_begin, step + 1
            stuck = ~reduced & (state.lowest.values >= level)
            reduced = (improved <= _IMPROVING * length) | stuck
            size = torch.where(reduced, size / 2, size)
            state = _back_to_lowest(state, reduced)
            level, improved = state.lowest.values, torch.zeros_like(improved)
        run.bar.update()
    return state.best


def _descend_l1(run: Run, *, steps: int) -> Points:
    """Descend in the l1 norm, within 3 eps, then 2 eps, then eps; only points in eps count."""
    first = best = run.first
    left = steps
    for factor, share in _L1_RADII:
        region = run.region._replace(eps=run.region.eps * factor).within_reach()
        count = left if factor == 1 else min(left, int(steps * share))
        left -= count
        if count == 0:
            continue
        first = evaluate(run.target, project(first.inputs, *region), run.labels)
        first, reached = _sparse_descent(run, region, first, count)
        if factor == 1:
            best = keep_better(best, reached)
    return best


def _sparse_descent(run: Run, region: Region, first: Points, steps: int) -> tuple[Points, Points]:
    """Move few coordinates a step, fewer as points get sparse; return the lowest and the best."""
    eps = region.eps
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
    return state.lowest.points, state.best


def _checkpoints(steps: int) -> Iterator[int]:
    """Yield the steps after which rows are checked for stalling; they come closer and closer."""
    window, decrease, least = (max(1, int(share * steps)) for share in _WINDOWS)
    step = window
    while step < steps:
        yield step
        window = max(window - decrease, least)
        step += window


def _begin(run: Run, first: Points) -> _State:
    slope = slope_at(run.target, first.inputs, run.labels, run.region.bounds)
    lowest = slope._replace(values=first.values, evading=first.evading)
    return _State(slope, first.inputs, lowest, first)


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
    points = state.now.inputs
    direction = steepest(state.now.direction, points, region.norm, region.bounds, share)
    ahead = project(points + per_row(size, points) * direction, *region)
    if not first and region.norm != 1:
        mixed = points + _MOMENTUM * (ahead - points) + (1 - _MOMENTUM) * (points - state.before)
        ahead = project(mixed, *region)
    now = slope_at(run.target, ahead, run.labels, region.bounds)
    lowest = choose(now.values < state.lowest.values, now, state.lowest)
    moved = _State(now, points, lowest, keep_better(state.best, now.points))
    return moved, (now.values < state.now.values).to(size.dtype)


def _back_to_lowest(state: _State, rows: Tensor) -> _State:
    """Put some rows, bool ``(n,)``, back to their lowest points."""
    now = choose(rows, state.lowest, state.now)
    before = torch.where(per_row(rows, now.inputs), now.inputs, state.before)
    return _State(now, before, state.lowest, state.best)
