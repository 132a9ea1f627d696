"""Minimum-norm evasion by adaptive norm constraints (FMN)."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.minimum_norm import (
    Kept,
    MinimumNorm,
    Nearest,
    NearRun,
    cosine,
    dual_norm,
    lengths,
)
from torchdnr.attacks.projections import project
from torchdnr.attacks.target import slope_at

_STEP_FADE = 0.01  # last step relative to the first
_SHRINKAGE = (0.05, 0.001)  # first and last relative change of the radius


def fmn(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor | None = None,
    *,
    init_labels: Tensor | None = None,
    targets: Tensor | None = None,
    eps: float | Tensor | None = None,
    norm: float = 2,
    steps: int = 100,
    step_size: float = 1.0,
    neighbours: int = 20,
    starts: int = 3,
    restarts: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Find the nearest evading point of each input by descent under a radius that adapts.

    While a point does not evade and none was found, its radius is where a linear model would put
    the boundary; once one was found, the radius shrinks at every evading step and grows otherwise.
    It aims at accepted and wrong: at ``max(s_y, theta) - max_{j != y} s_j = 0``. One run gives the
    whole security curve, at one forward and backward per step. Nothing in a step waits for the
    device.

    Alone it starts at the input, where RBF scores may be flat: pass ``init_inputs``.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples of all classes, ``(m, ...)``, near which further runs start, at points
            that evade already; ``None``: from the inputs only.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            ``None`` returns the nearest evading points at any distance.
        norm: Norm of the perturbation; 1, 2 or infinity.
        steps: Steps of each run.
        step_size: l2 length of the first step, in input units; it falls to a
            hundredth of it.
        neighbours: Samples of ``init_inputs`` tried per input.
        starts: Runs per input that start near them, at the most.
        restarts: Further rounds: from random points no farther than what was found, and from the
            nearest of another random half of ``init_inputs``.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the restarts.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: the nearest evading (accepted and wrong) point found,
        or the input itself where there is none.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Warns once (``UserWarning``) with the number of inputs for which no point was found.

    Source: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm
    constraints", NeurIPS 2021.
    """
    check_count("steps", steps, 1)
    check_step_size(step_size)
    common = MinimumNorm(
        model=model,
        inputs=inputs,
        labels=labels,
        norm=norm,
        init_inputs=init_inputs,
        eps=eps,
        targets=targets,
        init_labels=init_labels,
        neighbours=neighbours,
        starts=starts,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )
    return common.run(
        lambda run: _descend(run, steps, step_size), steps=steps, name="FMN", from_inputs=True
    )


def _descend(run: NearRun, steps: int, step_size: float) -> Nearest:
    center, labels = run.center[run.owner], run.labels[run.owner]
    kept, points = Kept.nothing(run.first), run.first
    radius = torch.full_like(kept.norms, torch.inf)
    for step in range(steps):
        slope = slope_at(run.target, points, labels)
        evading, length = slope.values < 0, lengths(points, center, run.norm)
        kept = kept.update(points, length, evading)
        rate = cosine(step, steps, *_SHRINKAGE)
        steepness = slope.length * dual_norm(slope.direction, run.norm)
        # A vanishing gradient puts the boundary at infinity: no constraint, and still a step.
        boundary = length + slope.values.abs() / steepness.clamp_min(torch.finfo(length.dtype).tiny)
        # A little beyond the boundary: on it, rounding decides.
        outside = torch.where(kept.norms.isfinite(), radius, boundary) * (1 + rate)
        inside = torch.minimum(radius * (1 - rate), kept.norms)
        radius = torch.where(evading, inside, outside)
        size = cosine(step, steps, step_size, _STEP_FADE * step_size)
        points = project(points + size * slope.direction, center, radius, run.norm, run.bounds)
        run.bar.update()
    return kept.finish(run, points)
