"""Are the stored points in ball and box, decided as stored, and no weaker at a larger eps?"""

import torch
from torch import Tensor

from torchdnr.attacks.objectives import decision_objective
from torchdnr.decisions import accepted, is_evasion, predict_labels, split_scores
from torchdnr.evaluation.checks.context import Context
from torchdnr.evaluation.checks.result import CannotRun, Finding
from torchdnr.evaluation.curve import Predictions
from torchdnr.evaluation.judging import in_ball, in_box, outputs

_ROUNDING = 1e-4  # of the spread of the scores: a margin below it may turn with the hardware


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
