"""Minimum-norm evasion by DDN: direction and norm decoupled, l2 only."""

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
from torchdnr.attacks.projections import per_row, project_box
from torchdnr.attacks.starts import lengths
from torchdnr.attacks.target import slope_at

_DDN_RATE = 0.05  # relative change of the radius in a step


def ddn(
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
    """Find the nearest evading point of each input: a direction by gradients, a norm by success.

    Every step follows the normalised gradient, and the perturbation is then scaled to a radius
    that shrinks by 5 % while the point evades and grows by 5 % while it does not. It aims at
    accepted and wrong. One run gives the whole security curve; l2 norm only. Nothing in a step
    waits for the device.

    The arguments, ``EvasionOptions`` among them, and what is returned and raised are those of
    ``fmn``; ``norm`` is 2.

    Source: Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial
    attacks and defenses", CVPR 2019; without its rounding to 256 levels.
    """
    options = resolve(ddn, shared, init_inputs=init_inputs)
    if options.norm != 2:
        raise ValueError(f"norm must be 2 for DDN, got {options.norm}; fmn knows other norms")
    check_steps(steps, step_size)
    descend = partial(_descend_ddn, steps=steps, step_size=step_size)
    radius = math.inf if eps is None else eps
    with problem(model, inputs, labels, radius, options, safe_decision_objective) as attacked:
        return nearest_evading(attacked, descend, neighbours, starts, steps=steps, name="DDN")


def _descend_ddn(run: NearRun, *, steps: int, step_size: float) -> Nearest:
    center, reach, _, bounds = run.region.rows(run.owner)
    points, labels, length = run.first, run.labels[run.owner], lengths(run.first, center, 2)
    kept = Kept(points, torch.full_like(length, torch.inf))
    radius = torch.where(length > 0, length, 1.0).minimum(reach)
    for step in range(steps):
        slope = slope_at(run.target, points, labels, bounds)
        evading = slope.values < 0
        kept = kept.update(points, length, evading)
        shorter, longer = length.minimum(radius) * (1 - _DDN_RATE), radius * (1 + _DDN_RATE)
        radius = torch.where(evading, shorter, longer).minimum(reach)
        size = cosine(step, steps, step_size, STEP_FADE * step_size)
        change = points + size * slope.direction - center
        norm = change.flatten(1).norm(dim=1)
        scale = radius / torch.where(norm > 0, norm, 1)
        points = project_box(center + per_row(scale, change) * change, bounds)
        length = lengths(points, center, 2)
        run.bar.update()
    return kept.finish(run, points)
