"""Attacks on the training of a classifier: points that are moved, and labels that are changed.

Both follow exact gradients of what a classifier does to validation inputs, through its fit. They
take the fit as a function, ``fit(inputs, labels, sample_weight)``, that returns a classifier as a
differentiable function of the inputs and weights: ``DNR.refitted`` is one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.directions import STEP_FADE, cosine, unit, without_blocked
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.projections import project_box
from torchdnr.decisions import has_reject_column, split_scores
from torchdnr.resources import progress_bar

Fit = Callable[[Tensor, Tensor, Tensor | None], Callable[[Tensor], Tensor]]
"""Fits on inputs ``(n, ...)``, labels and weights ``(n,)``; returns what maps inputs to scores."""

SCALE = 0.5
"""Of margins, in score units, where the logistic loss of one bends: that of an SVM is 1."""
TRIAL_WEIGHT = 1e-3
"""Weight of a sample that is on trial: so small that it moves nothing but its own derivative."""


class Poison(NamedTuple):
    """Training points that an attacker adds.

    Attributes:
        inputs: ``(k, ...)``.
        labels: As they were given, int64 ``(k,)``.
        losses: Validation loss with the points as they were at each step, ``(steps + 1,)``.
    """

    inputs: Tensor
    labels: Tensor
    losses: Tensor


def poison_inputs(
    fit: Fit,
    inputs: Tensor,
    labels: Tensor,
    points: Tensor,
    point_labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    steps: int = 20,
    step_size: float = 1.0,
    objective: str = "paper",
    bounds: tuple[float, float] = (0.0, 1.0),
    progress: bool = False,
) -> Poison:
    """Move points that are added to the training data so that the classifier fails afterwards.

    All points move together, by projected gradient ascent in the box: steps of unit l2 norm times a
    size that falls along half a cosine. The points with the largest loss of all steps count.

    Args:
        fit: What trains, see ``Fit``.
        inputs: Clean training inputs, ``(n, ...)``.
        labels: Theirs, int64 ``(n,)``.
        points: Where the points start, ``(k, ...)``, samples of another class than their label.
        point_labels: Labels that they are given, int64 ``(k,)``; they stay.
        validation: Inputs of the attacker's own, ``(m, ...)``, that shall go wrong. To make later
            evasion cheaper: points on the way to evasions, with ``objective="decision"``.
        validation_labels: Theirs, int64 ``(m,)``.
        steps: Fits with gradients.
        step_size: First step, in l2 norm.
        objective: What falls on the validation inputs, one of ``OBJECTIVES``: "paper", in which
            theta takes no part, counts errors; "decision" only errors that are accepted.
        bounds: Smallest and largest value of an input.
        progress: Whether to show a bar of the steps.

    Returns:
        The points, with the losses on the way.

    Raises:
        ValueError: If there is no objective of that name, or steps is below 1.

    Source: Biggio, Nelson and Laskov, "Poisoning attacks against support vector machines",
    ICML 2012, Algorithm 1; here of all points at once, and of any number of classes.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    loss_of = _ValidationLoss(fit, validation, validation_labels, objective)
    all_labels = torch.cat([labels, point_labels])
    points = points.detach().clone()
    best, losses = points, []
    for step in progress_bar(progress, range(steps + 1), desc="poisoning", leave=False):
        points.requires_grad_(step < steps)
        loss = loss_of(torch.cat([inputs, points]), all_labels, None)
        losses.append(loss.detach())
        if losses[-1] >= max(losses):
            best = points.detach()
        if step < steps:
            (gradient,) = torch.autograd.grad(loss, points)
            direction, _ = unit(without_blocked(gradient, points.detach(), bounds))
            size = cosine(step, steps, step_size, STEP_FADE * step_size)
            points = project_box(points.detach() + size * direction, bounds)
    return Poison(best, point_labels, torch.stack(losses))


def choose_points(
    fit: Fit,
    inputs: Tensor,
    labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    count: int,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    rounds: int = 5,
    objective: str = "paper",
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the points of a pool, and wrong labels, that harm a classifier most as training data.

    In each round every point of the pool is on trial under every wrong label, with next to no
    weight: what the validation loss gains to first order decides which are added.

    Args:
        fit: What trains, see ``Fit``.
        inputs: Clean training inputs, ``(n, ...)``.
        labels: Theirs, int64 ``(n,)``.
        pool: Other inputs, ``(m, ...)``.
        pool_labels: Their true classes, int64 ``(m,)``.
        count: How many are added.
        validation: Inputs of the attacker's own, ``(v, ...)``.
        validation_labels: Theirs, int64 ``(v,)``.
        rounds: Fits, each of which adds as many points.
        objective: As in ``poison_inputs``.
        num_classes: c; default: largest label + 1.

    Returns:
        Indices into the pool and the labels, int64 ``(count,)`` each.

    Raises:
        ValueError: If there is no objective of that name, or count is not in 0..m.

    Source: as ``flip_labels``.
    """
    _check_share(count, len(pool))
    c = int(labels.max()) + 1 if num_classes is None else num_classes
    loss_of = _ValidationLoss(fit, validation, validation_labels, objective)
    chosen, wrong = labels.new_zeros(0), labels.new_zeros(0)
    for size in _portions(count, rounds):
        known = torch.cat([inputs, pool[chosen]]), torch.cat([labels, wrong])
        others, gains, _ = _gains(loss_of, *known, pool, pool_labels, c)
        gains[chosen] = -torch.inf
        best, which = gains.max(dim=1)
        added = best.topk(size).indices
        chosen, wrong = torch.cat([chosen, added]), torch.cat([wrong, others[added, which[added]]])
    return chosen, wrong


def flip_labels(
    fit: Fit,
    inputs: Tensor,
    labels: Tensor,
    count: int,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    rounds: int = 5,
    objective: str = "paper",
    num_classes: int | None = None,
) -> Tensor:
    """Choose the labels whose change harms a classifier most, and change them.

    In each round every training input is on trial under every other label, with next to no weight:
    what the validation loss gains to first order if that replaces the true one decides which labels
    change, one for an input.

    Args:
        fit: What trains, see ``Fit``.
        inputs: Training inputs, ``(n, ...)``.
        labels: Theirs, int64 ``(n,)``.
        count: How many change.
        validation: Inputs of the attacker's own, ``(v, ...)``.
        validation_labels: Theirs, int64 ``(v,)``.
        rounds: Fits, each of which changes as many labels.
        objective: As in ``poison_inputs``.
        num_classes: c; default: largest label + 1.

    Returns:
        The labels, ``(n,)``, ``count`` of them changed.

    Raises:
        ValueError: If there is no objective of that name, or count is not in 0..n.

    Source: greedy by influence, after Xiao, Xiao and Eckert, "Adversarial label flips attack on
    support vector machines", ECAI 2012; Koh and Liang, "Understanding black-box predictions via
    influence functions", ICML 2017.
    """
    _check_share(count, len(labels))
    c = int(labels.max()) + 1 if num_classes is None else num_classes
    loss_of = _ValidationLoss(fit, validation, validation_labels, objective)
    flipped = labels.clone()
    for size in _portions(count, rounds):
        others, gains, of_present = _gains(loss_of, inputs, flipped, inputs, flipped, c)
        gains = (gains - of_present[:, None]).masked_fill((flipped != labels)[:, None], -torch.inf)
        best, which = gains.max(dim=1)
        changed = best.topk(size).indices
        flipped[changed] = others[changed, which[changed]]
    return flipped


def _check_share(count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"count must be in 0..{most}, got {count}")


def _portions(count: int, rounds: int) -> list[int]:
    """Split a count into rounds, less those that would be empty."""
    parts = [count * (i + 1) // rounds - count * i // rounds for i in range(rounds)]
    return [part for part in parts if part]


def _gains(
    loss_of: "_ValidationLoss",
    inputs: Tensor,
    labels: Tensor,
    candidates: Tensor,
    candidate_labels: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the loss by the weights of candidates under all labels but those they have.

    Returns the labels and the derivatives, ``(m, c - 1)``, and those by weights of the n inputs.
    """
    c = num_classes
    others = (candidate_labels[:, None] + torch.arange(1, c, device=labels.device)) % c
    weight = torch.ones(len(inputs) + others.numel(), dtype=torch.float64, device=labels.device)
    weight[len(inputs) :] = TRIAL_WEIGHT
    weight.requires_grad_()
    rows = torch.cat([inputs, candidates.repeat_interleave(c - 1, dim=0)])
    loss = loss_of(rows, torch.cat([labels, others.flatten()]), weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    return others, gradient[len(inputs) :].view_as(others), gradient[: len(inputs)]


class _ValidationLoss:
    """How wrong a classifier is on validation inputs, as a function of what it is fitted on."""

    def __init__(self, fit: Fit, inputs: Tensor, labels: Tensor, objective: str) -> None:
        self._fit, self._inputs, self._labels = fit, inputs, labels
        self._objective = find_objective(objective)

    def __call__(self, inputs: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        """Fit, and average the logistic loss of the objective."""
        model = self._fit(inputs, labels, weight)
        output = model(self._inputs)
        scores, threshold = split_scores(output, has_reject_column(model, None))
        margins = self._objective(scores, threshold, self._labels)
        return torch.nn.functional.softplus(-margins / SCALE).mean()
