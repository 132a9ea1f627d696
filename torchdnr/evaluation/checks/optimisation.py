"""Did the attacks return their best points, were they done, and would longer ones evade more?"""

from typing import Any

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.pgd import pgd
from torchdnr.evaluation.checks.context import (
    Context,
    evades_at,
    missed_evasions,
    share_status,
)
from torchdnr.evaluation.checks.recording import Recorded, record
from torchdnr.evaluation.checks.result import Finding

NOT_CONVERGED = 0.05  # fall of the accuracy, by longer attacks, above which the check fails
MORE = 2  # times the steps, and number of restarts, of the longer attack
WALK = 300  # steps of the longer boundary walk: the default 100 and the cycle after it


def _recordings(context: Context) -> dict[str, list[Recorded]]:
    """Run each attack of the line-up on a few samples, one by one, and record what it evaluates."""
    if "recordings" not in context.cache:
        samples = context.rows if len(context.rows) else context.first
        rows = samples[: context.options["recorded"]].tolist()
        context.cache["recordings"] = {
            name: [record(context, attack, row) for row in rows]
            for name, attack in context.attacks.items()
        }
    return context.cache["recordings"]


def check_silent_success(context: Context) -> Finding:
    """Count samples for which an attack saw a success that it did not return.

    All points that an attack shows to the model are recorded, one sample at a time. One such
    sample fails.

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

    By more than 5 % of the whole descent of the margin for an attack at a given eps that failed;
    by more than 5 % of the norm for a minimum-norm attack.

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

    PGD on the "decision" objective with ``MORE`` times the steps and as many restarts, from the
    stored points and from accepted samples of other classes, and a boundary walk of ``WALK``
    steps. Any new evasion warns; it fails if the accuracy falls by more than ``NOT_CONVERGED``.

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
