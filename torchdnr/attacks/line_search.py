"""Maximum-confidence evasion at a given eps: Algorithm 1 with a line search on every step."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.directions import steepest
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.points import Points, best_column, better, evaluated, put
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, project
from torchdnr.attacks.target import Target, slope_at

_PATIENCE = 3  # consecutive small changes that end a descent


STEP_SIZES = {1: 1.0, 2: 0.1, math.inf: 0.005}
"""Smallest step tried at first, by norm, for images in [0, 1]."""


def line_search_pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objective: str = "paper",
    steps: int = 20,
    step_size: float | None = None,
    doublings: int = 10,
    halvings: int = 5,
    tol: float = 1e-3,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Minimise the objective within ``eps`` of each input.

    Each step follows the normalised gradient and tries ``step_size * 2^k`` for k = 0..doublings,
    and halved steps where none of them improves; every trial is projected on ball and box and the
    best one is the next point. A sample stops when no trial improves, or when three steps in a row
    change its objective by no more than ``tol`` of all its descent. It then leaves the batch, and,
    without restarts, its result does not depend, but for rounding, on which samples shared it.

    What is returned is the best point evaluated: an evading point (accepted and wrong) beats any
    other, then the lower objective counts. More steps, or a start, never make it worse.

    Where scores are flat a descent from the input alone stalls: pass ``init_inputs`` for a second
    one from an accepted sample of another class, and ``start`` when eps grows.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objective: Name in ``OBJECTIVES``: "paper", "decision", "secml", ...
        steps: Largest number of steps of a descent.
        step_size: Smallest step tried at first, length in ``norm``; None: ``STEP_SIZES``.
        doublings: Times the step is doubled.
        halvings: Times the step is halved where no larger one improves.
        tol: Change of the objective that counts as small, relative to the descent so far.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples", Algorithm 1; step
    sizes and second start as in the authors' library ``secml``.
    """
    options = resolve(line_search_pgd, shared)
    for name, value in (("steps", steps), ("doublings", doublings), ("halvings", halvings)):
        check_count(name, value, 0)
    check_step_size(step_size)
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        smallest = STEP_SIZES[options.norm] if step_size is None else step_size
        exponents = torch.arange(-halvings, doublings + 1, device=inputs.device)
        sizes = smallest * torch.exp2(exponents.to(inputs.dtype))
        first, shorter = sizes[halvings:], sizes[:halvings]
        descend = partial(_descend, first=first, shorter=shorter, steps=steps, tol=tol)
        return best_within(attacked, descend, steps=steps, name="line search", after_evasion=True)


def _descend(run: Run, *, first: Tensor, shorter: Tensor, steps: int, tol: float) -> Points:
    """Descend from the first points and return the best point evaluated, row by row.

    Args:
        run: What is attacked, and from where.
        first: Step sizes that are tried together.
        shorter: Step sizes that are tried where none of those improves.
        steps: Largest number of steps.
        tol: Change that counts as small, relative to the descent below the reference.

    Returns:
        Best points, in the order of ``better``.
    """
    target, labels = run.target, run.labels
    current, best = run.first.clone(), run.first.clone()
    small = torch.zeros_like(labels)  # small changes in a row
    running = torch.arange(len(labels), device=labels.device)
    for _ in range(steps):
        if len(running) == 0:
            break
        here, row_labels, region = current.rows(running), labels[running], run.region.rows(running)
        direction = slope_at(target, here.inputs, row_labels).direction
        direction = steepest(direction, here.inputs, region.norm, region.bounds)
        line = _Line(target, region, row_labels, here.inputs, direction)
        lowest, reached = line.try_steps(first)
        stuck = (~(lowest.values < here.values)).nonzero()[:, 0]  # waits for the device
        if len(stuck) and len(shorter):
            low, good = line.rows(stuck).try_steps(shorter)
            put(lowest, stuck, low, low.values < lowest.values[stuck])
            put(reached, stuck, good, better(good, reached.rows(stuck)))
        put(best, running, reached, better(reached, best.rows(running)))
        moved = lowest.values < here.values
        put(current, running, lowest, moved)
        # Relative to its own descent: a combiner may live within 0.1 of its intercept.
        scale = (run.reference[running] - lowest.values).abs()
        slow = here.values - lowest.values <= tol * scale
        small[running] = torch.where(slow, small[running] + 1, 0)
        # A row that did not move would repeat this step. Selecting the others waits for the
        # device, once per step, and saves a dozen forwards of every row that has stopped.
        running = running[moved & (small[running] < _PATIENCE)]
        run.bar.update()
    return best


class _Line(NamedTuple):
    """Where each row stands, and the direction along which steps are tried."""

    target: Target
    region: Region
    labels: Tensor
    inputs: Tensor
    direction: Tensor

    def rows(self, rows: Tensor) -> "_Line":
        """Return some rows."""
        region, labels = self.region.rows(rows), self.labels[rows]
        return _Line(self.target, region, labels, self.inputs[rows], self.direction[rows])

    def try_steps(self, sizes: Tensor) -> tuple[Points, Points]:
        """Evaluate all steps of all rows, in batches.

        Returns:
            Per row the point of the lowest objective, and the best in the order of ``better``.
        """
        at_once = max(1, self.target.batch_size // len(sizes))
        if len(self.inputs) <= at_once:
            return self._try_batch(sizes)
        parts = torch.arange(len(self.inputs), device=self.inputs.device).split(at_once)
        lowest, best = zip(*(self.rows(part)._try_batch(sizes) for part in parts), strict=True)
        return (
            Points(*map(torch.cat, zip(*lowest, strict=True))),
            Points(*map(torch.cat, zip(*best, strict=True))),
        )

    def _try_batch(self, sizes: Tensor) -> tuple[Points, Points]:
        n, count = len(self.inputs), len(sizes)
        rows = torch.arange(n, device=self.inputs.device).repeat_interleave(count)
        steps = per_row(sizes.repeat(n), self.inputs) * self.direction[rows]
        trials = project(self.inputs[rows] + steps, *self.region.rows(rows))
        tried = evaluated(self.target, trials, self.labels[rows])
        values, evading = tried.values.view(-1, count), tried.evading.view(-1, count)
        offset = torch.arange(n, device=self.inputs.device) * count
        return (
            tried.rows(offset + values.argmin(dim=1)),
            tried.rows(offset + best_column(values, evading)),
        )
