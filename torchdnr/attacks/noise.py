"""Random noise: what any attack has to beat."""

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, project, random_options, random_points
from torchdnr.attacks.target import Points, evaluate, keep_better


def noise(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objective: str = "decision",
    draws: int = 100,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Draw points within ``eps`` of each input and keep the best.

    In turn uniform in the ball, at its surface (its corners for l-infinity), and in a uniform
    direction at a uniform distance: nearly all of the volume of a ball is far from its centre. One
    forward a draw; the model need not be differentiable. An attack that fails where noise succeeds
    is broken.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objective: Name in ``OBJECTIVES``: which of the points that do not evade is best.
        draws: Points drawn for each input.
        **shared: See ``FixedEpsOptions``.

    Returns:
        The best point evaluated for each input, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.
    """
    options = resolve(noise, shared)
    check_count("draws", draws, 1)

    def draw_points(run: Run) -> Points:
        best = run.first
        for draw in range(draws):
            points = _DRAWS[draw % len(_DRAWS)](run.region, run.generator)
            best = keep_better(best, evaluate(run.target, points, run.labels))
            run.bar.update()
        return best

    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        return best_within(attacked, draw_points, steps=draws, name="noise")


def _at_surface(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point of the ball and move it away from the centre as far as the ball allows."""
    center, eps, norm, bounds = region
    move = (random_points(region, generator) - center).flatten(1)
    if norm == math.inf:
        move = move.sign()
    else:
        length = torch.linalg.vector_norm(move, norm, dim=1, keepdim=True)
        move = move / torch.where(length > 0, length, 1)
    points = center + (eps[:, None] * move).view_as(center)
    return project(points, center, eps, norm, bounds)


def _at_any_distance(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point at the surface and scale its distance from the centre by a uniform factor."""
    points, center = _at_surface(region, generator), region.center
    factor = torch.rand(len(center), **random_options(generator, center))
    return project(center + per_row(factor, center) * (points - center), *region)


_DRAWS = (random_points, _at_surface, _at_any_distance)
