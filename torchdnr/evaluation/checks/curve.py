"""Is the curve that of its points, does it fall to chance, and could it be as high as it is?"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.pgd import pgd
from torchdnr.decisions import accepted, is_evasion, predict_labels, split_scores
from torchdnr.evaluation.checks.context import Context, evades_at
from torchdnr.evaluation.checks.result import CannotRun, Finding
from torchdnr.evaluation.curve import Predictions, SecurityCurve
from torchdnr.evaluation.judging import in_ball, in_box, outputs
from torchdnr.evaluation.metrics import wilson_interval
from torchdnr.resources import in_float64

_ROUNDING = 1e-4  # of the spread of the scores: a margin below it may turn with the hardware
FAR_ABOVE = 0.1  # how far the lower end of the interval may exceed the reference at eps / 2


def check_monotone(context: Context) -> Finding:
    """Look for samples evaded at one eps and not at a larger one.

    Source: Carlini et al., "On evaluating adversarial robustness" (success grows with eps).
    """
    worst = _recovered(context.curve)
    alone = {name: _recovered(curve) for name, curve in context.curve.attacks.items()}
    guilty = ", ".join(f"{name}: {count}" for name, count in alone.items() if count)
    message = f"{worst} of {len(context.labels)} samples are evaded at one eps and not at a larger"
    message += " one in the worst case" + (f", in one attack alone: {guilty}." if guilty else ".")
    return Finding(
        "fail" if worst else "warn" if guilty else "pass",
        {"samples": len(context.labels), "worst_case": worst, "attacks": sum(alone.values())},
        message,
        "Start each attack from its points at the smaller eps.",
    )


def _recovered(curve: Predictions) -> int:
    """Count the samples evaded at one eps and not at a larger one."""
    evading = is_evasion(curve.predictions, curve.labels)
    before = evading.cummax(dim=0).values if len(evading) else evading
    return int((before & ~evading).any(dim=0).sum())


def check_stored_points(context: Context) -> Finding:
    """Measure the stored points and evaluate the model on them again, in the same batch size.

    A decision that only rounding can have turned warns.

    Source: Carlini et al., "On evaluating adversarial robustness"; the evaluation of the
    self-study tutorials of the same authors measures the norms again.
    """
    curve = context.curve
    if curve.adversarial is None:
        raise CannotRun(
            "the curve holds no points, as after loading it",
            "Check the curve that security_evaluation returned.",
        )
    size = int(curve.settings.get("batch_size", context.batch_size))
    outside = out_of_box = changed = by_rounding = 0
    for eps, points, stored in zip(curve.eps, curve.adversarial, curve.predictions, strict=True):
        points = points.to(context.inputs)
        outside += int((~in_ball(context, points, eps)).sum())
        out_of_box += int((~in_box(context, points)).sum())
        output = outputs(context.model, points, size)
        turned = predict_labels(output, context.reject) != stored.to(output.device)
        close = _close_call(context, output)
        changed += int((turned & ~close).sum())
        by_rounding += int((turned & close).sum())
    total = curve.predictions.numel()
    bad = outside + out_of_box + changed
    message = (
        f"Of {total} stored points {outside} lie outside their ball, {out_of_box} outside the box, "
        f"and {changed + by_rounding} are decided otherwise than stored, {by_rounding} of them by "
        "rounding."
    )
    counts = {
        "points": total,
        "outside_ball": outside,
        "outside_box": out_of_box,
        "decision_changed": changed,
        "decision_changed_by_rounding": by_rounding,
    }
    advice = (
        "Check that model, bounds, norm and inputs are those of the evaluation, and that the model "
        "is not random."
    )
    return Finding("fail" if bad else "warn" if by_rounding else "pass", counts, message, advice)


def _close_call(context: Context, output: Tensor) -> Tensor:
    """Tell which decisions rounding may turn, bool ``(n,)``."""
    scores, threshold = split_scores(output, context.reject)
    best = scores.topk(2, dim=1).values
    gap = best[:, 0] - best[:, 1]
    if threshold is not None:
        # a rejected sample stays rejected whichever class is ahead
        to_threshold = (best[:, 0] - threshold).abs()
        gap = torch.where(
            accepted(best[:, 0], threshold), torch.minimum(gap, to_threshold), to_threshold
        )
    margin = decision_objective(scores, threshold, context.labels).abs()
    spread = output.amax(dim=1) - output.amin(dim=1)
    return torch.minimum(gap, margin) <= _ROUNDING * spread


class _Unbounded(NamedTuple):
    """What attacks evade without a bound."""

    samples: int  # those evaded at whatever eps, and those of the others that are attacked here
    evaded: int
    accuracy: float  # share of all samples that is not evaded


def _unbounded(context: Context) -> _Unbounded:
    """Attack without a bound what the evaluation never evaded.

    Its minimum-norm attacks had none, and have failed there; the others get the whole box.
    """
    if context.mask is not None:
        raise CannotRun("within a mask the samples of other classes are out of reach")
    if "unbounded" not in context.cache:
        never = (~context.curve.evasion_norm.isfinite()).nonzero()[:, 0]
        tried = left = never[: context.options["samples"]].to(context.inputs.device)
        for attack in context.attacks.values():
            if not attack.minimum_norm and len(left):
                points = context.run(attack, left, eps=context.diameter)
                left = left[~evades_at(context, points, left, math.inf)]
        total, missed = len(context.labels), len(never) * len(left) / max(1, len(tried))
        samples = total - len(never) + len(tried)
        context.cache["unbounded"] = _Unbounded(samples, samples - len(left), missed / total)
    return context.cache["unbounded"]


def check_unbounded(context: Context) -> Finding:
    """Attack with no bound but the box: every sample has to be evaded.

    The samples of the other classes are within reach, so that a correct attack cannot fail. Few
    evaded by PGD from the input alone mean that gradients lead nowhere, and that all depends on
    starts.

    Source: Pintor et al., "Indicators of attack failure" (unconstrained attack failure); Carlini
    et al., "On evaluating adversarial robustness" (unbounded attacks reach 100 %).
    """
    total, count, _ = _unbounded(context)
    rows, steps = context.first, context.options["steps"]
    points = context.attack(pgd, rows, eps=context.diameter, steps=steps, until_evasion=True)
    alone = int(evades_at(context, points, rows, math.inf).sum())
    return Finding(
        "pass" if count == total else "fail",
        {"samples": total, "evaded": count, "evaded_from_the_input": alone},
        f"Without a bound the attacks evaded {count} of {total} samples, and PGD from the input "
        f"alone {alone} of {len(rows)}.",
        "The attacks are broken or blind: mend them before you believe any accuracy at a bounded "
        "eps.",
    )


def check_chance(context: Context) -> Finding:
    """Look whether the curve goes on until the accuracy is that of guessing, 1 / c.

    If only the curve ends too early, and attacks without a bound do get there, it warns.

    Source: Athalye et al., "Obfuscated gradients give a false sense of security"; the security
    curve of the Adversarial Robustness Toolbox flags the same.
    """
    with torch.no_grad():
        columns = context.model(context.inputs[:1]).shape[1]
    chance = 1 / (columns - context.reject)
    accuracy, largest = context.curve.accuracy[-1], context.curve.eps[-1]
    counts = {"largest_eps": largest, "accuracy": accuracy, "chance": chance}
    message = (
        f"At the largest eps, {largest:g}, the accuracy is {100 * accuracy:.1f} %, and "
        f"guessing has {100 * chance:.1f} %"
    )
    if accuracy <= chance:
        return Finding("pass", counts, message + ".")
    left = _unbounded(context).accuracy
    counts["accuracy_without_bound"] = left
    message += f"; without a bound {100 * left:.1f} % are left."
    if left > chance or largest >= context.diameter:
        advice = "Gradients are masked: use attacks that start at accepted samples of other classes"
        return Finding("fail", counts, message, advice + ", or need no gradient.")
    return Finding("warn", counts, message, "Evaluate at larger eps too.")


def check_half_eps(context: Context) -> Finding:
    """Compare the robust accuracy at eps with that of a classifier without rejection at eps / 2.

    A detector robust at eps implies a classifier, if a slow one, that is robust at eps / 2. The
    reference is best that of the most robust classifier known; otherwise the surrogate is attacked.
    It never fails: to be better than all before proves no error.

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
    output = outputs(context.model, context.inputs, context.batch_size)
    right = predict_labels(output, context.reject).cpu() == curve.labels
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
        halves = {eps: [at for at in given if math.isclose(at, eps / 2)] for eps in wanted}
        known = {eps: given[at[-1]] for eps, at in halves.items() if at}
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
    options: dict[str, Any] = {"steps": context.options["steps"], "until_evasion": True}
    points = context.attack(pgd, rows, model=context.surrogate, eps=eps / 2, **options)
    output = outputs(context.surrogate, points, context.batch_size)
    right = predict_labels(output, False) == context.labels[rows]
    return {eps: in_float64(right).mean().item()}, "the surrogate"
