"""The model under attack with its objective: values and directions of descent at points."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.directions import unit
from torchdnr.attacks.objectives import NEGATIVE_IF_SUCCESSFUL, ObjectiveFunction
from torchdnr.decisions import split_scores, succeeds


class Target(NamedTuple):
    """A model with the objective to minimise on it.

    Attributes:
        model: Maps inputs ``(n, ...)`` to ``(n, c)``, or ``(n, c + 1)`` with theta last.
        objective: Maps scores, threshold and labels to ``(n,)``.
        reject: Whether the model returns theta.
        batch_size: Rows in one forward.
        targeted: Whether the classes given with the points are targets, not the true ones.
    """

    model: Callable[[Tensor], Tensor]
    objective: ObjectiveFunction
    reject: bool
    batch_size: int
    targeted: bool = False


@torch.no_grad()
def evaluate(target: Target, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the objective, without gradient and in chunks.

    Args:
        target: Model and objective.
        points: ``(n, ...)``.
        labels: True classes, or targets, ``(n,)``.

    Returns:
        Objective ``(n,)``, infinite where it is NaN, and which points succeed, bool ``(n,)``.

    Raises:
        ValueError: If the output is not ``(n, c)``, or ``(n, c + 1)`` for a rejecting model.
    """
    values, evading = [], []
    size = target.batch_size
    for chunk, chunk_labels in zip(points.split(size), labels.split(size), strict=True):
        output = target.model(chunk)
        values.append(_objective(target, output, chunk_labels))
        evading.append(succeeds(output, chunk_labels, target.reject, target.targeted))
    return _worst_if_nan(torch.cat(values)), torch.cat(evading)


class Slope(NamedTuple):
    """Objective and direction of descent at each point, from one forward and backward.

    Attributes:
        direction: Of steepest descent, of unit l2 norm, ``(n, ...)``; zero where the gradient is
            zero or NaN.
        values: Objective, infinite where it is NaN, ``(n,)``.
        evading: Whether the point succeeds, bool ``(n,)``.
        length: l2 norm of the gradient, ``(n,)``.
    """

    direction: Tensor
    values: Tensor
    evading: Tensor
    length: Tensor


def slope_at(target: Target, points: Tensor, labels: Tensor) -> Slope:
    """Evaluate objective, success and gradient of each point, in chunks.

    The gradient of an RBF score vanishes far from the support vectors, so its direction counts and
    its length does not; very short or long ones are scaled by their largest entry before squaring.

    Args:
        target: Model and objective.
        points: ``(n, ...)``.
        labels: True classes, or targets, ``(n,)``.

    Returns:
        ``Slope``.

    Raises:
        ValueError: If no gradient leads from the output to the input.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    size = target.batch_size
    for chunk, chunk_labels in zip(points.split(size), labels.split(size), strict=True):
        with torch.enable_grad():
            chunk = chunk.detach().requires_grad_()
            output = target.model(chunk)
            value = _objective(target, output, chunk_labels)
            descent = input_gradient(-value, chunk)
        value = value.detach()
        if target.objective in NEGATIVE_IF_SUCCESSFUL:
            evading = value < 0
        else:
            evading = succeeds(output.detach(), chunk_labels, target.reject, target.targeted)
        direction, length = unit(descent)
        parts.append((direction, _worst_if_nan(value), evading, length))
    if len(parts) == 1:
        return Slope(*parts[0])
    return Slope(*map(torch.cat, zip(*parts, strict=True)))


def input_gradient(value: Tensor, points: Tensor, *, retain: bool = False) -> Tensor:
    """Differentiate a value per row by the points.

    Raises:
        ValueError: If no gradient leads from the value to the points.
    """
    gradient = None
    if value.requires_grad:
        gradient = torch.autograd.grad(value.sum(), points, allow_unused=True, retain_graph=retain)[
            0
        ]
    if gradient is None:
        raise ValueError(
            "model must be differentiable, got an output without gradient; remove "
            "no_grad, detach and numpy between its input and its scores"
        )
    return gradient


def check_classes(target: Target, inputs: Tensor, labels: Tensor) -> None:
    """Refuse a model output, or labels, that do not fit; evaluates the first input.

    Raises:
        ValueError: If the output is not ``(n, c)``, or ``(n, c + 1)`` for a rejecting model, with
            c >= 2, or a label is not below c.
    """
    with torch.no_grad():
        output = target.model(inputs[:1])
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


def _objective(target: Target, output: Tensor, labels: Tensor) -> Tensor:
    return target.objective(*split_scores(output, target.reject), labels, target.targeted)


def _worst_if_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
