"""Points under attack with what the model makes of them, and which of two is better."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_targets
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.projections import Region, project
from torchdnr.attacks.target import Target, check_classes, evaluate
from torchdnr.decisions import has_reject_column


class Points(NamedTuple):
    """Points with their objective and success, one per row."""

    inputs: Tensor
    values: Tensor
    evading: Tensor

    def rows(self, rows: Tensor) -> "Points":
        """Return some rows."""
        return Points(*(field[rows] for field in self))


def better(new: Points, old: Points) -> Tensor:
    """Tell where ``new`` beats ``old``: evading first, then the lower objective, bool ``(n,)``."""
    lower = (new.evading == old.evading) & (new.values < old.values)
    return (new.evading > old.evading) | lower


def best_column(values: Tensor, evading: Tensor) -> Tensor:
    """Find the best of k points per row, in the order of ``better``, ``(n,)`` from ``(n, k)``."""
    ranked = torch.where(evading == evading.any(dim=1, keepdim=True), values, torch.inf)
    return ranked.argmin(dim=1)


def put(points: Points, rows: Tensor, new: Points, where: Tensor) -> None:
    """Overwrite ``points[rows]`` by ``new`` where told, in place."""
    for field, values in zip(points, new, strict=True):  # no row twice: nothing waits
        mask = where.view(-1, *[1] * (field.ndim - 1))
        field[rows] = torch.where(mask, values, field[rows])


def evaluated(target: Target, inputs: Tensor, labels: Tensor) -> Points:
    """Evaluate inputs ``(n, ...)`` for their true classes, or targets, ``(n,)``."""
    return Points(inputs, *evaluate(target, inputs, labels))


def keep_better(best: Points, new: Points) -> Points:
    """Take the better of two points in each row, without waiting for the device."""
    take = better(new, best)
    shape = (-1, *[1] * (new.inputs.ndim - 1))
    return Points(
        torch.where(take.view(shape), new.inputs, best.inputs),
        torch.where(take, new.values, best.values),
        torch.where(take, new.evading, best.evading),
    )


class Judge(NamedTuple):
    """What tells how good a point is, whoever found it: the model itself and the decision.

    Attributes:
        target: Model, with the decision objective.
        region: Ball and box of each row.
        classes: True classes, or targets, ``(n,)``.
    """

    target: Target
    region: Region
    classes: Tensor

    def points(self, points: Tensor, rows: Tensor | None = None) -> Points:
        """Project points on the ball and the box, and evaluate them.

        Args:
            points: ``(n, ...)``, or one for each of ``rows``.
            rows: Rows that they belong to; None: all.

        Returns:
            Points, evaluated.
        """
        region, classes = self.region, self.classes
        if rows is not None:
            region, classes = region.rows(rows), classes[rows]
        return evaluated(self.target, project(points, *region), classes)


def make_judge(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float,
    targets: Tensor | None,
    bounds: tuple[float, float],
    batch_size: int,
    reject: bool | None,
) -> Judge:
    """Check what an attack is given, and make its judge; see the attacks for the arguments.

    The model is to be in evaluation mode.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
    """
    check_inputs(inputs, labels, norm, bounds)
    check_count("batch_size", batch_size, 1)
    check_targets(targets, labels)
    radius = check_eps(eps, inputs)
    target = Target(
        model,
        decision_objective,
        has_reject_column(model, reject),
        batch_size,
        targets is not None,
    )
    classes = labels if targets is None else targets
    check_classes(target, inputs, classes)
    return Judge(target, Region(inputs, radius, norm, bounds), classes)


def unsolved(best: Points) -> Tensor:
    """Return the rows that do not evade; waits for the device."""
    return (~best.evading).nonzero()[:, 0]


def call_attack(
    attack: Callable[..., Tensor],
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *arguments: Tensor,
    **options: object,
) -> Tensor:
    """Run an attack and refuse what it returns if it is not like its inputs.

    Raises:
        ValueError: If the points have another shape, dtype or device.
    """
    with torch.enable_grad():  # an attack that is not of this package may rely on it
        points = attack(model, inputs, *arguments, **options)
    described = []
    for tensor in (inputs, points):
        shape = tuple(getattr(tensor, "shape", ()))
        described.append((shape, getattr(tensor, "dtype", None), getattr(tensor, "device", None)))
    if described[0] != described[1]:
        raise ValueError(
            f"an attack must return points like its inputs, {described[0]}, got {described[1]}"
        )
    return points.detach()
