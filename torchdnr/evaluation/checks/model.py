"""Has the model what attacks rely on: a gradient that is true, and scores that stay the same?"""

import torch
from torch import Tensor

from torchdnr.attacks.objectives import ObjectiveFunction
from torchdnr.attacks.projections import project_box
from torchdnr.attacks.target import Target, evaluate, input_gradient, slope_at
from torchdnr.decisions import predict_labels, split_scores
from torchdnr.evaluation.checks.context import Context, share_status, uniform_like
from torchdnr.evaluation.checks.result import CannotRun, Finding
from torchdnr.evaluation.judging import outputs

TINY = 1e-12  # length of a gradient below which it counts as vanished
SHARE_VANISHED = 0.1  # share of vanished gradients above which the check fails; any at all warns
MASKED = (
    "Gradient attacks cannot see this model: attack a differentiable approximation of it (backward "
    "pass of the identity for a quantisation), rescale the scores in float64, or attack without "
    "gradients."
)
SIDE = 8 / 255  # of the cube of draws around each point, relative to the width of the box
UNSTABLE = 0.1  # mean unexplained change, relative to the loss, above which a point is unstable
_STEP = 1e-3  # of the finite difference, relative to the width of the box
_DISAGREES = 0.5  # relative error of the change that the gradient predicts
_CLEAR = 0.25  # share of the points where the change must not drown in rounding
_ROUNDINGS = 100  # of the largest output: smaller changes are lost in rounding
SAME_OUTPUT = 1e-4  # difference relative to the spread of the outputs up to which passes agree


def check_differentiable(context: Context) -> Finding:
    """Run the model backwards at clean samples: there must be a finite gradient.

    Source: Pintor et al., "Indicators of attack failure", NeurIPS 2022 (interrupted graph).
    """
    rows = context.first
    total = len(rows)
    try:
        parts = [_gradient(context, part) for part in rows.split(context.batch_size)]
    except (RuntimeError, ValueError) as error:
        context.cache["no gradient"] = True
        problem = f"No gradient reaches the input: {error}."
        return Finding("fail", {"samples": total, "without": total}, problem, MASKED)
    gradients = torch.cat(parts)
    broken = int((~gradients.isfinite()).flatten(1).any(dim=1).sum())
    return Finding(
        "fail" if broken else "pass",
        {"samples": total, "without": 0, "not_finite": broken},
        f"The gradient is NaN or infinite at {broken} of {total} clean samples."
        if broken
        else f"A finite gradient reaches the input at all {total} clean samples.",
        "Find the operation that overflows, such as the root or logarithm of zero.",
    )


def _gradient(context: Context, rows: Tensor) -> Tensor:
    """Differentiate the "decision" objective at clean samples, ``(s, ...)``."""
    target, points = context.target(), context.inputs[rows].requires_grad_()
    with torch.enable_grad():
        scores = split_scores(target.output(points), target.reject)
        return input_gradient(target.objective(*scores, context.labels[rows]), points)


def check_zero_gradient(context: Context) -> Finding:
    """Count gradients of the "decision" objective that vanish, at clean and at final points.

    Source: Pintor et al., "Indicators of attack failure"; Croce et al., AutoAttack's own checks.
    """
    rows, total, largest = context.first, len(context.first), 0
    counts = {"samples": total}
    for name, points in (("clean", context.inputs), ("final", context.points)):
        length = slope_at(context.target(), points[rows], context.labels[rows]).length
        counts[f"{name}_zero"] = int((length == 0).sum())
        counts[f"{name}_tiny"] = int((length < TINY).sum())
        largest = max(largest, counts[f"{name}_tiny"])
    message = (
        f"Of {total} gradients {counts['clean_tiny']} are below {TINY:g} at clean and "
        f"{counts['final_tiny']} at final points ({counts['clean_zero']} and "
        f"{counts['final_zero']} exactly zero)."
    )
    status = share_status(largest, total, warn=0, fail=SHARE_VANISHED)
    return Finding(status, counts, message, MASKED)


def check_true_gradient(context: Context) -> Finding:
    """Compare the change that the gradient predicts for a small step with the one that occurs.

    Of a random weighting of the outputs, which has none of the kinks of a maximum, both ways along
    its gradient. A straight-through or otherwise replaced gradient, noise, and steps in the scores
    disagree.

    Source: the definition of the derivative; Athalye et al., "Obfuscated gradients give a false
    sense of security", ICML 2018, on gradients that are replaced.
    """
    labels = context.labels[context.first].repeat(2)
    points = torch.cat([context.inputs[context.first], context.points[context.first]])
    target = Target(context.model, _weighting(context), False, context.batch_size)
    slope = slope_at(target, points, labels)
    step = _STEP * context.width * slope.direction
    ahead, behind = (project_box(points + sign * step, context.bounds) for sign in (1, -1))
    outs = [outputs(target.model, part, context.batch_size) for part in (behind, ahead)]
    before, after = (target.objective(out, None, labels) for out in outs)
    moved = ((ahead - behind) * slope.direction).flatten(1).sum(dim=1)
    predicted = -slope.length * moved
    scale = torch.cat(outs, dim=1).abs().amax(dim=1)
    clear = predicted.abs() > _ROUNDINGS * torch.finfo(predicted.dtype).eps * scale
    total = int(clear.sum())
    if total < _CLEAR * len(points):
        raise CannotRun(
            f"the change that the gradient predicts is lost in rounding at "
            f"{len(points) - total} of {len(points)} points"
        )
    wrong = ((after - before) - predicted).abs() > _DISAGREES * predicted.abs()
    count = int((wrong & clear).sum())
    return Finding(
        share_status(count, total),
        {"points": total, "disagree": count, "lost_in_rounding": len(points) - total},
        f"The change that the gradient predicts is off by more than half at {count} of {total} "
        "points.",
        "The gradient is not that of the scores (straight-through estimate, quantisation or "
        "noise): trust attacks without gradients, or the expectation over the noise.",
    )


def _weighting(context: Context) -> ObjectiveFunction:
    """Return a fixed random weighting of the output columns, as an objective."""
    columns = outputs(context.model, context.inputs[:1], 1).shape[1]
    weights = torch.randn(columns, generator=torch.Generator().manual_seed(context.seed))

    return lambda scores, threshold, classes, targeted=False: scores @ weights.to(scores)


def check_unstable_loss(context: Context) -> Finding:
    """Draw points around clean and final points; measure how far the loss leaves its tangent.

    The loss is Eq. (2), with the rejection switched off. A steep loss is not unstable: the gradient
    explains it.

    Source: Pintor et al., "Indicators of attack failure" (unstable predictions), which has no
    tangent.
    """
    labels = context.labels[context.first].repeat(2)
    points = torch.cat([context.inputs[context.first], context.points[context.first]])
    change = _unexplained(context, points, labels)
    count = int((change > UNSTABLE).sum())
    return Finding(
        share_status(count, len(points)),
        {"points": len(points), "unstable": count, "mean_change": change.mean().item()},
        f"Around {count} of {len(points)} points the loss changes in a way that its gradient does "
        f"not explain (mean {100 * change.mean().item():.1f} % of the loss).",
        "Average the gradient over points nearby, or attack without gradients.",
    )


def _unexplained(context: Context, points: Tensor, labels: Tensor) -> Tensor:
    """Return the mean change of the loss that the tangent leaves open, at most 1, ``(n,)``.

    Relative to the loss, or to the median loss where that is larger.
    """
    target, generator = context.target("paper"), context.generator()
    slope = slope_at(target, points, labels)
    scale = slope.values.abs()
    scale = torch.maximum(scale, scale.median()).clamp_min(torch.finfo(scale.dtype).tiny)
    total = torch.zeros_like(scale)
    draws = context.options["draws"]
    for _ in range(draws):
        noise = uniform_like(points, generator) - 0.5
        near = project_box(points + noise * SIDE * context.width, context.bounds)
        moved = ((near - points) * slope.direction).flatten(1).sum(dim=1)
        value = evaluate(target, near, labels).values
        total += ((value - slope.values + slope.length * moved).abs() / scale).clamp_max(1)
    return total / draws


def check_deterministic(context: Context) -> Finding:
    """Run the model several times in the same batches, then in others; outputs must agree.

    A decision that rounding turns in batches of other size and order only warns.

    Source: the check for randomised defences of AutoAttack (Croce and Hein, ICML 2020).
    """
    rows = context.first
    points = torch.cat([context.inputs[rows], context.points[rows]])
    passes = context.options["passes"]
    first, *others = (outputs(context.model, points, context.batch_size) for _ in range(passes))
    smaller = max(1, min(len(points), context.batch_size) // 3)
    shuffled = outputs(context.model, points.flip(0), smaller).flip(0)
    again = max(_difference(first, other) for other in others)
    batch = _difference(first, shuffled)
    turned = _turned(context, first, torch.stack(others))
    turned_by_batch = _turned(context, first, shuffled[None])
    counts = {
        "points": len(points),
        "passes": passes,
        "difference": again,
        "decisions_changed": turned,
        "difference_by_batch": batch,
        "decisions_changed_by_batch": turned_by_batch,
    }
    if again > SAME_OUTPUT or turned:
        return Finding(
            "fail",
            counts,
            f"The output changes by {again:.2g} of its spread between passes, and with it "
            f"{turned} of {len(points)} decisions.",
            "Switch off what is random, such as dropout in evaluation; if it belongs to the "
            "defence, attack the mean over many draws and evaluate each point often.",
        )
    if batch > SAME_OUTPUT or turned_by_batch:
        return Finding(
            "fail" if batch > SAME_OUTPUT else "warn",
            counts,
            f"The output changes by {batch:.2g} of its spread with the size and order of the "
            f"batch, and with it {turned_by_batch} of {len(points)} decisions.",
            "Evaluate in one batch size, and with batch normalisation in evaluation mode.",
        )
    message = f"{passes} passes and other batches agree to {max(again, batch):.1g} of the spread."
    return Finding("pass", counts, message)


def _difference(one: Tensor, two: Tensor) -> float:
    """Return the largest difference relative to the spread of the outputs."""
    spread = (one.amax() - one.amin()).clamp_min(torch.finfo(one.dtype).tiny)
    return ((one - two).abs().amax() / spread).item()


def _turned(context: Context, first: Tensor, others: Tensor) -> int:
    """Count the points whose decision differs in any of the other passes."""
    decisions = predict_labels(first, context.reject)
    changed = [predict_labels(other, context.reject) != decisions for other in others]
    return int(torch.stack(changed).any(dim=0).sum())


def check_unbounded_scores(context: Context) -> Finding:
    """Look for probabilities, and for scores stuck at the smallest or largest one seen.

    A margin of probabilities vanishes in float32 where the model is sure.

    Source: the checks of outputs in AutoAttack; Carlini and Wagner, "Defensive distillation is not
    robust to adversarial examples", 2016, on gradients lost in a saturated softmax.
    """
    rows, size = context.first, context.batch_size
    clean = context.inputs[rows]
    noise = context.bounds[0] + context.width * uniform_like(clean, context.generator())
    output = outputs(context.model, torch.cat([clean, context.points[rows], noise]), size)
    scores, _ = split_scores(output, context.reject)
    probabilities = _are_probabilities(scores) or _are_probabilities(output)
    low, high = scores.amin(), scores.amax()
    near = 4 * torch.finfo(scores.dtype).eps * torch.maximum(low.abs(), high.abs())
    stuck = (scores - low <= near) | (high - scores <= near)
    count, total = int(stuck.sum()), stuck.numel()
    status = share_status(count, total)
    if probabilities and status == "pass":
        status = "warn"
    counts = {
        "points": len(output),
        "probabilities": int(probabilities),
        "stuck_share": count / total,
        "smallest": low.item(),
        "largest": high.item(),
    }
    message = (
        f"Scores lie between {low.item():.3g} and {high.item():.3g}, "
        f"{100 * count / total:.1f} % of them exactly there"
        f"{'; they are probabilities' if probabilities else ''}."
    )
    advice = "Attack what goes into the softmax or sigmoid, not what comes out of it."
    return Finding(status, counts, message, advice)


def _are_probabilities(values: Tensor) -> bool:
    """Tell whether all rows lie in [0, 1] and sum to 1."""
    inside = ((values >= 0) & (values <= 1)).all()
    return bool(inside & ((values.sum(dim=1) - 1).abs() < 1e-3).all())
