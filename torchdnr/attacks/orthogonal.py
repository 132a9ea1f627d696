"""Selective and orthogonal PGD: two gradients, one to be misclassified and one to be accepted."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_step_size
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.objectives import decision_objective, paper_objective
from torchdnr.attacks.points import Points, evaluated, keep_better
from torchdnr.attacks.projections import project, steepest
from torchdnr.attacks.target import Target, input_gradient, unit
from torchdnr.decisions import split_scores, succeeds, true_and_best_other

PROJECTED = ("none", "class", "rejection", "both")
"""Which of the two gradients are made orthogonal to the other one."""

_PARALLEL = 1e-3  # sine of the angle below which nothing of a gradient is left to follow


def orthogonal_pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    projected: str = "rejection",
    selective: bool = False,
    margin: float = 0.05,
    targets: Tensor | None = None,
    steps: int = 100,
    step_size: float | None = None,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    random_start: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Descend the class margin and the rejection margin without undoing one by the other.

    The class margin is ``s_y - max_{j != y} s_j``, the rejection margin ``theta - max_{j != y}
    s_j``; each gradient can lose its component along the other one, so that a step on one margin
    leaves the other as it is, to first order. Where both are parallel nothing would be left, and
    the gradient is followed as it is. Without a threshold there is one margin, and this is PGD.

    The source follows the class margin until it is overcome and then the rejection margin:
    ``selective=True``, selective PGD with ``projected="none"`` and orthogonal PGD with ``"both"``.
    It has a detector apart from the classifier in mind. Here both margins fall as the same score
    ``max_{j != y} s_j`` rises, and a projection of the class gradient takes just that away: on RBF
    scores those variants are far weaker than PGD, the default is not.

    Both gradients come from one forward. Nothing in a step waits for the device.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        projected: Which gradients lose their component along the other: ``"none"``, ``"class"``,
            ``"rejection"``, or ``"both"``.
        selective: Whether a step follows one of them; else the sum of both, each of unit length.
        margin: How far a point has to be on the other side of the class margin for a selective step
            to follow the rejection margin, as a share of the spread of its scores.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        steps: Number of steps of each run.
        step_size: Length of a step in ``norm``; ``None``: 2.5 eps / steps, per input.
        start: Where to start, ``(n, ...)``; projected, and used where it is better than the input.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of those that did not evade.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Further runs, from random points of the ball, of those that did not evade.
        random_start: Whether the first run starts at a random point too.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated by the decision objective,
        which among misclassified ones is that of the lowest rejection margin.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Bryniarski et al., "Evading adversarial example detection defenses with orthogonal
    projected gradient descent", ICLR 2022.
    """
    check_count("steps", steps, 1)
    check_step_size(step_size)
    if projected not in PROJECTED:
        raise ValueError(f"projected must be one of {PROJECTED}, got {projected!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")
    common = FixedEps(
        model=model,
        inputs=inputs,
        labels=labels,
        eps=eps,
        norm=norm,
        objective="decision",
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
        return _descend(run, steps, step_size, projected, selective, margin)

    return common.run(loop, steps=steps, name="orthogonal PGD", random_start=random_start)


def _descend(
    run: Run, steps: int, step_size: float | None, projected: str, selective: bool, margin: float
) -> Points:
    center, eps, norm, bounds = run.region
    if step_size is None:
        sizes = 2.5 / steps * torch.where(eps.isfinite(), eps, bounds[1] - bounds[0])
    else:
        sizes = torch.full_like(eps, step_size)
    sizes = _wide(sizes, center)
    best, points = run.first, run.first.inputs
    for _ in range(steps):
        slopes = _slopes_at(run.target, points, run.labels, margin)
        best = keep_better(best, Points(points, slopes.values, slopes.evading))
        by_class, by_rejection = _orthogonalised(slopes, projected)
        if selective:
            direction = torch.where(_wide(slopes.crossed, points), by_rejection, by_class)
        else:
            direction = unit(by_class + by_rejection)[0]
        direction = steepest(direction, points, norm, bounds)
        points = project(points + sizes * direction, center, eps, norm, bounds)
        run.bar.update()
    return keep_better(best, evaluated(run.target, points, run.labels))


class _Slopes(NamedTuple):
    """Unit directions down both margins, decision objective, success, and whether to go on."""

    by_class: Tensor
    by_rejection: Tensor
    values: Tensor
    evading: Tensor
    crossed: Tensor  # whether the class margin is overcome by enough


def _slopes_at(target: Target, points: Tensor, labels: Tensor, margin: float) -> _Slopes:
    """Evaluate both margins and their gradients from one forward, in chunks."""
    found, size = [], target.batch_size
    for chunk, classes in zip(points.split(size), labels.split(size), strict=True):
        with torch.enable_grad():
            chunk = chunk.detach().requires_grad_()
            output = target.model(chunk)
            scores, threshold = split_scores(output, target.reject)
            by_class = paper_objective(scores, threshold, classes, target.targeted)
            gradient = input_gradient(by_class, chunk, retain=threshold is not None)
            down_class = down_rejection = unit(-gradient)[0]
            if threshold is not None:
                true, other = true_and_best_other(scores, classes)
                by_rejection = threshold - (true if target.targeted else other)
                down_rejection = unit(-input_gradient(by_rejection, chunk))[0]
        output, scores, by_class = output.detach(), scores.detach(), by_class.detach()
        values = decision_objective(*split_scores(output, target.reject), classes, target.targeted)
        values = torch.where(values.isnan(), torch.inf, values)
        evading = succeeds(output, classes, target.reject, target.targeted)
        spread = scores.amax(dim=1) - scores.amin(dim=1)
        crossed = by_class < -margin * spread
        found.append((down_class, down_rejection, values, evading, crossed))
    return _Slopes(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _orthogonalised(slopes: _Slopes, projected: str) -> tuple[Tensor, Tensor]:
    """Return unit directions down the class and the rejection margin, projected as told."""
    by_class, by_rejection = slopes.by_class, slopes.by_rejection
    if projected in ("class", "both"):
        by_class = _without(slopes.by_class, slopes.by_rejection)
    if projected in ("rejection", "both"):
        by_rejection = _without(slopes.by_rejection, slopes.by_class)
    return by_class, by_rejection


def _without(direction: Tensor, other: Tensor) -> Tensor:
    """Remove from a unit vector its component along another one, and scale it to unit length.

    A vector that is parallel to the other is returned as it is: what is left of it is rounding.
    """
    along = (direction.flatten(1) * other.flatten(1)).sum(dim=1)
    rest, length = unit(direction - _wide(along, direction) * other)
    return torch.where(_wide(length > _PARALLEL, direction), rest, direction)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
