"""The attack that wants to be rejected: the point near an input whose best score is lowest.

A classifier that rejects easily looks robust. What that costs shows where it rejects inputs that
are perturbed so little that it should not.
"""

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.arrays import as_images
from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import STEP_FADE, cosine, unit, without_blocked
from torchdnr.attacks.options import SharedOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, project, random_points
from torchdnr.attacks.target import choose, evaluate, slope_at

_FIRST = 0.5  # first step relative to eps, by default


def confidence_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute ``max_k s_k - theta``, whatever the classes: rejected iff it is <= 0."""
    best = scores.amax(dim=1)  # amax: classes that tie for the maximum share its gradient
    return best if threshold is None else best - threshold


def lowest_confidence(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 100,
    step_size: float | None = None,
    momentum: float = 0.9,
    restarts: int = 4,
    start: Tensor | None = None,
    **shared: Unpack[SharedOptions],
) -> Tensor:
    """Minimise the best score ``max_k s_k`` within a ball, to be rejected if that is possible.

    Projected descent with momentum along gradients of unit norm, as RBF scores are flat far from
    the training data; in the l-infinity norm along the signs. The step shrinks along half a cosine.
    The first descent begins at ``start``, the others at points drawn from the ball; the best
    point evaluated is kept. Every input of one call is given the same draws, shifted to it, so
    that its result depends neither on its batch nor on its place in it.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        eps: Radius of the ball, a number or ``(n,)``.
        steps: Steps of each descent, one forward and backward each.
        step_size: l2 length of the first step (for l-infinity, of each coordinate); it falls to a
            hundredth of it. None: eps / 2, per input.
        momentum: Share of the previous direction that is kept, in [0, 1).
        restarts: Further descents, from random points of the ball.
        start: Where the first begins, ``(n, ...)``, for instance the result at a smaller eps;
            projected. None: at the inputs.
        **shared: See ``SharedOptions``.

    Returns:
        Points of the lowest best score evaluated, like ``inputs``; never worse than the input
        itself or ``start``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: the inner attack of Chen et al., "Stratified adversarial robustness with rejection",
    ICML 2023, there on the softmax; here on the scores that decide about rejection.
    """
    options = resolve(lowest_confidence, shared, restarts=restarts, start=start)
    check_steps(steps, step_size, smallest=0)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    inputs = as_images("inputs", inputs, model)
    labels = torch.zeros(inputs.shape[:1], dtype=torch.int64, device=inputs.device)  # not used
    generator = torch.Generator().manual_seed(options.seed)
    with (
        problem(model, inputs, labels, eps, options, confidence_objective) as attacked,
        options.bar((1 + restarts) * steps, "lowest confidence") as bar,
    ):
        target, region, _, options = attacked
        first = _FIRST * region.eps if step_size is None else torch.full_like(region.eps, step_size)
        best = evaluate(target, inputs, labels).clone()
        for restart in range(1 + restarts):
            points = inputs if options.start is None else options.start
            if restart:
                draw = _draw(inputs, region.norm, generator)
                points = inputs + per_row(region.eps, inputs) * draw
            points = project(points, *region)
            velocity = torch.zeros_like(points)
            for step in range(steps):
                slope = slope_at(target, points, labels, region.bounds)
                best = choose(slope.values < best.values, slope.points, best)
                velocity = momentum * velocity + slope.direction
                direction = without_blocked(velocity, points, region.bounds)
                direction = direction.sign() if region.norm == math.inf else unit(direction)[0]
                size = cosine(step, steps, 1.0, STEP_FADE) * first
                points = project(points + per_row(size, points) * direction, *region)
                bar.update()
            last = evaluate(target, points, labels)
            best = choose(last.values < best.values, last, best)
    return best.inputs


def _draw(inputs: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Draw one point of the unit ball, like one input; on the CPU, so that devices agree."""
    center = torch.zeros((1, *inputs.shape[1:]), dtype=torch.float64)
    ball = Region(center, torch.ones(1, dtype=torch.float64), norm, (-1.0, 1.0))
    return random_points(ball, generator).to(inputs)
