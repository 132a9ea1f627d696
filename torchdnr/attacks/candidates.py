"""Points found by other attacks, judged on the model under attack."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_targets
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.points import Points, Region, evaluated
from torchdnr.attacks.projections import project
from torchdnr.attacks.target import Target, check_classes, has_reject_column


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
