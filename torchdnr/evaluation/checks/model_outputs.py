"""Is the output the same each time, and is it made of margins rather than probabilities?"""

import torch
from torch import Tensor

from torchdnr.decisions import predict_labels, split_scores
from torchdnr.evaluation.checks.context import Context, share_status
from torchdnr.evaluation.checks.result import Finding
from torchdnr.evaluation.judging import outputs

SAME_OUTPUT = 1e-4  # difference relative to the spread of the outputs up to which passes agree


def check_deterministic(context: Context) -> Finding:
    """Run the model several times in the same batches, then in others; outputs must agree.

    Outputs in the same batches may differ by ``SAME_OUTPUT`` of their spread, and every decision
    must be the same. In batches of other size and order the outputs must agree as closely; a
    decision that rounding turns warns.

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
    """Look for probabilities, and for scores that are stuck at a bound.

    At clean points, final points and noise in the box. Probabilities, in [0, 1] with sum 1, warn:
    a margin of them vanishes in float32 where the model is sure. Scores that equal the smallest or
    largest one seen are stuck there.

    Source: the checks of outputs in AutoAttack; Carlini and Wagner, "Defensive distillation is not
    robust to adversarial examples", 2016, on gradients lost in a saturated softmax.
    """
    rows, size = context.first, context.batch_size
    clean = context.inputs[rows]
    noise = torch.rand(
        clean.shape, generator=context.generator(), dtype=clean.dtype, device=clean.device
    )
    noise = context.bounds[0] + context.width * noise
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
