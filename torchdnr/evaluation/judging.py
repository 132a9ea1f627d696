"""What becomes of points under attack: inside the ball or not, accepted, wrong, by which margin."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.projections import project
from torchdnr.decisions import is_evasion, predict_labels, split_scores

TOLERANCE = 1e-5  # of float32 arithmetic, relative to the larger of eps and 1


@dataclass(frozen=True, eq=False)
class Task:
    """What is attacked, and within which bounds.

    Attributes:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or with ``reject`` ``(n, c + 1)``.
        inputs: Clean inputs, ``(n, ...)``.
        labels: True labels, ``(n,)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch when points are judged.
        reject: Whether the last column of the output is theta.
    """

    model: Callable[[Tensor], Tensor]
    inputs: Tensor
    labels: Tensor
    norm: float
    bounds: tuple[float, float]
    batch_size: int
    reject: bool


class Judged(NamedTuple):
    """Points with what the model says of them, one entry per sample.

    Attributes:
        points: Perturbed inputs, on the CPU, ``(n, ...)``.
        predictions: Labels or ``REJECT``, ``(n,)``.
        margin: max(s_y, theta) - max_{j != y} s_j, ``(n,)``; negative only if evaded.
        size: Norm of the perturbation in float64, ``(n,)``.
    """

    points: Tensor
    predictions: Tensor
    margin: Tensor
    size: Tensor


def outputs(model: Callable[[Tensor], Tensor], points: Tensor, batch_size: int) -> Tensor:
    """Run the model without gradients in batches of a fixed size: rounding depends on it.

    Raises:
        ValueError: If an output is NaN: no decision can be taken on it.
    """
    with torch.no_grad():
        output = torch.cat([model(part) for part in points.split(batch_size)])
    broken = output.flatten(1).isnan().any(dim=1)
    if broken.any():
        raise ValueError(
            f"the model returned NaN for {int(broken.sum())} of {len(points)} samples, the first "
            f"is number {int(broken.nonzero()[0])}: check its weights and its normalisation"
        )
    return output


def judge(task: Task, points: Tensor) -> Judged:
    """Evaluate the model on points, whatever an attack said of them."""
    output = outputs(task.model, points, task.batch_size)
    margin = decision_objective(*split_scores(output, task.reject), task.labels)
    predictions = predict_labels(output, task.reject)
    return Judged(points.cpu(), predictions, margin, norms(task, points))


def norms(task: Task, points: Tensor) -> Tensor:
    """Compute the norm of each perturbation in float64, ``(n,)``."""
    pairs = zip(points.split(task.batch_size), task.inputs.split(task.batch_size), strict=True)
    return torch.cat(
        [
            torch.linalg.vector_norm((new.double() - old.double()).flatten(1), task.norm, dim=1)
            for new, old in pairs
        ]
    )


def worse(task: Task, first: Judged, second: Judged) -> Judged:
    """Take per sample the point that is worse for the classifier; ``first`` if they are equal.

    A point that evades is worse than one that does not, then the lower margin decides.
    """
    one, two = (
        is_evasion(first.predictions, task.labels),
        is_evasion(second.predictions, task.labels),
    )
    take = (two & ~one) | ((two == one) & (second.margin < first.margin))
    return Judged(
        *(
            torch.where(take.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)
            for old, new in zip(first, second, strict=True)
        )
    )


def in_box(task: Task, points: Tensor) -> Tensor:
    """Tell which points respect the bounds of an input, bool ``(n,)``."""
    low, high = task.bounds
    return ((points >= low - TOLERANCE) & (points <= high + TOLERANCE)).flatten(1).all(dim=1)


def keep_inside(task: Task, points: Tensor, eps: float, name: str) -> tuple[Tensor, int]:
    """Verify that an attack kept to the ball and the box, and project back what left them.

    Args:
        task: What is attacked.
        points: Points returned by the attack, ``(n, ...)``.
        eps: Radius of the ball.
        name: Name of the attack, for the warning.

    Returns:
        Points inside, and how many were outside. If any was, a warning tells it.
    """
    outside = norms(task, points) > eps + TOLERANCE * max(1.0, eps)
    outside = outside | ~in_box(task, points)
    count = int(outside.sum())
    if count:
        warnings.warn(
            f"{name} at eps = {eps:g}: {count} of {len(points)} points left the ball or the box "
            "and were projected back; the attack does not keep to its constraints",
            stacklevel=3,
        )
        inside = project(points, task.inputs, eps, task.norm, task.bounds)
        points = torch.where(outside.view(-1, *[1] * (points.ndim - 1)), inside, points)
    return points, count


@dataclass
class Count:
    """Input rows sent through a model.

    Attributes:
        forwards: Rows sent forwards.
        backwards: Rows sent back.
    """

    forwards: int = 0
    backwards: int = 0


class CountedModel(nn.Module):
    """A model that counts the input rows sent forwards and backwards through it.

    Whatever else the model has can be reached through it. A smoothed view of the model, if it has
    any (``model.smoothed(factor)``), counts into the same numbers.

    Args:
        model: Module or callable; a module is left as it is.
        count: Where to count; None: from zero.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], count: Count | None = None) -> None:
        super().__init__()
        self.model = model
        self.reject_index = getattr(model, "reject_index", None)
        self.training = False
        self.count = Count() if count is None else count

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output of the model."""
        self.count.forwards += len(inputs)
        output = self.model(inputs)
        if output.requires_grad:
            output.register_hook(partial(self._count_backwards, len(inputs)))
        return output

    @property
    def forwards(self) -> int:
        """Input rows sent forwards so far."""
        return self.count.forwards

    @property
    def backwards(self) -> int:
        """Input rows sent back so far."""
        return self.count.backwards

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the model has
        try:
            return super().__getattr__(name)  # parameters, buffers and submodules
        except AttributeError:
            submodules = self.__dict__.get("_modules", {})  # none yet while it is being copied
            if "model" not in submodules and "model" not in self.__dict__:
                raise
            found = getattr(self.model, name)
        if name == "smoothed":
            return lambda *args, **options: CountedModel(found(*args, **options), self.count)
        return found

    def _count_backwards(self, rows: int, _: Tensor) -> None:
        self.count.backwards += rows
