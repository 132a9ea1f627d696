"""The model under attack: objective, success and slope at points, and which points are better."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from torchdnr.attacks.directions import unit, without_blocked
from torchdnr.attacks.objectives import NEGATIVE_IF_SUCCESSFUL, ObjectiveFunction
from torchdnr.attacks.projections import (
    UNBOUNDED,
    Bounds,
    Region,
    per_row,
    project,
    rows_of,
)
from torchdnr.decisions import class_scores, split_scores, succeeds

Fields = TypeVar("Fields", "Points", "Slope")
ROUNDING = 16.0
"""Units in the last place by which two values of one objective may differ and count as equal."""


class Target(NamedTuple):
    """A model with the objective to minimise on it."""

    model: Callable[[Tensor], Tensor]  # from (n, ...) to (n, c), or (n, c + 1) with theta last
    objective: ObjectiveFunction
    reject: bool  # whether the model returns theta
    batch_size: int
    targeted: bool = False  # whether the classes given with points are targets, not the true ones

    def output(self, points: Tensor) -> Tensor:
        """Run the model on points ``(n, ...)``: ``(n, c)``, or ``(n, c + 1)`` with theta last."""
        return class_scores(self.model(points))


class Points(NamedTuple):
    """Points with their objective and success, one per row."""

    inputs: Tensor
    values: Tensor  # infinite where the objective is NaN
    evading: Tensor  # accepted and wrong, or accepted as the target

    def rows(self, rows: Tensor) -> "Points":
        """Return some rows."""
        return Points(*(field[rows] for field in self))

    def clone(self) -> "Points":
        """Return a copy that ``put`` can write into."""
        return Points(*(field.clone() for field in self))


@torch.no_grad()
def evaluate(target: Target, points: Tensor, labels: Tensor) -> Points:
    """Evaluate the objective without gradient, in chunks; it is infinite where it is NaN."""
    values, evading = [], []
    size = target.batch_size
    for chunk, chunk_labels in zip(points.split(size), labels.split(size), strict=True):
        output = target.output(chunk)
        values.append(_objective(target, output, chunk_labels))
        evading.append(succeeds(output, chunk_labels, target.reject, target.targeted))
    return Points(points, _worst_if_nan(torch.cat(values)), torch.cat(evading))


def better(new: Points, old: Points) -> Tensor:
    """Compare points: evading comes first, then the lower objective; True where ``new`` wins."""
    lower = (new.evading == old.evading) & (new.values < old.values)
    return (new.evading > old.evading) | lower


def best_column(values: Tensor, evading: Tensor) -> Tensor:
    """Find the best of k points per row, in the order of ``better``, ``(n,)`` from ``(n, k)``."""
    ranked = torch.where(evading == evading.any(dim=1, keepdim=True), values, torch.inf)
    return ranked.argmin(dim=1)


def choose(where: Tensor, new: Fields, old: Fields) -> Fields:
    """Combine points, or slopes: ``new`` where a mask ``(n,)`` is true, else ``old``."""
    pairs = zip(new, old, strict=True)
    return type(new)(*(torch.where(per_row(where, one), one, other) for one, other in pairs))


def keep_better(best: Points, new: Points) -> Points:
    """Keep the better of two points in each row, without waiting for the device."""
    return choose(better(new, best), new, best)


def keep_lower(best: Points, new: Points) -> Points:
    """Keep the point of the lower objective in each row, whether it evades or not."""
    return choose(new.values < best.values, new, best)


def put(points: Points, rows: Tensor, new: Points, where: Tensor) -> None:
    """Overwrite ``points[rows]`` by ``new`` where a mask is true, in place."""
    for field, values in zip(points, new, strict=True):  # no row twice: nothing waits
        field[rows] = torch.where(per_row(where, field), values, field[rows])


def unsolved(best: Points) -> Tensor:
    """Return the rows that do not evade; waits for the device."""
    return (~best.evading).nonzero()[:, 0]


def best_trials(
    target: Target,
    region: Region,
    labels: Tensor,
    make: Callable[[Tensor], Tensor],
    usable: Tensor,
) -> tuple[Points, Points, Tensor]:
    """Project and evaluate k trials of each row, in batches.

    ``make`` maps the rows of a batch to their trials, ``(k n, ...)``, those of a row together;
    ``usable`` says which count, bool ``(n, k)``, at least one per row. Returns the lowest and the
    best trial of each row, and which one the lowest is, int64 ``(n,)``.
    """
    count = usable.shape[1]
    low, good, columns = [], [], []
    every = torch.arange(len(labels), device=labels.device)
    for rows in every.split(max(1, target.batch_size // count)):
        repeated = rows.repeat_interleave(count)
        points = project(make(rows), *region.rows(repeated))
        tried = evaluate(target, points, labels[repeated])
        values = torch.where(usable[rows], tried.values.view(-1, count), torch.inf)
        evading = tried.evading.view(-1, count) & usable[rows]
        first = torch.arange(len(rows), device=labels.device) * count
        columns.append(_first_lowest(values))
        low.append(tried.rows(first + columns[-1]))
        good.append(tried.rows(first + best_column(values, evading)))
    lowest, best = (Points(*map(torch.cat, zip(*some, strict=True))) for some in (low, good))
    return lowest, best, torch.cat(columns)


def _first_lowest(values: Tensor) -> Tensor:
    """Return the first column of each row, ``(n, k)``, that is the lowest up to rounding, ``(n,)``.

    Steps of several sizes may end in one point. Which of them counts must not depend on the last
    digit, which changes with the size of the batch: later steps are measured by its size.
    """
    lowest = values.amin(dim=1, keepdim=True)
    near = lowest + ROUNDING * torch.finfo(values.dtype).eps * (1 + lowest.abs())
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.where(values <= near, columns, values.shape[1] - 1).amin(dim=1)


class Slope(NamedTuple):
    """Points with objective, success and direction of descent, from one forward and backward."""

    inputs: Tensor
    values: Tensor
    evading: Tensor
    direction: Tensor  # of unit l2 norm, (n, ...); zero where the gradient is zero or NaN
    length: Tensor  # l2 norm of the gradient, (n,)

    @property
    def points(self) -> Points:
        """The points alone."""
        return Points(self.inputs, self.values, self.evading)


def slope_at(target: Target, points: Tensor, labels: Tensor, bounds: Bounds = UNBOUNDED) -> Slope:
    """Evaluate objective, success and gradient of each point, in chunks.

    The gradient of an RBF score vanishes far from the support vectors, so its direction counts and
    its length does not; very short or long ones are scaled by their largest entry before squaring.
    Coordinates in which ``bounds`` let a point move no further downhill are zero in it: a step
    along them would be lost in the projection, and in l2 take up most of the length of the step.

    Source: for l1, Croce and Hein, "Mind the box", ICML 2021.
    """
    parts: list[tuple[Tensor, ...]] = []
    size = target.batch_size
    for begin in range(0, max(1, len(points)), size):  # none is one empty chunk
        chunk, chunk_labels = points[begin : begin + size], labels[begin : begin + size]
        with torch.enable_grad():
            chunk = chunk.detach().requires_grad_()
            output = target.output(chunk)
            value = _objective(target, output, chunk_labels)
            descent = input_gradient(-value, chunk)
        chunk, box = chunk.detach(), rows_of(bounds, slice(begin, begin + size))
        descent = without_blocked(descent, chunk, box)
        value = value.detach()
        if target.objective in NEGATIVE_IF_SUCCESSFUL:
            evading = value < 0
        else:
            evading = succeeds(output.detach(), chunk_labels, target.reject, target.targeted)
        parts.append((_worst_if_nan(value), evading, *unit(descent)))
    if len(parts) == 1:
        return Slope(points, *parts[0])
    return Slope(points, *map(torch.cat, zip(*parts, strict=True)))


def input_gradient(value: Tensor, points: Tensor, *, retain: bool = False) -> Tensor:
    """Differentiate a value per row by the points; ValueError if no gradient leads there."""
    gradient = None
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "gradients do not exist under torch.inference_mode, in which this was called: call it "
            "outside, with images that were made outside"
        )
    if value.requires_grad:
        total = value.sum()
        gradient = torch.autograd.grad(total, points, retain_graph=retain, allow_unused=True)[0]
    if gradient is None:
        raise ValueError(
            "model must be differentiable, got an output without gradient; remove "
            "no_grad, detach and numpy between its input and its scores"
        )
    return gradient


def check_classes(target: Target, inputs: Tensor, labels: Tensor) -> int:
    """Refuse a model output, or labels, that do not fit: ValueError; return the number of classes.

    It evaluates the first input.
    """
    with torch.no_grad():
        output = target.output(inputs[:1])
    expected = "(n, c + 1) with the threshold last" if target.reject else "(n, c)"
    if output.ndim != 2 or len(output) != 1 or output.shape[1] < 2 + target.reject:
        raise ValueError(
            f"model must return {expected} and c >= 2 for n inputs, "
            f"got {tuple(output.shape)} for n = 1"
        )
    classes = output.shape[1] - target.reject
    if labels.max() >= classes:
        raise ValueError(
            f"labels must be below the {classes} classes of the model, got {labels.max()}; "
            "if the last column of its output is the threshold pass reject=True, else reject=False"
        )
    return classes


def _objective(target: Target, output: Tensor, labels: Tensor) -> Tensor:
    return target.objective(*split_scores(output, target.reject), labels, target.targeted)


def _worst_if_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
