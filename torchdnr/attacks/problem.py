"""One call of an attack: its arguments are checked, and its model is in evaluation mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.checks import (
    check_count,
    check_eps,
    check_inputs,
    check_like,
    check_pool,
    check_targets,
)
from torchdnr.attacks.objectives import ObjectiveFunction, decision_objective
from torchdnr.attacks.options import Options
from torchdnr.attacks.points import Points, better, evaluated, keep_better, put
from torchdnr.attacks.projections import Region, project
from torchdnr.attacks.target import Target, check_classes
from torchdnr.decisions import evaluation_mode, has_reject_column


class Problem(NamedTuple):
    """What is attacked, and with which options.

    Attributes:
        target: Model and objective.
        region: Ball and box of each row.
        labels: True classes, or targets, ``(n,)``.
        options: The shared options.
    """

    target: Target
    region: Region
    labels: Tensor
    options: Options

    def points(self, points: Tensor, rows: Tensor | None = None) -> Points:
        """Project points on the ball and the box, and evaluate them.

        Args:
            points: ``(n, ...)``, or one for each of ``rows``.
            rows: Rows that they belong to; None: all.

        Returns:
            Points, evaluated.
        """
        region, labels = self.region, self.labels
        if rows is not None:
            region, labels = region.rows(rows), labels[rows]
        return evaluated(self.target, project(points, *region), labels)

    def best_given(self) -> Points:
        """Return the better of the input and the given start of each row, to be written into."""
        best = self.points(self.region.center)
        if self.options.start is not None:
            best = keep_better(best, self.points(self.options.start))
        return best.clone()

    def improve(self, best: Points, points: Tensor, rows: Tensor) -> Tensor:
        """Write points that are better than the best of their rows into it; return which are."""
        new = self.points(points, rows)
        improved = better(new, best.rows(rows))
        put(best, rows, new, improved)
        return improved


@contextmanager
def problem(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    options: Options,
    objective: ObjectiveFunction = decision_objective,
) -> Iterator[Problem]:
    """Check what an attack is given, and put the model into evaluation mode while it is attacked.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        options: The shared options.
        objective: What the attack minimises.

    Yields:
        The problem; gradients are off.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
    """
    check_inputs(inputs, labels, options.norm, options.bounds)
    check_count("restarts", options.restarts, 0)
    check_count("batch_size", options.batch_size, 1)
    check_targets(options.targets, labels)
    if options.start is not None:
        check_like("start", options.start, inputs, same_length=True)
    if options.init_inputs is not None:
        check_pool(options.init_inputs, options.init_labels, inputs, options.bounds)
    region = Region(inputs, check_eps(eps, inputs), options.norm, options.bounds)
    reject = has_reject_column(model, options.reject)
    targeted = options.targets is not None
    target = Target(model, objective, reject, options.batch_size, targeted)
    classes = labels if options.targets is None else options.targets
    with evaluation_mode(model), torch.no_grad():
        check_classes(target, inputs, classes)
        yield Problem(target, region, classes, options)


def passed_on(options: Options) -> dict[str, Any]:
    """Return the shared options that every member of a composed attack is given alike."""
    return {"norm": options.norm, "bounds": options.bounds, "batch_size": options.batch_size}


def call_member(
    attack: Callable[..., Tensor],
    problem: Problem,
    labels: Tensor,
    rows: Tensor,
    options: Mapping[str, Any],
    *,
    targets: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """Run an attack, one of those that another attack is made of, on some rows.

    Labels, targets and start are those of all rows; the points are one for each of ``rows``.

    Raises:
        ValueError: If the points are not like the inputs.
    """
    target, region = problem.target, problem.region.rows(rows)
    same = {**options, **passed_on(problem.options), "reject": target.reject}
    same["targets"] = None if targets is None else targets[rows]
    same["start"] = None if start is None else start[rows]
    return call_attack(attack, target.model, region.center, labels[rows], region.eps, **same)


def call_attack(
    attack: Callable[..., Tensor],
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *arguments: Tensor,
    **options: Any,  # noqa: ANN401 - options of any attack
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
