"""Every point that an attack shows to the model while it attacks one sample."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.view import ModelView
from torchdnr.decisions import evades, split_scores
from torchdnr.evaluation.checks.context import Context
from torchdnr.evaluation.line_up import Attack


class Recorder:
    """What a ``ModelView`` is shown: margin, norm and success of all points.

    An attack may be any function, but all that it learns of the model goes through here: a point in
    the ball that evades was within its reach, whatever it returned.

    Args:
        context: What is checked.
        row: The attacked sample.
    """

    def __init__(self, context: Context, row: int) -> None:
        self._context = context
        self._center = context.inputs[row : row + 1]
        self._label = context.labels[row : row + 1]
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Record the points of one forward; return the output."""
        self._seen.append(self._measure(inputs.detach(), output.detach()))
        return output

    def _measure(self, points: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self._context.bounds
        labels, reject = self._label.expand(len(points)), self._context.reject
        margin = decision_objective(*split_scores(output, reject), labels)
        moved = (points.double() - self._center.double()).flatten(1)
        norm = torch.linalg.vector_norm(moved, self._context.norm, dim=1)
        in_box = ((points >= low) & (points <= high)).flatten(1).all(dim=1)
        return margin.double(), norm.masked_fill(~in_box, math.inf), evades(output, labels, reject)

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return margin, norm (infinite outside the box) and success, in order, each ``(k,)``."""
        margin, norm, success = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        return margin, norm, success


class Recorded(NamedTuple):
    """One attack on one sample.

    Attributes:
        succeeded: Whether what it returned evades within eps; of a minimum-norm attack, at all.
        silent: Whether it saw a success that it did not return: within eps, or nearer.
        falling: Whether its best value still fell at the end.
        stuck: Whether its best value never fell.
    """

    succeeded: bool
    silent: bool
    falling: bool
    stuck: bool


LAST = 0.1
"""Share of the forwards that counts as the end of an attack."""
STILL_FALLING = 0.05
"""Share of the whole descent, or of the final norm, that it may fall at the end."""
NEARER = 0.01
"""Share of its norm by which a success has to be nearer than the one returned to count."""


def record(context: Context, attack: Attack, row: int) -> Recorded:
    """Attack one sample alone, from the clean input, and grade all points that were evaluated."""
    recorder = Recorder(context, row)
    model = ModelView(context.model, recorder)
    if (smoothed := getattr(context.model, "smoothed", None)) is not None:
        model.__dict__["smoothed"] = smoothed  # not recorded: it is the model that has to be evaded
    inputs, labels = context.inputs[row : row + 1], context.labels[row : row + 1]
    eps = math.inf if attack.minimum_norm else context.eps
    points = attack.run(model, inputs, labels, eps, inputs)
    margin, norm, success = recorder.seen()
    with torch.no_grad():
        model(points)
    _, (returned,), (succeeded,) = (part[len(margin) :] for part in recorder.seen())
    if attack.minimum_norm:
        values = norm.masked_fill(~success, math.inf)
        succeeded = succeeded & returned.isfinite()
        silent = values.amin() < (returned * (1 - NEARER) if succeeded else math.inf)
    else:
        inside = norm <= context.eps
        values = margin.masked_fill(~inside, math.inf)
        succeeded = succeeded & (returned <= context.eps * (1 + 1e-5) + 1e-6)
        silent = (success & inside).any() & ~succeeded
    falling, stuck = _end_of(values, relative_to_last=attack.minimum_norm)
    return Recorded(bool(succeeded), bool(silent), falling, stuck)


def _end_of(values: Tensor, *, relative_to_last: bool) -> tuple[bool, bool]:
    """Tell whether the best value so far still fell at the end, and whether it never fell."""
    values = values[values.isfinite()]
    if len(values) == 0:
        return False, True
    best = values.cummin(dim=0).values
    before = max(0, len(best) - 1 - math.ceil(LAST * len(best)))
    whole, end = best[0] - best[-1], best[before] - best[-1]
    scale = best[-1] if relative_to_last else whole
    return bool(end > STILL_FALLING * scale), bool(whole <= 0)
