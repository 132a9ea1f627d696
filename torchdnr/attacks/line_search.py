"""Maximum-confidence evasion at a given eps: Algorithm 1 with a line search on every step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_steps
from torchdnr.attacks.directions import steepest
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, reading_is_free
from torchdnr.attacks.target import Points, Target, best_trials, better, put, slope_at, unsolved

_USEFUL = 2  # longest step tried but one, relative to eps: all longer ones project almost alike
_NEAR = (0.5, 1.0, 2.0)  # sizes tried first, relative to that of the step before
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
    early_stop: bool = False,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Minimise the objective within ``eps`` of each input.

    The first step follows the normalised gradient and tries ``step_size * 2^k`` for
    k = 0..doublings, of those beyond twice its eps the last alone, and halved steps where none of
    them improves. A later one tries half, once and twice the size of the step before it and the
    longest, and all others where none of these improves. Every trial is projected on ball and box
    and the best one is the next point. A sample stops when no trial improves, or when three steps
    in a row change its objective by no more than ``tol`` of all its descent. It then leaves the
    batch, and, without restarts, its result does not depend, but for rounding, on which samples
    shared it.

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
        early_stop: Whether a sample stops once it evades, instead of going on to lower the
            objective: the same evasions for fewer passes, of less confidence.
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
    check_steps(steps, step_size, smallest=0)
    check_count("doublings", doublings, 0)
    check_count("halvings", halvings, 0)
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        smallest = STEP_SIZES[options.norm] if step_size is None else step_size
        exponents = torch.arange(-halvings, doublings + 1).to(attacked.region.center)
        sizes = smallest * torch.exp2(exponents)
        descend = partial(
            _descend, sizes=sizes, halvings=halvings, steps=steps, tol=tol, early_stop=early_stop
        )
        return best_within(
            attacked, descend, steps=steps, name="line search", after_evasion=not early_stop
        )


def _descend(
    run: Run, *, sizes: Tensor, halvings: int, steps: int, tol: float, early_stop: bool
) -> Points:
    """Descend from the first points and return the best point evaluated, row by row.

    The first step tries the ``sizes`` from number ``halvings`` on, later ones those near the size
    of the step before and the longest; where none of these improves, all others.
    """
    target, labels = run.target, run.labels
    current, best = run.first.clone(), run.first.clone()
    small = torch.zeros_like(labels)  # small changes in a row
    size = torch.zeros_like(run.region.eps)  # of the last step
    nearby = torch.tensor(_NEAR, dtype=size.dtype, device=size.device)
    running = torch.arange(len(labels), device=labels.device)
    if early_stop:
        running = unsolved(best)
    for step in range(steps):
        if len(running) == 0:
            break
        here, row_labels, region = current.rows(running), labels[running], run.region.rows(running)
        direction = slope_at(target, here.inputs, row_labels, region.bounds).direction
        direction = steepest(direction, here.inputs, region.norm, region.bounds)
        first, further = sizes[halvings:].expand(len(running), -1), sizes[:halvings]
        if step > 0:
            near = size[running][:, None] * nearby
            first, further = torch.cat([near, sizes[-1:].expand(len(near), 1)], dim=1), sizes
        where = region, row_labels, direction, here.inputs
        lowest, harmful, size[running] = _try_steps(target, *where, first)
        stuck = (~(lowest.values < here.values)).nonzero()[:, 0]  # waits for the device
        if len(stuck) and len(further):
            where = region.rows(stuck), row_labels[stuck], direction[stuck], here.inputs[stuck]
            tried = _try_steps(target, *where, further.expand(len(stuck), -1))
            lower, more_harmful, size[running[stuck]] = tried
            put(lowest, stuck, lower, lower.values < lowest.values[stuck])
            put(harmful, stuck, more_harmful, better(more_harmful, harmful.rows(stuck)))
        put(best, running, harmful, better(harmful, best.rows(running)))
        moved = lowest.values < here.values
        put(current, running, lowest, moved)
        # Relative to its own descent: a combiner may live within 0.1 of its intercept.
        scale = (run.reference[running] - lowest.values).abs()
        slow = here.values - lowest.values <= tol * scale
        small[running] = torch.where(slow, small[running] + 1, 0)
        # A row that did not move would repeat this step. Selecting the others waits for the
        # device, once per step, and saves a dozen forwards of every row that has stopped.
        going = moved & (small[running] < _PATIENCE)
        if early_stop:
            going = going & ~best.evading[running]
        running = running[going]
        run.bar.update()
    return best


def _try_steps(
    target: Target, region: Region, labels: Tensor, direction: Tensor, here: Tensor, sizes: Tensor
) -> tuple[Points, Points, Tensor]:
    """Try steps of several sizes, ``(n, k)``, the last of which are the longest.

    Returns the lowest and the best point of each row, and the size of the step to the former.
    """
    # Rows of another eps in the batch change nothing: what is too long for a row does not count.
    limit = _USEFUL * region.eps[:, None]
    useful = sizes <= limit
    useful[:, -1:] = True
    if reading_is_free(useful):
        some = useful.any(dim=0)
        sizes, useful = sizes[:, some], useful[:, some]

    def trials(rows: Tensor) -> Tensor:
        steps = per_row(sizes[rows].flatten(), here)
        rows = rows.repeat_interleave(sizes.shape[1])
        return here[rows] + steps * direction[rows]

    lowest, best, column = best_trials(target, region, labels, trials, useful)
    return lowest, best, sizes.gather(1, column[:, None]).minimum(limit)[:, 0]
