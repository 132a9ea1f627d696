"""Minimum-norm evasion by decoupled direction and norm (DDN)."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.minimum_norm import Kept, MinimumNorm, Nearest, NearRun, cosine, lengths
from torchdnr.attacks.projections import project_box
from torchdnr.attacks.target import slope_at

_STEP_FADE = 0.01  # last step relative to the first
_RATE = 0.05  # relative change of the radius in a step


def ddn(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor | None = None,
    *,
    init_labels: Tensor | None = None,
    targets: Tensor | None = None,
    eps: float | Tensor | None = None,
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
    """Find the nearest evading point of each input: a direction by gradients, a norm by success.

    Every step follows the normalised gradient, and the perturbation is then scaled to a radius
    that shrinks by 5 % while the point evades and grows by 5 % while it does not. It aims at
    accepted and wrong. One run gives the whole security curve; l2 norm only. Nothing in a step
    waits for the device.

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

    Source: Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial
    attacks and defenses", CVPR 2019; without its rounding to 256 levels.
    """
    check_count("steps", steps, 1)
    check_step_size(step_size)
    common = MinimumNorm(
        model=model,
        inputs=inputs,
        labels=labels,
        norm=2,
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
        lambda run: _descend(run, steps, step_size), steps=steps, name="DDN", from_inputs=True
    )


def _descend(run: NearRun, steps: int, step_size: float) -> Nearest:
    center, labels = run.center[run.owner], run.labels[run.owner]
    kept, points = Kept.nothing(run.first), run.first
    shape = (-1, *[1] * (center.ndim - 1))
    length = lengths(points, center, 2)
    radius = torch.where(length > 0, length, 1.0)
    for step in range(steps):
        slope = slope_at(run.target, points, labels)
        evading = slope.values < 0
        kept = kept.update(points, length, evading)
        radius = torch.where(evading, length.minimum(radius) * (1 - _RATE), radius * (1 + _RATE))
        size = cosine(step, steps, step_size, _STEP_FADE * step_size)
        change = points + size * slope.direction - center
        norm = change.flatten(1).norm(dim=1)
        scale = radius / torch.where(norm > 0, norm, 1)
        points = project_box(center + scale.view(shape) * change, run.bounds)
        length = lengths(points, center, 2)
        run.bar.update()
    return kept.finish(run, points)
