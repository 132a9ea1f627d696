"""Random noise: what an attack that knows nothing of the model finds."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.points import Points, evaluated, keep_better
from torchdnr.attacks.projections import Region, project, random_points


def noise(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    objective: str = "decision",
    targets: Tensor | None = None,
    draws: int = 100,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Draw points within ``eps`` of each input and keep the best.

    In turn uniform in the ball, at its surface (its corners for l-infinity), and in a uniform
    direction at a uniform distance: nearly all of the volume of a ball is far from its centre. One
    forward a draw; the model need not be differentiable. An attack that fails where noise succeeds
    is broken.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``: which of the points that do not evade is best.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        draws: Points drawn for each input.
        start: Points to be evaluated too, ``(n, ...)``; projected.
        init_inputs: Samples of any class, ``(m, ...)``, the best one of which is evaluated too.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Times that all draws are repeated for those that did not evade.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        The best point evaluated for each input, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
    """
    check_count("draws", draws, 1)
    common = FixedEps(
        model=model,
        inputs=inputs,
        labels=labels,
        eps=eps,
        norm=norm,
        objective=objective,
        targets=targets,
        start=start,
        init_inputs=init_inputs,
        init_labels=init_labels,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )

    def loop(run: Run) -> Points:
        best = run.first
        for draw in range(draws):
            points = _DRAWS[draw % len(_DRAWS)](run.region, run.generator)
            best = keep_better(best, evaluated(run.target, points, run.labels))
            run.bar.update()
        return best

    return common.run(loop, steps=draws, name="noise")


def _at_surface(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point of the ball and move it away from the centre as far as the ball allows."""
    center, eps, norm, bounds = region
    move = (random_points(region, generator) - center).flatten(1)
    if norm == math.inf:
        move = move.sign()
    else:
        length = torch.linalg.vector_norm(move, norm, dim=1, keepdim=True)
        move = move / torch.where(length > 0, length, 1)
    d = move.shape[1]
    widest = (bounds[1] - bounds[0]) * (1.0 if norm == math.inf else d ** (1 / norm))
    points = center + (eps.clamp_max(widest)[:, None] * move).view_as(center)
    return project(points, center, eps, norm, bounds)


def _at_any_distance(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point at the surface and move it towards the centre by a uniform factor."""
    points, center = _at_surface(region, generator), region.center
    factor = torch.rand(
        len(center), generator=generator, dtype=center.dtype, device=center.device
    ).view(-1, *[1] * (center.ndim - 1))
    return project(center + factor * (points - center), *region)


_DRAWS = (random_points, _at_surface, _at_any_distance)
