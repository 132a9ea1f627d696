"""Minimum-norm evasion by FMN: descent under a radius that adapts."""

import math
from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import STEP_FADE, cosine
from torchdnr.attacks.minimum_norm import (
    Kept,
    Nearest,
    NearRun,
    nearest_evading,
    safe_decision_objective,
)
from torchdnr.attacks.options import EvasionOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import project
from torchdnr.attacks.starts import lengths
from torchdnr.attacks.target import slope_at

_FMN_RATES = (0.05, 0.001)  # first and last relative change of the radius in a step


def fmn(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    steps: int = 100,
    step_size: float = 1.0,
    neighbours: int = 20,
    starts: int = 3,
    **shared: Unpack[EvasionOptions],
) -> Tensor:
    """Find the nearest evading point of each input by descent under a radius that adapts.

    Until a point has evaded, its radius is where a linear model would put the boundary; from then
    on the radius shrinks at every evading step and grows at every other.
    It aims at accepted and wrong: at ``max(s_y, theta) - max_{j != y} s_j = 0``. One run gives the
    whole security curve, at one forward and backward per step. Nothing in a step waits for the
    device.

    Alone it starts at the input, where RBF scores may be flat: pass ``init_inputs``.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples of all classes, ``(m, ...)``, near which further runs start, at points
            that evade already; None: from the inputs only.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            None returns the nearest evading points at any distance.
        steps: Steps of each run.
        step_size: l2 length of the first step, whatever the norm; it falls to a hundredth of it.
        neighbours: Samples of ``init_inputs`` tried per input.
        starts: Runs per input that start near them, at the most.
        **shared: See ``EvasionOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the nearest evading (accepted and wrong) point, or the
        input itself where there is none.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Warns once (``UserWarning``) with the number of inputs without an evading point.

    Source: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm
    constraints", NeurIPS 2021.
    """
    options = resolve(fmn, shared, init_inputs=init_inputs)
    check_steps(steps, step_size)
    descend = partial(_descend_fmn, steps=steps, step_size=step_size)
    radius = math.inf if eps is None else eps
    with problem(model, inputs, labels, radius, options, safe_decision_objective) as attacked:
        return nearest_evading(attacked, descend, neighbours, starts, steps=steps, name="FMN")


def _descend_fmn(run: NearRun, *, steps: int, step_size: float) -> Nearest:
    center, reach, norm, bounds = run.region.rows(run.owner)
    points, labels = run.first, run.labels[run.owner]
    radius = torch.full_like(reach, torch.inf)
    kept = Kept(points, radius)
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    for step in range(steps):
        slope = slope_at(run.target, points, labels, bounds)
        evading, length = slope.values < 0, lengths(points, center, norm)
        kept = kept.update(points, length, evading)
        rate = cosine(step, steps, *_FMN_RATES)
        downhill = slope.direction.flatten(1)
        steepness = slope.length * torch.linalg.vector_norm(downhill, dual, dim=1)
        # A vanishing gradient puts the boundary at infinity: no constraint, and still a step.
        boundary = length + slope.values.abs() / steepness.clamp_min(torch.finfo(length.dtype).tiny)
        # A little beyond the boundary: on it, rounding decides.
        outside = torch.where(kept.norms.isfinite(), radius, boundary) * (1 + rate)
        inside = torch.minimum(radius * (1 - rate), kept.norms)
        radius = torch.where(evading, inside, outside)
        size = cosine(step, steps, step_size, STEP_FADE * step_size)
        points = project(points + size * slope.direction, center, radius, norm, bounds)
        run.bar.update()
    return kept.finish(run, points)
