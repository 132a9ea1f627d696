"""One call of an attack: its arguments are checked, and its model is in evaluation mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.arrays import as_features, as_labels
from torchdnr.attacks.checks import (
    as_targets,
    check_count,
    check_eps,
    check_levels,
    check_like,
    check_mask,
    check_pool,
    check_targets,
    checked_inputs,
)
from torchdnr.attacks.levels import best_on_levels, round_to_levels
from torchdnr.attacks.objectives import ObjectiveFunction, decision_objective
from torchdnr.attacks.options import Options
from torchdnr.attacks.projections import Region, masked_bounds, project
from torchdnr.attacks.target import Points, Target, check_classes, evaluate, keep_better
from torchdnr.decisions import evaluation_mode, has_reject_column
from torchdnr.resources import default_batch_size


class Problem(NamedTuple):
    """What is attacked, and with which options."""

    target: Target
    region: Region
    labels: Tensor  # true classes, or targets, (n,)
    options: Options

    def rows(self, rows: Tensor) -> "Problem":
        """Return some rows, with their targets, their start and their mask."""
        given = {name: getattr(self.options, name) for name in ("targets", "start", "mask")}
        some: Any = {name: one[rows] for name, one in given.items() if isinstance(one, Tensor)}
        options = replace(self.options, **some)
        return Problem(self.target, self.region.rows(rows), self.labels[rows], options)

    def inside(self, points: Tensor) -> Tensor:
        """Move points into ball and box, and on levels where there are any."""
        _, region, _, options = self
        if options.levels is None:
            return project(points, *region)
        return round_to_levels(points, region, options.bounds, options.levels)

    def points(self, points: Tensor) -> Points:
        """Move points inside, and evaluate them."""
        return evaluate(self.target, self.inside(points), self.labels)

    def on_levels(self, points: Tensor) -> Tensor:
        """Move points on levels, if there are any, such that they still evade if possible."""
        target, region, labels, options = self
        if options.levels is None:
            return points
        return best_on_levels(target, region, labels, points, options.bounds, options.levels)

    def best_given(self) -> Points:
        """Return the better of the input and the given start of each row, to be written into."""
        best = self.points(self.region.center)
        if self.options.start is not None:
            best = keep_better(best, self.points(self.options.start))
        return best.clone()


def _converted(options: Options, inputs: Tensor) -> Options:
    """Convert the arrays among the options to tensors that go with the inputs."""
    converted: dict[str, Any] = {
        name: value for name, value in vars(options).items() if value is not None
    }
    for name in {"start", "init_inputs"} & converted.keys():
        converted[name] = as_features(name, converted[name], inputs)
    if "init_labels" in converted:
        converted["init_labels"] = as_labels("init_labels", converted["init_labels"], inputs.device)
    if "targets" in converted:
        converted["targets"] = as_targets(converted["targets"], inputs.device)
    return replace(options, **converted)


@contextmanager
def problem(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    options: Options,
    objective: ObjectiveFunction = decision_objective,
) -> Iterator[Problem]:
    """Check the arguments of an attack, and put the model into evaluation mode while it runs.

    Yields the problem, with gradients off. All errors in arguments are ValueErrors raised here, or
    a TypeError for what holds no numbers.
    """
    inputs, labels = checked_inputs(inputs, labels, options.norm, options.bounds, model)
    options = _converted(options, inputs)
    check_count("restarts", options.restarts, 0)
    given = options.batch_size
    batch_size = default_batch_size(inputs) if given is None else given
    check_count("batch_size", batch_size, 1)
    check_levels(options.levels, inputs, options.bounds)
    targets = check_targets(options.targets, labels)
    options = replace(options, mask=check_mask(options.mask, inputs), batch_size=batch_size)
    if options.start is not None:
        check_like("start", options.start, inputs, same_length=True)
    if options.init_inputs is not None:
        check_pool(options.init_inputs, options.init_labels, inputs, options.bounds)
    radius, classes = check_eps(eps, inputs), labels
    if targets is not None:
        radius, classes = torch.where(targets == labels, 0, radius), targets
    bounds = masked_bounds(inputs, options.bounds, options.mask)
    region = Region(inputs, radius, options.norm, bounds).within_reach()
    reject = has_reject_column(model, options.reject)
    target = Target(model, objective, reject, batch_size, targets is not None)
    with evaluation_mode(model), torch.no_grad():
        check_classes(target, inputs, classes)
        yield Problem(target, region, classes, options)
