"""Did the attacks return their best points, were they done, and would longer ones evade more?"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.projections import rows_of
from torchdnr.attacks.starts import assigned_classes
from torchdnr.attacks.view import ModelView
from torchdnr.decisions import evades, method_of, split_scores
from torchdnr.evaluation.checks.context import Context, evades_at, missed_evasions, share_status
from torchdnr.evaluation.checks.result import Finding
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.line_up import Attack
from torchdnr.resources import in_float64

NOT_CONVERGED = 0.05  # fall of the accuracy, by longer attacks, above which the check fails
MORE = 4  # times the steps of the longer attack
STARTS = 5  # of the walk, the nearest evading point known among them
NEIGHBOURS = 20  # of which the walk chooses its starts
LAST = 0.1  # share of the forwards of a run that counts as its end
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

    With restarts it is the last tenth of the last run. The value is the margin of an attack at a
    given eps that failed, or the least norm.

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
    """Attack what the evaluation did not evade for longer.

    PGD goes on from the stored points. Both it and the walk start also from the nearest evading
    points of the evaluation, which lie farther than eps, and from samples of other classes.

    Source: Carlini et al., "On evaluating adversarial robustness", 2019 (verify convergence).
    """
    rows = context.unevaded()
    samples, classes = context.pool, context.classes(context.pool)
    if context.curve.nearest is not None:
        nearest = context.curve.nearest.to(context.inputs)[rows]
        samples = torch.cat([samples, nearest])
        classes = torch.cat([classes, assigned_classes(context.target(), nearest)])
    starts: dict[str, Any] = {"init_inputs": samples, "init_labels": classes}
    longer = {"steps": MORE * context.options["steps"], "until_evasion": True, **starts}
    points = context.attack(pgd, rows, start=context.points[rows], **longer)
    evaded = evades_at(context, points, rows)
    left = (~evaded).nonzero()[:, 0]
    if len(left):
        starts |= {"neighbours": NEIGHBOURS, "starts": STARTS}
        points = context.attack(boundary_walk, rows[left], **starts)
        evaded = evaded.index_copy(0, left, evades_at(context, points, rows[left]))
    advice = "Evaluate again with more steps, restarts and a larger pool of starts."
    return missed_evasions(context, "Longer attacks", evaded, advice, NOT_CONVERGED)


def _recordings(context: Context) -> dict[str, list[_Recorded]]:
    """Run each attack of the line-up on a few samples and record what it evaluates."""
    if "recordings" not in context.cache:
        samples = context.rows if len(context.rows) else context.first
        groups = _apart(context, samples[: context.options["recorded"]])
        context.cache["recordings"] = {
            name: [run for rows in groups for run in _record(context, attack, rows)]
            for name, attack in context.attacks.items()
        }
    return context.cache["recordings"]


def _apart(context: Context, rows: Tensor) -> list[Tensor]:
    """Split samples into groups in which no two balls meet: a point is in reach of one alone."""
    points = context.inputs[rows].flatten(1).cpu()
    apart = torch.cdist(points, points, context.norm) > 2 * context.eps
    groups: list[list[int]] = []
    for place in range(len(rows)):
        fits = (group for group in groups if apart[place, group].all())
        group = next(fits, None)
        if group is None:
            groups.append(group := [])
        group.append(place)
    return [rows[torch.tensor(group)] for group in groups]


def _record(context: Context, attack: Attack, rows: Tensor) -> list[_Recorded]:
    """Attack samples from the clean inputs and grade, one by one, all points evaluated."""
    recorder = _Recorder(context, rows)
    model = ModelView(context.model, recorder)
    if (smoothed := method_of(context.model, "smoothed")) is not None:
        model.__dict__["smoothed"] = smoothed  # not recorded: it is the model that has to be evaded
    points = context.run(attack, rows, model=model)
    returned = recorder.grade(
        points, outputs(context.model, points, context.batch_size), torch.arange(len(rows))
    )
    parts = recorder.seen or [returned.of(-1)]  # none, where an attack never asks the model
    seen = _Seen(*map(torch.cat, zip(*parts, strict=True)))
    return [_graded(context, attack, seen.of(row), returned.of(row)) for row in range(len(rows))]


def _graded(context: Context, attack: Attack, seen: "_Seen", returned: "_Seen") -> _Recorded:
    """Compare what an attack evaluated for one sample with the point that it returned."""
    norm, succeeded = returned.norm.item(), bool(returned.success)
    if attack.minimum_norm:
        values = seen.norm.masked_fill(~seen.success, math.inf)
        succeeded = succeeded and norm < math.inf
        silent = bool((values < (norm * (1 - NEARER) if succeeded else math.inf)).any())
    else:
        inside = seen.norm <= context.eps
        values = seen.margin.masked_fill(~inside, math.inf)
        succeeded = succeeded and norm <= context.eps * (1 + 1e-5) + 1e-6
        silent = bool((seen.success & inside).any()) and not succeeded
    end = LAST / (1 + attack.settings.get("restarts", 0))  # of the last of its runs
    return _Recorded(succeeded, silent, *_end_of(values, end, attack.minimum_norm))


def _end_of(values: Tensor, end_share: float, relative_to_last: bool) -> tuple[bool, bool]:
    """Tell whether the best value so far still fell at the end, and whether it never fell."""
    values = values[values.isfinite()]
    if len(values) == 0:
        return False, True
    best = values.cummin(dim=0).values
    before = max(0, len(best) - 1 - math.ceil(end_share * len(best)))
    whole, end = best[0] - best[-1], best[before] - best[-1]
    scale = best[-1] if relative_to_last else whole
    return bool(end > STILL_FALLING * scale), bool(whole <= 0)


class _Seen(NamedTuple):
    """Points that were evaluated, in order, each of one of the samples."""

    owner: Tensor  # the sample, (k,)
    margin: Tensor  # max(s_y, theta) - max_{j != y} s_j, (k,)
    norm: Tensor  # infinite outside box, mask and levels, (k,)
    success: Tensor  # accepted and wrong, bool (k,)

    def of(self, owner: int) -> "_Seen":
        """Return those of one sample."""
        return _Seen(*(field[self.owner == owner] for field in self))


class _Recorder:
    """What a ``ModelView`` is shown: owner, margin, norm and success of all points.

    An attack may be any function, but all that it learns of the model goes through here: a point in
    the ball that evades was within its reach, whatever it returned. A point belongs to the nearest
    of the samples, in whose ball alone it can be.
    """

    def __init__(self, context: Context, rows: Tensor) -> None:
        self._context = context
        self._centers = in_float64(context.inputs[rows]).flatten(1)
        self._labels = context.labels[rows]
        self._box = rows_of(context.box, rows)
        self.seen: list[_Seen] = []

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Record the points of one forward; return the output."""
        self.seen.append(self.grade(inputs.detach(), output.detach()))
        return output

    def grade(self, points: Tensor, output: Tensor, owner: Tensor | None = None) -> _Seen:
        """Grade points by the output of the model on them; None: they belong to the nearest."""
        exact = "donot_use_mm_for_euclid_dist"
        flat, norm = in_float64(points).flatten(1), self._context.norm
        distances = torch.cdist(flat, self._centers, norm, compute_mode=exact)
        owner = distances.argmin(dim=1) if owner is None else owner.to(distances.device)
        distance, there = distances.gather(1, owner[:, None])[:, 0], owner.to(points.device)
        labels, reject = self._labels[there], self._context.reject
        margin = in_float64(decision_objective(*split_scores(output, reject), labels))
        success, allowed = evades(output, labels, reject), self._allowed(points, there)
        distance = distance.masked_fill(~allowed.to(distance.device), math.inf)
        return _Seen(owner, margin, distance, success.to(distance.device))

    def _allowed(self, points: Tensor, owner: Tensor) -> Tensor:
        """Tell which points are within bounds and mask, and on levels if any, bool ``(k,)``."""
        low, high = rows_of(self._box, owner)
        allowed = (points >= low) & (points <= high)
        if self._context.levels is not None:
            level = (points - self._context.bounds[0]) * (self._context.levels - 1)
            level = level / self._context.width
            allowed &= (level - level.round()).abs() < ON_LEVEL
        return allowed.flatten(1).all(dim=1)
