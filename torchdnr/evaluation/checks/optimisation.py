"""Did the attacks return their best points, were they done, and would longer ones evade more?"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.projections import rows_of
from torchdnr.attacks.view import ModelView
from torchdnr.decisions import evades, method_of, split_scores
from torchdnr.evaluation.checks.context import Context, evades_at, missed_evasions, share_status
from torchdnr.evaluation.checks.result import Finding
from torchdnr.evaluation.line_up import Attack

NOT_CONVERGED = 0.05  # fall of the accuracy, by longer attacks, above which the check fails
MORE = 2  # times the steps, and number of restarts, of the longer attack
WALK = 300  # steps of the longer boundary walk: the default 100 and the cycle after it
LAST = 0.1  # share of the forwards that counts as the end of an attack
STILL_FALLING = 0.05  # share of the whole descent, or of the final norm, allowed at the end
ON_LEVEL = 1e-2  # of a level: how far a point that rounding puts on it may be off
NEARER = 0.01  # share of its norm by which a success has to be nearer than the one returned


class _Recorded(NamedTuple):
    """One attack on one sample."""

    succeeded: bool  # what it returned evades within eps; of a minimum-norm attack, at all
    silent: bool  # it saw a success that it did not return: within eps, or nearer
    falling: bool  # its best value still fell at the end
    stuck: bool  # its best value never fell


def check_silent_success(context: Context) -> Finding:
    """Count runs, one sample each, in which an attack saw a success that it did not return.

    Source: Pintor et al., "Indicators of attack failure" (silent success).
    """
    recordings = _recordings(context)
    silent = {name: sum(run.silent for run in runs) for name, runs in recordings.items()}
    total, count = sum(map(len, recordings.values())), sum(silent.values())
    guilty = ", ".join(name for name, number in silent.items() if number)
    message = f"In {count} of {total} runs an attack returned less than the best point it evaluated"
    return Finding(
        "fail" if count else "pass",
        {"runs": total, "silent": count},
        message + (f" ({guilty})." if count else "."),
        "Let the attack return the best point it evaluated, not the last one.",
    )


def check_incomplete(context: Context) -> Finding:
    """Count runs whose best value still fell in the last tenth of the forwards.

    The value is the margin of an attack at a given eps that failed, or the least norm.

    Source: Pintor et al., "Indicators of attack failure" (incomplete optimisation).
    """
    counted = [
        (name, run)
        for name, runs in _recordings(context).items()
        for run in runs
        if context.attacks[name].minimum_norm or not run.succeeded
    ]
    total, stuck = len(counted), sum(run.stuck for _, run in counted)
    falling = sum(run.falling for _, run in counted)
    guilty = dict.fromkeys(name for name, run in counted if run.falling)
    message = (
        f"In {falling} of {total} runs without success, or for the least norm, the best value "
        "still fell at the end"
    )
    message += f" ({', '.join(guilty)})" if guilty else ""
    message += f"; in {stuck} it never fell." if stuck else "."
    counts = {"runs": total, "falling": falling, "stuck": stuck}
    return Finding(share_status(falling, total), counts, message, "Give the attack more steps.")


def check_converged(context: Context) -> Finding:
    """Attack what the evaluation did not evade for longer and from more starts.

    PGD goes on from the stored points, and both it and the walk from samples of other classes.

    Source: Carlini et al., "On evaluating adversarial robustness", 2019 (verify convergence).
    """
    rows = context.unevaded()
    starts: dict[str, Any] = {"init_inputs": context.pool, "init_labels": context.pool_labels}
    steps = MORE * context.options["steps"]
    start = context.points[rows]
    points = context.attack(pgd, rows, steps=steps, restarts=MORE, start=start, **starts)
    evaded = evades_at(context, points, rows)
    left = (~evaded).nonzero()[:, 0]
    if len(left):
        points = context.attack(boundary_walk, rows[left], steps=WALK, **starts)
        evaded = evaded.index_copy(0, left, evades_at(context, points, rows[left]))
    advice = "Evaluate again with more steps, restarts and a larger pool of starts."
    attack = "Longer attacks from more starts"
    return missed_evasions(context, attack, evaded, advice, NOT_CONVERGED)


def _recordings(context: Context) -> dict[str, list[_Recorded]]:
    """Run each attack of the line-up on a few samples, one by one, and record what it evaluates."""
    if "recordings" not in context.cache:
        samples = context.rows if len(context.rows) else context.first
        rows = samples[: context.options["recorded"]].tolist()
        context.cache["recordings"] = {
            name: [_record(context, attack, row) for row in rows]
            for name, attack in context.attacks.items()
        }
    return context.cache["recordings"]


def _record(context: Context, attack: Attack, row: int) -> _Recorded:
    """Attack one sample alone, from the clean input, and grade all points that were evaluated."""
    recorder = _Recorder(context, row)
    model = ModelView(context.model, recorder)
    if (smoothed := method_of(context.model, "smoothed")) is not None:
        model.__dict__["smoothed"] = smoothed  # not recorded: it is the model that has to be evaded
    inputs, labels = context.inputs[row : row + 1], context.labels[row : row + 1]
    eps = math.inf if attack.minimum_norm else context.eps
    given = context.given(torch.tensor([row], device=inputs.device))
    points = attack.run(model, inputs, labels, eps, inputs, **given)
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
    return _Recorded(bool(succeeded), bool(silent), falling, stuck)


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


class _Recorder:
    """What a ``ModelView`` is shown: margin, norm and success of all points, for one sample.

    An attack may be any function, but all that it learns of the model goes through here: a point in
    the ball that evades was within its reach, whatever it returned.
    """

    def __init__(self, context: Context, row: int) -> None:
        self._context = context
        self._center = context.inputs[row : row + 1]
        self._label = context.labels[row : row + 1]
        self._box = rows_of(context.box, slice(row, row + 1))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Record the points of one forward; return the output."""
        points, seen = inputs.detach(), output.detach()
        labels, reject = self._label.expand(len(points)), self._context.reject
        margin = decision_objective(*split_scores(seen, reject), labels).double()
        moved = (points.double() - self._center.double()).flatten(1)
        norm = torch.linalg.vector_norm(moved, self._context.norm, dim=1)
        norm = norm.masked_fill(~self._allowed(points), math.inf)
        self._seen.append((margin, norm, evades(seen, labels, reject)))
        return output

    def _allowed(self, points: Tensor) -> Tensor:
        """Tell which points are within bounds and mask, and on levels if any, bool ``(n,)``."""
        low, high = self._box
        allowed = (points >= low) & (points <= high)
        if self._context.levels is not None:
            level = (points - self._context.bounds[0]) * (self._context.levels - 1)
            level = level / self._context.width
            allowed &= (level - level.round()).abs() < ON_LEVEL
        return allowed.flatten(1).all(dim=1)

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return margin, norm (infinite outside the box) and success, in order, each ``(k,)``."""
        margin, norm, success = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        return margin, norm, success
