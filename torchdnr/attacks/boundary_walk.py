"""Minimum-norm evasion: a walk along the boundary from accepted samples of other classes."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import cosine, unit_step
from torchdnr.attacks.minimum_norm import (
    Kept,
    Nearest,
    NearRun,
    nearest_evading,
    safe_decision_objective,
)
from torchdnr.attacks.options import EvasionOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import per_row, project
from torchdnr.attacks.starts import bisect, keep_nearest, lengths
from torchdnr.attacks.target import slope_at

# The schedule is a function of the step alone, never of their number: more steps only add to it.
_SEARCH = 60  # steps from every start; then cycles of 20, 40, 80, ... polish the best point
_POLISH = 20
_HALVE_AT = (5, 10, 20, 40)  # steps after which the farther half of an input's starts is dropped
# Relative to the best norm so far, first and last of a cosine: step, and change of the radius.
# The first step, by norm, is that of each restart in turn.
_FIRST_SIZES = {1: (0.5, 1.0, 0.2), 2: (0.5, 1.0, 2.0), math.inf: (1.0, 0.3, 4.0)}
_LAST_SIZE = 0.01
_SHRINKAGE = (0.2, 0.002)
_POLISH_SIZE, _POLISH_SHRINKAGE = (0.1, 0.001), (0.01, 0.0002)
_MAX_RATE = 0.4  # largest relative change of the radius in one step
_HALVINGS = 10  # bisections towards the input at the end of a cycle


def boundary_walk(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor,
    *,
    eps: float | Tensor | None = None,
    steps: int = 80,
    neighbours: int = 40,
    starts: int = 20,
    **shared: Unpack[EvasionOptions],
) -> Tensor:
    """Find the nearest evading (accepted and wrong) point of each input.

    From accepted pool samples of other classes the straight line to the input is bisected, and the
    nearest evading points become starts. The walk then shrinks its radius while it evades and grows
    it while it does not, each step along the normalised gradient of
    ``max(s_y, theta) - max_{j != y} s_j``; only the most promising starts are walked to the end.
    One run gives the whole security curve: an input is evaded at every eps from its norm on.

    Where the walk ends depends on where it starts and on how long its first steps are, more than on
    how many it takes. So many starts are walked for a few steps, and restarts begin with other
    steps too: in l2 half as long as the best norm, then as long, then twice. After 60 steps the
    best point alone is polished, in cycles of 20, 40, 80, ... steps: more are never worse, and 80,
    120, 200, ... make the best use of them, since at the end of a cycle the line to the input is
    bisected once more. Each step is one forward and backward of every start
    still walked; with the defaults an input costs about 320 of them, plus some 260 forwards.

    A point counts as evading only if it does so by more than rounding, so that it still evades when
    it is evaluated in another batch. An input that is wrong and accepted is returned as it is.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples to start from, of all classes, for instance training samples,
            ``(m, ...)``.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            None returns the nearest evading points at any distance.
        steps: Steps of the walk.
        neighbours: Pool samples tried per input, half of them the nearest of each of the nearest
            classes.
        starts: Starts per input, of different classes as far as there are; half of them are dropped
            after 5, 10, 20 and 40 steps, all but one after 60.
        **shared: See ``EvasionOptions``.

    Returns:
        Adversarial inputs, like ``inputs``. An input without any start is returned as it is.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Warns once (``UserWarning``) with the number of inputs without a start: give a larger pool.

    Source: the radius as in Pintor et al., "Fast minimum-norm adversarial attacks through adaptive
    norm constraints", NeurIPS 2021; starts on the far side as in Brendel et al., "Accurate,
    reliable and fast robustness evaluation", NeurIPS 2019.
    """
    options = resolve(boundary_walk, shared, init_inputs=init_inputs)
    check_steps(steps, smallest=0)
    walk = partial(_walk, steps=steps)
    radius = math.inf if eps is None else eps
    with problem(model, inputs, labels, radius, options, safe_decision_objective) as attacked:
        return nearest_evading(
            attacked, walk, neighbours, starts, steps=steps, name="boundary walk", from_inputs=False
        )


class _Walks(NamedTuple):
    """Walks under way, one per row; an input may have more than one."""

    owner: Tensor
    point: Tensor
    radius: Tensor
    streak: Tensor  # evading steps in a row; not evading counts below zero
    best: Tensor
    best_norm: Tensor

    def rows(self, rows: Tensor) -> "_Walks":
        """Return some rows."""
        return _Walks(*(field[rows] for field in self))


def _walk(run: NearRun, *, steps: int) -> Nearest:
    """Walk from evading points to nearer ones, one forward and backward a step."""
    length = lengths(run.first, run.region.center[run.owner], run.region.norm)
    state = _Walks(run.owner, run.first, length, torch.zeros_like(length), run.first, length)
    starts = run.starts
    for step in range(steps if len(run.owner) else 0):
        if step in _HALVE_AT:
            starts = (starts + 1) // 2
            state = state.rows(keep_nearest(state.owner, state.best_norm, starts))
        size, shrinkage, left = _schedule(step, run)
        state = _step(run, state, size, shrinkage)
        if left == 0:  # only the best goes on, straight towards the input while it evades
            state = state.rows(keep_nearest(state.owner, state.best_norm, 1))
            center, labels = run.region.center[state.owner], run.labels[state.owner]
            best = bisect(run.target, labels, center, state.best, _HALVINGS)
            norms = lengths(best, center, run.region.norm)
            state = state._replace(point=best, radius=norms, best=best, best_norm=norms)
        run.bar.update()
    nearest = state.rows(keep_nearest(state.owner, state.best_norm, 1))
    return Nearest(nearest.owner, nearest.best, nearest.best_norm)


def _schedule(step: int, run: NearRun) -> tuple[float, float, int]:
    """Return step size, shrinkage, and how many steps of the cycle are left after this one."""
    if step < _SEARCH:
        sizes = _FIRST_SIZES[run.region.norm]
        ends, length = ((sizes[run.restart % len(sizes)], _LAST_SIZE), _SHRINKAGE), _SEARCH
    else:
        step, length, ends = step - _SEARCH, _POLISH, (_POLISH_SIZE, _POLISH_SHRINKAGE)
        while step >= length:
            step, length = step - length, 2 * length
    size, shrinkage = (cosine(step, length, *pair) for pair in ends)
    return size, shrinkage, length - 1 - step


def _step(run: NearRun, state: _Walks, size: float, shrinkage: float) -> _Walks:
    """Evaluate every point, keep it if it is the nearest that evades, and move on."""
    owner, point, radius, streak, best, best_norm = state
    center, _, norm, bounds = run.region.rows(owner)
    slope = slope_at(run.target, point, run.labels[owner], bounds)
    evading = slope.values < 0
    length = lengths(point, center, norm)
    best, best_norm = Kept(best, best_norm).update(point, length, evading)
    # The rate doubles while success or failure repeats: far starts come near in a few steps.
    sign = torch.where(evading, 1.0, -1.0).to(length.dtype)
    streak = torch.where(streak * sign > 0, streak + sign, sign)
    rate = (shrinkage * torch.exp2(streak.abs() - 1)).clamp_max(_MAX_RATE)
    radius = torch.where(evading, best_norm * (1 - rate), radius * (1 + rate)).minimum(best_norm)
    point = point + per_row(size * best_norm, point) * unit_step(slope.direction, norm)
    point = project(point, center, radius, norm, bounds)
    return _Walks(owner, point, radius, streak, best, best_norm)
