"""Would the accuracy of this detector imply a classifier better than any that is known?"""

import math
from collections.abc import Mapping

from torchdnr.attacks.pgd import pgd
from torchdnr.decisions import is_evasion, predict_labels
from torchdnr.evaluation.checks.context import Context
from torchdnr.evaluation.checks.result import CannotRun, Finding
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.metrics import wilson_interval

FAR_ABOVE = 0.1
"""How far the lower end of the detector's interval may exceed the reference at eps / 2."""


def check_half_eps(context: Context) -> Finding:
    """Compare the robust accuracy at eps with that of a classifier without rejection at eps / 2.

    A detector robust at eps implies a classifier, if a slow one, that is robust at eps / 2. Robust
    is a sample whose clean input is accepted and right and that is not evaded. The reference is
    the one given, best that of the most robust classifier known; otherwise the surrogate is
    attacked at eps / 2. Warns if the lower end of the 95 % interval is above the reference by more
    than ``FAR_ABOVE`` at any eps. It never fails: to be better than all before proves no error.

    Raises:
        CannotRun: If there is neither a reference nor a surrogate.

    Source: Tramer, "Detecting adversarial examples is (nearly) as hard as classifying them",
    ICML 2022.
    """
    if not context.reject:
        raise CannotRun("the model does not reject")
    robust, n = _robust_accuracy(context), len(context.labels)
    reference, kind = _reference(context, [eps for eps in robust if eps > 0])
    excess = {eps: wilson_interval(robust[eps], n)[0] - best for eps, best in reference.items()}
    at = max(excess, key=lambda eps: excess[eps])
    counts = {
        "eps": at,
        "robust_accuracy": robust[at],
        "reference_at_half_eps": reference[at],
        "excess": excess[at],
    }
    return Finding(
        "warn" if excess[at] > FAR_ABOVE else "pass",
        counts,
        f"At eps = {at:g} the robust accuracy is {100 * robust[at]:.1f} %, and that of {kind} at "
        f"{at / 2:g} is {100 * reference[at]:.1f} %.",
        "An accuracy so far above the reference calls for stronger attacks before it is believed.",
    )


def _robust_accuracy(context: Context) -> dict[float, float]:
    """Return per eps the share accepted and right without attack, and not evaded."""
    curve = context.curve
    right = context.clean.cpu() == curve.labels
    evading = is_evasion(curve.predictions, curve.labels)
    return {
        eps: (right & ~row).double().mean().item()
        for eps, row in zip(curve.eps, evading, strict=True)
    }


def _reference(context: Context, wanted: list[float]) -> tuple[dict[float, float], str]:
    """Return per eps the robust accuracy of the reference at eps / 2, and what it is."""
    given = context.reference
    if isinstance(given, SecurityCurve):
        right = given.evasion_norm > 0
        known = {
            eps: (right & (given.evasion_norm > eps / 2)).double().mean().item() for eps in wanted
        }
        return known, given.name or "the reference"
    if isinstance(given, Mapping):
        known = {
            eps: rate
            for eps in wanted
            for half, rate in given.items()
            if math.isclose(half, eps / 2)
        }
        if not known:
            raise CannotRun(
                f"the reference has no eps that is half of one of the curve, {wanted}",
                "Give the robust accuracy of the reference at half of some eps of the curve.",
            )
        return known, "the reference"
    if context.surrogate is None:
        raise CannotRun(
            "there is no reference and no surrogate",
            "Pass reference: the robust accuracy of the best classifier known, by eps.",
        )
    rows, eps = context.first, context.eps
    points = context.attack(
        pgd, rows, model=context.surrogate, eps=eps / 2, steps=context.options["steps"]
    )
    output = outputs(context.surrogate, points, context.batch_size)
    right = predict_labels(output, False) == context.labels[rows]
    return {eps: right.double().mean().item()}, "the surrogate"
