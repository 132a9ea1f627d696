"""What a model makes of points: outputs, decisions, and the worst case of each sample."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.checks import (
    as_targets,
    check_count,
    check_levels,
    check_mask,
    check_targets,
    checked_inputs,
)
from torchdnr.attacks.levels import round_to_levels
from torchdnr.attacks.minimum_norm import safe_decision_objective
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.projections import Bounds, Region, masked_bounds, project
from torchdnr.attacks.target import Target, check_classes
from torchdnr.attacks.view import ModelView
from torchdnr.decisions import (
    REJECT,
    accepted,
    class_scores,
    has_reject_column,
    is_success,
    predict_labels,
    split_scores,
)
from torchdnr.resources import default_batch_size, in_float64

TOLERANCE = 1e-5  # of float32 arithmetic, relative to the larger of eps and 1


def outputs(model: Callable[[Tensor], Tensor], points: Tensor, batch_size: int) -> Tensor:
    """Run the model without gradients, in batches of a fixed size, as rounding depends on it."""
    with torch.no_grad():
        output = torch.cat([class_scores(model(part)) for part in points.split(batch_size)])
    broken = output.flatten(1).isnan().any(dim=1)
    if broken.any():
        raise ValueError(
            f"the model returned NaN for {int(broken.sum())} of {len(points)} samples, the first "
            f"is number {int(broken.nonzero()[0])}: check its weights and its normalisation"
        )
    return output


class Decisions(NamedTuple):
    """Decisions of a classifier on points; the last dimension runs over the samples."""

    confidence: Tensor  # best score, (..., n)
    classes: Tensor  # class of the best score, whether accepted or not, int64 (..., n)
    accepted: Tensor  # whether the best score is above theta, bool (..., n)


def decide(output: Tensor, reject: bool, threshold: float | Tensor | None = None) -> Decisions:
    """Read the decisions from an output, ``(..., n, c)`` or ``(..., n, c + 1)`` with theta last.

    They are made at ``threshold``, by default that of the output; without any all is accepted.
    """
    scores, theta = split_scores(output, reject)
    if output.ndim < 2 or scores.shape[-1] < 2:
        columns = "(..., n, c + 1) with theta last" if reject else "(..., n, c)"
        raise ValueError(f"output must be {columns} and c >= 2, got {tuple(output.shape)}")
    if output.isnan().any():
        raise ValueError("output holds NaN, no decision can be read from it: check the model")
    confidence, classes = scores.max(dim=-1)
    if threshold is None:
        threshold = -torch.inf if theta is None else theta
    return Decisions(confidence, classes, accepted(confidence, threshold))


def worst_predictions(
    output: Tensor,
    labels: Tensor,
    reject: bool,
    threshold: float | Tensor | None = None,
    targets: int | Tensor | None = None,
) -> Tensor:
    """Predict labels ``(n,)`` in the worst case, by ``worst_of``, over outputs ``(k, n, ...)``."""
    decisions = decide(output, reject, threshold)
    scores, theta = split_scores(output.flatten(0, 1), reject)
    if threshold is not None:
        theta = torch.as_tensor(threshold).to(scores).expand(len(scores))
    classes = wanted_classes(labels, targets).repeat(len(output))
    margin = decision_objective(scores, theta, classes, targets is not None)
    predictions = torch.where(decisions.accepted, decisions.classes, REJECT)
    worst = worst_of(predictions, margin.view_as(decisions.confidence), labels, targets)
    return predictions.gather(0, worst[None])[0]


def worst_of(
    predictions: Tensor, margins: Tensor, labels: Tensor, targets: int | Tensor | None = None
) -> Tensor:
    """Choose per sample which of k points is worst for the classifier, int64 ``(n,)``.

    A point that evades is the worst, then that of the lowest margin, among equals the first. Both
    predictions and margins, max(s_y, theta) - max_{j != y} s_j, are ``(k, n)``. With targets only
    what is accepted as them counts.
    """
    evading = is_success(predictions, labels, targets)
    return torch.where(evading == evading.any(dim=0), margins, torch.inf).argmin(dim=0)


def wanted_classes(labels: Tensor, targets: int | Tensor | None) -> Tensor:
    """Return the classes that the margin is about, ``(n,)``: those wanted, else the true ones."""
    return labels if targets is None else torch.as_tensor(targets).to(labels).expand(len(labels))


def stacked(adversarial: Tensor, clean: Tensor) -> Tensor:
    """View what belongs to one attack, ``(n, ...)``, as the first of k attacks, ``(k, n, ...)``."""
    attacks = adversarial if adversarial.ndim == clean.ndim + 1 else adversarial[None]
    if attacks.shape[1:] != clean.shape or len(attacks) == 0:
        raise ValueError(
            f"adversarial must be like clean, {tuple(clean.shape)}, or k of these in one tensor "
            f"(k, ...), got {tuple(adversarial.shape)}"
        )
    return attacks


def check_labels(labels: Tensor, output: Tensor) -> None:
    """Refuse labels that are not one class per row of a clean output ``(n, ...)``."""
    if labels.shape != output.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        raise ValueError(
            f"labels must be int64 (n,) with n = {len(output)} >= 1 rows of clean, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )


def increasing(
    name: str, values: Sequence[float], where: str, allowed: Callable[[float], bool]
) -> list[float]:
    """Return numbers that increase and are allowed, as floats, and refuse others."""
    values = [float(value) for value in values]
    rising = all(one < two for one, two in pairwise(values))
    if not values or not rising or not all(map(allowed, values)):
        raise ValueError(f"{name} must be {where} and increasing, got {values}: sort them")
    return values


@dataclass(frozen=True, eq=False)
class Task:
    """What is attacked, and within which bounds."""

    model: Callable[[Tensor], Tensor]  # to scores (n, c), or with reject (n, c + 1)
    inputs: Tensor  # clean, (n, ...)
    labels: Tensor  # true, (n,)
    norm: float  # of the perturbation; 1, 2 or infinity
    bounds: tuple[float, float]  # smallest and largest value of an input
    batch_size: int  # inputs per batch when points are judged
    reject: bool  # whether the last column of the output is theta
    mask: Tensor | None = None  # what may change, bool (n, ...); None: everything
    targets: int | Tensor | None = None  # classes wanted, one for all or (n,); None: any wrong one
    levels: int | None = None  # that a pixel can have; None: any value

    def given(self, rows: Tensor) -> dict[str, Any]:
        """Return what attacks on some rows are told beside inputs, labels and eps, if anything."""
        given: dict[str, Any] = {}
        for name in ("mask", "targets", "levels"):
            value = getattr(self, name)
            if value is not None:
                given[name] = value[rows] if isinstance(value, Tensor) else value
        return given

    @property
    def about(self) -> dict[str, Any]:
        """What the results of a task depend on beside its eps and norm, in short."""
        masked, targeted = self.mask is not None, self.targets is not None
        return {"levels": self.levels, "masked": masked, "targeted": targeted}

    def part(self, rows: Tensor) -> "Task":
        """Return the task of some samples alone."""
        some: Any = {name: one[rows] for name, one in vars(self).items() if torch.is_tensor(one)}
        return replace(self, **some)

    @property
    def box(self) -> Bounds:
        """The bounds, of each coordinate where there is a mask."""
        return masked_bounds(self.inputs, self.bounds, self.mask)

    def region(self, eps: float | Tensor, rows: Tensor | None = None) -> Region:
        """Return ball and box of the samples, or of some of them; ``eps`` may be ``(n,)``."""
        radius = torch.zeros_like(self.inputs.flatten(1)[:, 0]) + eps
        whole = Region(self.inputs, radius, self.norm, self.box)
        return (whole if rows is None else whole.rows(rows)).within_reach()

    def inside(self, points: Tensor, eps: float | Tensor, rows: Tensor | None = None) -> Tensor:
        """Move points, of all samples or of some, into ball and box, and on levels if any."""
        region = self.region(eps, rows)
        if self.levels is None:
            return project(points, *region)
        return round_to_levels(points, region, self.bounds, self.levels)

    def succeeds(self, predictions: Tensor) -> Tensor:
        """Tell which samples are accepted and wrong, or accepted as the target, bool ``(n,)``.

        One that is of the target's class is no success.
        """
        return is_success(predictions, self.labels, self.targets)


def checked_task(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: float,
    bounds: tuple[float, float],
    batch_size: int | None,
    reject: bool | None,
    mask: Tensor | None,
    targets: int | Tensor | None,
    levels: int | None,
) -> Task:
    """Check what an evaluation is given, and build the task.

    Arrays are converted; ``batch_size`` None becomes one that suits the inputs, ``reject`` None
    what the model says. Anything that no attack can work with is a ValueError.
    """
    inputs, labels = checked_inputs(inputs, labels, norm, bounds, model)
    batch_size = default_batch_size(inputs) if batch_size is None else batch_size
    check_count("batch_size", batch_size, 1)
    targets = as_targets(targets, inputs.device)
    check_targets(targets, labels)
    check_levels(levels, inputs, bounds)
    rejects = has_reject_column(model, reject)
    given = check_mask(mask, inputs), targets, levels
    return Task(model, inputs, labels, norm, bounds, batch_size, rejects, *given)


def check_outputs(task: Task) -> None:
    """Refuse a model output that does not fit, and labels or targets that are no class of it."""
    target = Target(task.model, decision_objective, task.reject, task.batch_size)
    check_classes(target, task.inputs, task.labels)
    if task.targets is not None:
        check_classes(target, task.inputs, wanted_classes(task.labels, task.targets))


class Judged(NamedTuple):
    """Points and the decisions of the model on them, one entry per sample."""

    points: Tensor  # perturbed inputs, on the CPU, (n, ...)
    predictions: Tensor  # labels or REJECT, (n,)
    margin: Tensor  # max(s_y, theta) - max_{j != y} s_j, (n,); negative only if evaded
    size: Tensor  # norm of the perturbation in float64, (n,)
    safe: Tensor  # whether it evades by more than rounding, in any batch, bool (n,)


def judge(task: Task, points: Tensor) -> Judged:
    """Evaluate the model on points, whatever an attack has reported of them."""
    output = outputs(task.model, points, task.batch_size)
    scores = split_scores(output, task.reject)
    classes, targeted = wanted_classes(task.labels, task.targets), task.targets is not None
    margin = decision_objective(*scores, classes, targeted)
    predictions = predict_labels(output, task.reject)
    safe = task.succeeds(predictions) & (safe_decision_objective(*scores, classes, targeted) < 0)
    return Judged(points.cpu(), predictions, margin, norms(task, points), safe)


def norms(task: Task, points: Tensor) -> Tensor:
    """Compute the norm of each perturbation in float64, ``(n,)``; on the CPU if it has to be."""
    pairs = zip(points.split(task.batch_size), task.inputs.split(task.batch_size), strict=True)
    moved = ((in_float64(new) - in_float64(old)).flatten(1) for new, old in pairs)
    return torch.cat([torch.linalg.vector_norm(part, task.norm, dim=1) for part in moved])


def worse(task: Task, first: Judged, second: Judged) -> Judged:
    """Keep per sample the point that is worse for the classifier, by ``worst_of``."""
    predictions = torch.stack([first.predictions, second.predictions])
    margins = torch.stack([first.margin, second.margin])
    replaced = worst_of(predictions, margins, task.labels, task.targets) == 1
    return Judged(
        *(
            torch.where(replaced.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)
            for old, new in zip(first, second, strict=True)
        )
    )


def checked_points(points: Tensor, inputs: Tensor, name: str) -> Tensor:
    """Detach the finite points that an attack returned, in the dtype of its inputs."""
    if points.shape != inputs.shape or not points.isfinite().all():
        raise ValueError(
            f"{name} must return finite points like inputs, {tuple(inputs.shape)}, "
            f"got {tuple(points.shape)} or NaN"
        )
    return points.detach().to(inputs)


def in_ball(task: Task, points: Tensor, eps: float | Tensor) -> Tensor:
    """Tell which points lie within ``eps`` of their inputs, up to rounding, bool ``(n,)``."""
    size = norms(task, points)
    limit = torch.as_tensor(eps).to(size)
    near = size <= limit + TOLERANCE * limit.clamp_min(1)  # false for NaN
    return near.to(points.device)


def in_box(task: Task, points: Tensor) -> Tensor:
    """Tell which points respect the bounds of an input, bool ``(n,)``."""
    low, high = task.box
    return ((points >= low - TOLERANCE) & (points <= high + TOLERANCE)).flatten(1).all(dim=1)


def keep_inside(task: Task, points: Tensor, eps: float | Tensor, name: str) -> tuple[Tensor, int]:
    """Project back, with a warning, what left the ball or the box, and count it.

    The warning calls the attack ``name``.
    """
    outside = ~(in_ball(task, points, eps) & in_box(task, points))
    count = int(outside.sum())
    if count:
        where = "below the norms found" if isinstance(eps, Tensor) else f"at eps = {eps:g}"
        warnings.warn(
            f"{name} {where}: {count} of {len(points)} points left the ball or the box "
            "and were projected back; the attack does not keep to its constraints",
            stacklevel=3,
        )
        inside = task.inside(points, eps)
        points = torch.where(outside.view(-1, *[1] * (points.ndim - 1)), inside, points)
    return points, count


class CountedModel(ModelView):
    """A model that counts the input rows sent ``forwards`` and ``backwards`` through it.

    Each time ``on_passes``, if any, is called with how many more of both there are.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        on_passes: Callable[[int, int], object] | None = None,
    ) -> None:
        super().__init__(model, self._count)
        self.on_passes = on_passes
        self.forwards = self.backwards = 0

    def _count(self, inputs: Tensor, output: Tensor) -> Tensor:
        self.forwards += len(inputs)
        if self.on_passes is not None:
            self.on_passes(len(inputs), 0)
        if output.requires_grad:
            output.register_hook(partial(self._count_backwards, len(inputs)))
        return output

    def _count_backwards(self, rows: int, _: Tensor) -> None:
        self.backwards += rows
        if self.on_passes is not None:
            self.on_passes(0, rows)
