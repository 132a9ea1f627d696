"""Is the loss so rugged that a gradient says nothing about the points around it?"""

import torch
from torch import Tensor

from torchdnr.attacks.projections import project_box
from torchdnr.attacks.target import evaluate, slope_at
from torchdnr.evaluation.checks.context import Context, share_status
from torchdnr.evaluation.checks.result import Check

UNSTABLE_LOSS = "unstable loss"

SIDE = 8 / 255
"""Side of the cube of draws around each point, relative to the width of the box."""
UNSTABLE = 0.1
"""Mean unexplained change, relative to the loss, from which a point counts as unstable."""


def check_unstable_loss(context: Context) -> Check:
    """Draw points around clean and final points; measure how far the loss leaves its tangent.

    The loss is Eq. (2), with the rejection switched off. Its change less the change that the
    gradient predicts is divided by the loss, or by the median loss where that is larger, and
    clipped to 1; a point counts from a mean of ``UNSTABLE`` on. Warns from a tenth of the points
    on, fails from half of them on. A steep loss is not unstable: the gradient explains it.

    Source: Pintor et al., "Indicators of attack failure" (unstable predictions), which has no
    tangent.
    """
    labels = context.labels[context.first].repeat(2)
    points = torch.cat([context.inputs[context.first], context.points[context.first]])
    change = _unexplained(context, points, labels)
    count = int((change > UNSTABLE).sum())
    return Check(
        UNSTABLE_LOSS,
        share_status(count, len(points)),
        {"points": len(points), "unstable": count, "mean_change": change.mean().item()},
        f"Around {count} of {len(points)} points the loss changes in a way that its gradient does "
        f"not explain (mean {100 * change.mean().item():.1f} % of the loss).",
        "Average the gradient over points nearby, or attack without gradients." if count else "",
    )


def _unexplained(context: Context, points: Tensor, labels: Tensor) -> Tensor:
    """Return the mean relative change of the loss that the tangent leaves open, ``(n,)``."""
    target, generator = context.target("paper"), context.generator()
    slope = slope_at(target, points, labels)
    scale = slope.values.abs()
    scale = torch.maximum(scale, scale.median()).clamp_min(torch.finfo(scale.dtype).tiny)
    total = torch.zeros_like(scale)
    draws = context.options["draws"]
    for _ in range(draws):
        noise = torch.rand(
            points.shape, generator=generator, dtype=points.dtype, device=points.device
        )
        near = project_box(points + (noise - 0.5) * SIDE * context.width, context.bounds)
        moved = ((near - points) * slope.direction).flatten(1).sum(dim=1)
        value, _ = evaluate(target, near, labels)
        total += ((value - slope.values + slope.length * moved).abs() / scale).clamp_max(1)
    return total / draws
