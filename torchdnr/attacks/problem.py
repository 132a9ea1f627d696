"""One call of an attack: its arguments are checked, and its model is in evaluation mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.arrays import as_features, as_labels
from torchdnr.attacks.checks import (
    check_count,
    check_eps,
    check_like,
    check_pool,
    check_targets,
    checked_inputs,
)
from torchdnr.attacks.objectives import ObjectiveFunction, decision_objective
from torchdnr.attacks.options import Options
from torchdnr.attacks.projections import Region, project
from torchdnr.attacks.target import Points, Target, check_classes, evaluate, keep_better
from torchdnr.decisions import evaluation_mode, has_reject_column


class Problem(NamedTuple):
    """What is attacked, and with which options."""

    target: Target
    region: Region
    labels: Tensor  # true classes, or targets, (n,)
    options: Options

    def rows(self, rows: Tensor) -> "Problem":
        """Return some rows, with their targets and their start."""
        given = self.options.targets, self.options.start
        targets, start = (tensor if tensor is None else tensor[rows] for tensor in given)
        options = replace(self.options, targets=targets, start=start)
        return Problem(self.target, self.region.rows(rows), self.labels[rows], options)

    def points(self, points: Tensor) -> Points:
        """Project points on ball and box, and evaluate them."""
        return evaluate(self.target, project(points, *self.region), self.labels)

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
    for name in {"targets", "init_labels"} & converted.keys():
        converted[name] = as_labels(name, converted[name], inputs.device)
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
