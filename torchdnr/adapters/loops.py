"""Attacks of other libraries, run so that only accepted and wrong points count."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdnr.adapters.views import for_label, for_target
from torchdnr.attacks.checks import checked_inputs
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.starts import lengths
from torchdnr.attacks.target import Target, check_classes, evaluate, put
from torchdnr.decisions import evaluation_mode, has_reject_column
from torchdnr.resources import default_batch_size

ForeignAttack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``attack(view, inputs, classes) -> points``: the view returns logits, all classes are equal."""


def attack_per_label(
    attack: ForeignAttack,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
) -> Tensor:
    """Run an untargeted attack once per class, on the view in which argmax tells evasion.

    Args:
        attack: Called as ``attack(view, inputs, labels)`` with the inputs of one class, on
            ``for_label(model, y)``; returns points like the inputs.
        model: Returns ``(n, c)``, or ``(n, c + 1)`` with the threshold in the last column. In
            evaluation mode while it is attacked, and then in its mode again.
        inputs: ``(n, ...)`` in ``bounds``.
        labels: True classes, int64 ``(n,)``.
        bounds: Smallest and largest value of an input.
        reject: Whether the last column is the threshold; ``None`` asks ``model.reject_index``.

    Returns:
        Points in the order of the inputs; ``torchdnr.attacks.evades`` tells which succeed.

    Raises:
        ValueError: If an argument is not as described, or the attack returns other shapes.
    """
    target, _, inputs, labels = _checked(model, inputs, labels, bounds, reject, 1)
    points = inputs.clone()
    with evaluation_mode(model):
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            view = for_label(model, label, reject=target.reject)
            points[rows] = _points(attack(view, inputs[rows], labels[rows]), inputs[rows])
    return points


def attack_all_targets(
    attack: ForeignAttack,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: float = 2,
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Run a targeted attack once per wrong class, and keep the best point of each input.

    Args:
        attack: Called as ``attack(view, inputs, targets)`` with all inputs of other classes, on
            ``for_target(model, t)``, every target being t; returns points like the inputs.
        model: Returns ``(n, c)``, or ``(n, c + 1)`` with the threshold in the last column. In
            evaluation mode while it is attacked, and then in its mode again.
        inputs: ``(n, ...)`` in ``bounds``.
        labels: True classes, int64 ``(n,)``.
        norm: Norm by which evading points are compared: 1, 2 or infinity.
        bounds: Smallest and largest value of an input.
        reject: Whether the last column is the threshold; ``None`` asks ``model.reject_index``.
        batch_size: Rows in one forward when points are compared; None: as many as suits their size.

    Returns:
        The evading point of smallest norm. Where none evades, that of the lowest "decision"
        objective, the input itself among them. An input that evades is returned as it is.

    Raises:
        ValueError: If an argument is not as described, or the attack returns other shapes.
    """
    target, classes, inputs, labels = _checked(model, inputs, labels, bounds, reject, batch_size)
    with evaluation_mode(model):
        best = evaluate(target, inputs, labels).clone()
        done = best.evading.clone()
        sizes = torch.zeros_like(best.values)
        for wanted in range(classes):
            rows = ((labels != wanted) & ~done).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            view = for_target(model, wanted, reject=target.reject)
            returned = attack(view, inputs[rows], torch.full_like(labels[rows], wanted))
            new = evaluate(target, _points(returned, inputs[rows]), labels[rows])
            old = best.rows(rows)
            new_sizes = lengths(new.inputs, inputs[rows], norm).to(sizes)
            nearer = ~old.evading | (new_sizes < sizes[rows])
            lower = ~old.evading & (new.values < old.values)
            chosen = torch.where(new.evading, nearer, lower)
            put(best, rows, new, chosen)
            sizes[rows] = torch.where(chosen, new_sizes, sizes[rows])
    return best.inputs


def _checked(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    bounds: tuple[float, float],
    reject: bool | None,
    batch_size: int | None,
) -> tuple[Target, int, Tensor, Tensor]:
    """Check the arguments; return the model with the objective to compare by, and its classes.

    The inputs and labels follow, converted to tensors.
    """
    inputs, labels = checked_inputs(inputs, labels, 2, bounds, model)
    batch_size = default_batch_size(inputs) if batch_size is None else batch_size
    target = Target(model, decision_objective, has_reject_column(model, reject), batch_size)
    with evaluation_mode(model):
        return target, check_classes(target, inputs, labels), inputs, labels


def _points(returned: object, inputs: Tensor) -> Tensor:
    """Check what an attack returned, and bring it to the dtype and device of the inputs."""
    if not isinstance(returned, Tensor) or returned.shape != inputs.shape:
        kind = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise ValueError(
            f"attack must return a tensor like its inputs, {tuple(inputs.shape)}, got {kind}; "
            "choose from what the library returns, or convert, within the function"
        )
    return returned.detach().to(inputs)
