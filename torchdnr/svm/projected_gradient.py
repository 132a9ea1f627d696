"""Projected gradients for problems whose support vectors sit at their bounds: a start for Newton.

A small C puts a large share of the samples at a bound. Working sets would have to walk through all
of them; a projected gradient moves them all at once, by one product with the whole kernel a step.

Source: Birgin, Martinez, Raydan, "Nonmonotone spectral projected gradient methods on convex sets",
SIAM J. Optim. 10 (2000); here with the exact line search that a quadratic allows, hence monotone.
"""

import torch
from torch import Tensor

from torchdnr.svm.dual import Points, to_double, violation_bounds
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.working_set import common_sample

SMALLEST = 2048
"""Samples from which the start is worth its products."""
CLOSE = 10.0
"""Violation of the uniform start up to which projected gradients beat working sets: 4 on raw
digits and 7 on features at C = 0.01, where they won several times over; 34 on noise, a tie."""
COARSER = 8
"""Times fewer samples of the coarse problem, whose scores give the start of the whole one."""
MARGIN = 0.02
"""Distance from the margin, in score units, within which the scores do not decide on a bound."""
MAX_STEPS = 30
FINE_STEPS = 10
"""Steps on all samples: from a coarse solution these do what 30 do from a uniform start."""
CHECK_EVERY = 5
SETTLED = 0.8
"""A problem has settled when over the last steps its free samples stayed above this share."""
FEW_FREE = 0.1
"""Share of all samples that may be free when a problem counts as settled."""
PROJECTION_STEPS = 30


def bounded_start(
    rows: KernelRows, targets: Tensor, lower: Tensor, upper: Tensor, goal: float
) -> Tensor | None:
    """Compute a start b, ``(P, n)``, for problems whose support vectors will mostly be at bounds.

    It is 0 for the other problems, and None if there is no such problem or the kernel is not held
    whole; all of it gets evaluated otherwise.
    """
    if rows.n < SMALLEST or rows.capacity < rows.n:
        return None
    start, sample = uniform_start(lower, upper), common_sample(rows.n, lower.device)
    gradient = rows.product_at(sample, start) - targets[:, sample]
    steepest_up, steepest_down = violation_bounds(
        Points(gradient, *(t[:, sample] for t in (start, lower, upper)))
    )
    close = (steepest_up - steepest_down < CLOSE).nonzero().squeeze(1)  # each by its own samples
    if len(close) == 0:
        return None
    rows.slots(torch.arange(rows.n, device=lower.device))
    result = torch.zeros_like(start)
    targets, lower, upper = targets[close], lower[close], upper[close]
    coarse = _coarse_start(rows, targets, lower, upper, goal)
    result[close] = projected_gradient(rows, targets, coarse, lower, upper, goal, FINE_STEPS)
    return result


def _coarse_start(
    rows: KernelRows, targets: Tensor, lower: Tensor, upper: Tensor, goal: float
) -> Tensor:
    """Solve on a share of the samples with a larger C, and put all where its scores say."""
    sample = common_sample(rows.n, lower.device, rows.n // COARSER)
    kernel = KernelRows.dense(rows.block(sample.unsqueeze(0))[0])
    low, high = (t[:, sample] * (rows.n / len(sample)) for t in (lower, upper))
    first = uniform_start(low, high)
    solution = torch.zeros_like(lower)
    solution[:, sample] = projected_gradient(
        kernel, targets[:, sample], first, low, high, goal, MAX_STEPS
    )
    gradient = rows.product(solution, exact=False) - targets
    scale = (upper - lower).amax(dim=1, keepdim=True) / MARGIN
    return project(-gradient * scale, lower, upper, torch.zeros_like(scale[:, 0]))[0]


def uniform_start(lower: Tensor, upper: Tensor) -> Tensor:
    """Put the smaller class at its bounds, and the larger one evenly between: rows sum to 0."""
    positive, negative = upper.sum(dim=1, keepdim=True), -lower.sum(dim=1, keepdim=True)
    level = torch.minimum(positive, negative)
    tiny = torch.finfo(lower.dtype).tiny  # a coarse problem may have one class only
    return upper * (level / positive.clamp_min(tiny)) + lower * (level / negative.clamp_min(tiny))


def project(values: Tensor, lower: Tensor, upper: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Project values ``(P, n)`` onto the box and the sum 0; return also the shifts needed.

    ``shift`` is a first guess of what to subtract before clipping, ``(P,)``.
    """
    least, most = (values - upper).amin(dim=1), (values - lower).amax(dim=1)
    shift = torch.minimum(torch.maximum(shift, least), most)
    for _ in range(PROJECTION_STEPS):
        moved = values - shift.unsqueeze(1)
        clipped = torch.minimum(torch.maximum(moved, lower), upper)
        excess = clipped.sum(dim=1)
        if excess.abs().max() <= 1e-6 * upper.max():  # a sync, worth the passes that it saves
            break
        least = torch.where(excess > 0, shift, least)
        most = torch.where(excess > 0, most, shift)
        inner = (clipped == moved).sum(dim=1)
        newton = shift + excess / inner.clamp_min(1)
        outside = (newton <= least) | (newton >= most) | (inner == 0)
        shift = torch.where(outside, (least + most) / 2, newton)
    else:
        clipped = torch.minimum(torch.maximum(values - shift.unsqueeze(1), lower), upper)
    return clipped, shift


def projected_gradient(
    rows: KernelRows,
    targets: Tensor,
    dual_coef: Tensor,
    lower: Tensor,
    upper: Tensor,
    goal: float,
    max_steps: int,
) -> Tensor:
    """Lower the objectives by spectral projected gradient steps until few samples are free.

    The start and the result are feasible b, ``(P, n)``, the result up to the rounding of the
    kernel's dtype. All of the kernel gets evaluated.
    """
    dtype = rows.store.dtype
    result, bounds = dual_coef.clone(), (lower, upper)
    gradient = (rows.product(dual_coef, exact=False) - targets).to(dtype)
    point, lower, upper = dual_coef.to(dtype), lower.to(dtype), upper.to(dtype)
    running = torch.arange(len(point), device=point.device)
    rate = upper.amax(dim=1).maximum(-lower.amin(dim=1))
    shift, last = torch.zeros_like(rate), torch.full_like(rate, torch.inf)
    for step in range(max_steps):
        moved = point - rate.unsqueeze(1) * gradient
        target, shift = project(moved, lower, upper, shift)
        change = target - point
        bent = rows.product(change, exact=False).to(dtype)
        slope, bend = (gradient * change).sum(dim=1), (change * bent).sum(dim=1)
        bend = bend.clamp_min(torch.finfo(dtype).tiny)
        length = (-slope / bend).clamp(0.0, 1.0).unsqueeze(1)
        point, gradient = point + length * change, gradient + length * bent
        rate = (change.square().sum(dim=1) / bend).clamp(1e-6, 1e3)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            free = ((point > lower) & (point < upper)).sum(dim=1).to(dtype)
            settled = (free > SETTLED * last) & (free < FEW_FREE * rows.n)
            settled |= (slope.abs() <= goal * change.abs().amax(dim=1)) | (step == max_steps - 1)
            settled = rows.replicate(settled)
            exact = to_double(point, bounds[0][running], bounds[1][running])
            result[running] = torch.where(settled.unsqueeze(1), exact, result[running])
            keep = (~settled).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            running, last = running[keep], free[keep]
            point, gradient, lower, upper, rate, shift = (
                t[keep] for t in (point, gradient, lower, upper, rate, shift)
            )
    return result
