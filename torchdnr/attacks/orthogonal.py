"""Selective and orthogonal PGD: two gradients, one to be misclassified and one to be accepted."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_steps
from torchdnr.attacks.directions import steepest, step_sizes, unit, without_blocked
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import decision_objective, paper_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import UNBOUNDED, Bounds, per_row, project, rows_of
from torchdnr.attacks.target import (
    Points,
    Target,
    evaluate,
    input_gradient,
    keep_better,
)
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
    projected: str = "rejection",
    selective: bool = False,
    margin: float = 0.05,
    steps: int = 100,
    step_size: float | None = None,
    random_start: bool = False,
    **shared: Unpack[FixedEpsOptions],
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
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last;
            differentiable.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        projected: Which gradients lose their component along the other: ``"none"``, ``"class"``,
            ``"rejection"``, or ``"both"``.
        selective: Whether a step follows one of them; else the sum of both, each of unit length.
        margin: How far a point has to be on the other side of the class margin for a selective step
            to follow the rejection margin, as a share of the spread of its scores.
        steps: Number of steps of each run.
        step_size: Length of a step in ``norm``; None: 2.5 eps / steps, per input.
        random_start: Whether the first run starts at a random point too.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated by the decision objective,
        which among misclassified ones is that of the lowest rejection margin.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: Bryniarski et al., "Evading adversarial example detection defenses with orthogonal
    projected gradient descent", ICLR 2022.
    """
    options = resolve(orthogonal_pgd, shared)
    check_steps(steps, step_size)
    if projected not in PROJECTED:
        raise ValueError(f"projected must be one of {PROJECTED}, got {projected!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")

    def descend(run: Run) -> Points:
        center, eps, norm, bounds = run.region
        sizes = per_row(step_sizes(step_size, steps, run.region), center)
        best, points = run.first, run.first.inputs
        for _ in range(steps):
            slopes = _slopes_at(run.target, points, run.labels, margin, bounds)
            best = keep_better(best, Points(points, slopes.values, slopes.evading))
            by_class, by_rejection = _orthogonalised(slopes, projected)
            if selective:
                direction = torch.where(per_row(slopes.crossed, points), by_rejection, by_class)
            else:
                direction = unit(by_class + by_rejection)[0]
            direction = steepest(direction, points, norm, bounds)
            points = project(points + sizes * direction, center, eps, norm, bounds)
            run.bar.update()
        return keep_better(best, evaluate(run.target, points, run.labels))

    with problem(model, inputs, labels, eps, options) as attacked:
        return best_within(
            attacked, descend, steps=steps, name="orthogonal PGD", random_start=random_start
        )


class _Slopes(NamedTuple):
    """Unit directions down both margins, decision objective and success, from one forward."""

    by_class: Tensor
    by_rejection: Tensor
    values: Tensor
    evading: Tensor
    crossed: Tensor  # whether the class margin is overcome by enough


@torch.no_grad()
def _slopes_at(
    target: Target, points: Tensor, labels: Tensor, margin: float, bounds: Bounds = UNBOUNDED
) -> _Slopes:
    """Evaluate both margins and their gradients from one forward, in chunks."""
    parts: list[tuple[Tensor, ...]] = []
    size = target.batch_size
    for begin in range(0, max(1, len(points)), size):  # none is one empty chunk
        part = slice(begin, begin + size)
        chunk, classes, box = points[part], labels[part], rows_of(bounds, part)
        with torch.enable_grad():
            chunk = chunk.detach().requires_grad_()
            output = target.output(chunk)
            scores, threshold = split_scores(output, target.reject)
            by_class = paper_objective(scores, threshold, classes, target.targeted)
            gradient = input_gradient(by_class, chunk, retain=threshold is not None)
            down_class = down_rejection = unit(without_blocked(-gradient, chunk.detach(), box))[0]
            if threshold is not None:
                true, other = true_and_best_other(scores, classes)
                by_rejection = threshold - (true if target.targeted else other)
                gradient = input_gradient(by_rejection, chunk)
                down_rejection = unit(without_blocked(-gradient, chunk.detach(), box))[0]
        values = decision_objective(scores, threshold, classes, target.targeted)
        values = torch.where(values.isnan(), torch.inf, values)
        evading = succeeds(output, classes, target.reject, target.targeted)
        spread = scores.amax(dim=1) - scores.amin(dim=1)
        crossed = by_class < -margin * spread
        parts.append((down_class, down_rejection, values, evading, crossed))
    return _Slopes(*map(torch.cat, zip(*parts, strict=True)))


def _orthogonalised(slopes: _Slopes, projected: str) -> tuple[Tensor, Tensor]:
    """Return unit directions down the class and the rejection margin, projected as named."""
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
    rest, length = unit(direction - per_row(along, direction) * other)
    return torch.where(per_row(length > _PARALLEL, direction), rest, direction)
