"""Did the attacks return what they found, were they done, and would longer ones find more?"""

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.pgd import pgd
from torchdnr.evaluation.checks.context import Context, drop_status, evades_at, share_status
from torchdnr.evaluation.checks.recording import Recorded, record
from torchdnr.evaluation.checks.result import Check

SILENT_SUCCESS = "silent success"
INCOMPLETE = "incomplete optimisation"
CONVERGED = "converged"

NOT_CONVERGED = 0.05
"""Fall of the accuracy, by longer attacks with restarts, above which the check fails."""
MORE = 2
"""Times the steps, and number of restarts, of the longer attack."""
WALK = 300
"""Steps of the longer boundary walk: the default 100 and the cycle after it."""


def _recordings(context: Context) -> dict[str, list[Recorded]]:
    """Run each attack of the line-up on a few samples, one by one, and look over its shoulder."""
    if "recordings" not in context.cache:
        rows = context.rows if len(context.rows) else context.first
        rows = rows[: context.options["recorded"]].tolist()
        context.cache["recordings"] = {
            name: [record(context, attack, row) for row in rows]
            for name, attack in context.attacks.items()
        }
    return context.cache["recordings"]


def check_silent_success(context: Context) -> Check:
    """Count samples for which an attack saw a success that it did not return.

    All points that an attack shows to the model are watched, one sample at a time. One such
    sample fails.

    Source: Pintor et al., "Indicators of attack failure" (silent success).
    """
    found = _recordings(context)
    silent = {name: sum(run.silent for run in runs) for name, runs in found.items()}
    total, count = sum(map(len, found.values())), sum(silent.values())
    guilty = ", ".join(name for name, number in silent.items() if number)
    message = f"In {count} of {total} runs an attack returned less than the best point it evaluated"
    return Check(
        SILENT_SUCCESS,
        "fail" if count else "pass",
        {"runs": total, "silent": count},
        message + (f" ({guilty})." if count else "."),
        "Let the attack return the best point it evaluated, not the last one." if count else "",
    )


def check_incomplete(context: Context) -> Check:
    """Count runs whose best value still fell in the last tenth of the forwards.

    By more than 5 % of the whole descent of the margin for an attack at a given eps that failed;
    by more than 5 % of the norm for a minimum-norm attack. Warns from a tenth of the runs on,
    fails from half of them on.

    Source: Pintor et al., "Indicators of attack failure" (incomplete optimisation).
    """
    falling = stuck = total = 0
    guilty = []
    for name, runs in _recordings(context).items():
        counted = [run for run in runs if context.attacks[name].minimum_norm or not run.succeeded]
        total += len(counted)
        stuck += sum(run.stuck for run in counted)
        number = sum(run.falling for run in counted)
        falling += number
        guilty += [name] * bool(number)
    message = (
        f"In {falling} of {total} runs without success, or for the least norm, the best value "
        "still fell at the end"
    )
    message += f" ({', '.join(guilty)})" if guilty else ""
    message += f"; in {stuck} it never fell." if stuck else "."
    return Check(
        INCOMPLETE,
        share_status(falling, total),
        {"runs": total, "falling": falling, "stuck": stuck},
        message,
        "Give the attack more steps." if falling else "",
    )


def check_converged(context: Context) -> Check:
    """Attack what the evaluation did not evade for longer and from more starts.

    PGD on the "decision" objective with ``MORE`` times the steps and as many restarts, from the
    stored points and from accepted samples of other classes, and a boundary walk of ``WALK``
    steps. Any new evasion warns; it fails if the accuracy falls by more than ``NOT_CONVERGED``.

    Source: Carlini et al., "On evaluating adversarial robustness", 2019 (verify convergence).
    """
    rows = context.unevaded()
    starts = {"init_inputs": context.pool, "init_labels": context.pool_labels}
    points = context.attack(
        pgd,
        rows,
        steps=MORE * context.options["steps"],
        restarts=MORE,
        start=context.points[rows],
        **starts,
    )
    found = evades_at(context, points, rows)
    left = (~found).nonzero()[:, 0]
    if len(left):
        points = context.attack(boundary_walk, rows[left], steps=WALK, **starts)
        found = found.index_copy(0, left, evades_at(context, points, rows[left]))
    count = int(found.sum())
    status, drop = drop_status(context, count, len(rows), NOT_CONVERGED)
    message = (
        f"Longer attacks from more starts evaded {count} of {len(rows)} samples that the "
        f"evaluation did not evade at eps = {context.eps:g}"
    )
    message += f": its accuracy is too high by about {100 * drop:.1f} points." if count else "."
    counts = {"samples": len(rows), "evaded": count, "accuracy_drop": drop}
    advice = "Evaluate again with more steps, restarts and a larger pool of starts."
    return Check(CONVERGED, status, counts, message, advice if count else "")
