"""Minimum-norm evasion: the pull to the input against the push into one class, by a weight."""

import math
from collections.abc import Callable
from functools import partial
from typing import Unpack

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
from torchdnr.attacks.starts import lengths
from torchdnr.attacks.target import slope_at
from torchdnr.decisions import predict_labels

# First and last of a cosine: step relative to the best norm so far, change of the logit of weight.
_SIZE, _RATE = (0.5, 0.005), (0.7, 0.05)
_LARGEST_LOGIT = 1.5  # beyond it a point runs far to one side of the boundary before it turns


def primal_dual(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor,
    *,
    eps: float | Tensor | None = None,
    steps: int = 200,
    neighbours: int = 40,
    starts: int = 4,
    **shared: Unpack[EvasionOptions],
) -> Tensor:
    """Find the nearest evading point of each input by weighing its norm against one class's score.

    Each run starts near an accepted sample of another class and stays with that class. A step mixes
    the direction to the input with that of the decision objective towards the class; the weight of
    the latter rises while the point does not evade and falls while it does. Nothing is projected on
    a ball, so that a point may cross a region where scores mislead a walk along the boundary: what
    it finds, the boundary walk often does not, though on average its points are farther.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples to start from, of all classes, ``(m, ...)``.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            None returns the nearest evading points at any distance.
        steps: Steps of each run; each is one forward and one backward.
        neighbours: Samples of ``init_inputs`` tried per input.
        starts: Runs per input, of different classes as far as there are.
        **shared: See ``EvasionOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the nearest evading (accepted and wrong) point, or the
        input itself where there is none.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Warns once (``UserWarning``) with the number of inputs without an evading point.

    Source: the adaptive weight as in Rony et al., "Augmented Lagrangian adversarial attacks", ICCV
    2021, and Matyasko and Chau, "PDPGD: primal-dual proximal gradient descent adversarial attack",
    2021, without their augmented term and proximal step.
    """
    options = resolve(primal_dual, shared, init_inputs=init_inputs)
    check_steps(steps)
    descend = partial(_descend, steps=steps)
    radius = math.inf if eps is None else eps
    with problem(model, inputs, labels, radius, options, safe_decision_objective) as attacked:
        return nearest_evading(
            attacked,
            descend,
            neighbours,
            starts,
            steps=steps,
            name="primal-dual",
            from_inputs=False,
        )


def _descend(run: NearRun, *, steps: int) -> Nearest:
    center, _, norm, bounds = run.region.rows(run.owner)
    points = run.first
    kept = Kept(points, lengths(points, center, norm))
    if len(points) == 0:
        return Nearest(run.owner, *kept)
    chunks = points.split(run.target.batch_size)
    outputs = torch.cat([run.target.output(chunk) for chunk in chunks])
    classes = predict_labels(outputs, run.target.reject)  # the starts evade: none is rejected
    target = run.target._replace(targeted=True)
    logit = torch.zeros_like(kept.norms)
    for step in range(steps):
        slope = slope_at(target, points, classes, bounds)
        evading = slope.values < 0
        kept = kept.update(points, lengths(points, center, norm), evading)
        rate, size = cosine(step, steps, *_RATE), cosine(step, steps, *_SIZE)
        logit = (logit + torch.where(evading, -rate, rate)).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        weight = logit.sigmoid()
        push = per_row(size * weight * kept.norms, points) * unit_step(slope.direction, norm)
        length = lengths(points + push, center, norm)
        radius = length * (1 - size * (1 - weight))
        points = project(points + push, center, radius, norm, bounds)
        run.bar.update()
    return kept.finish(run, points)
