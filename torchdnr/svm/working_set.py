"""Solver of many dual problems on one kernel: batched working sets, two variables at a time.

Two levels, after ThunderSVM and its relatives: an outer step gives every problem a working set of
its worst violators, and two-variable updates solve all these small problems at once; their changes
then update the gradients of all samples by one product with the kernel. Each problem selects,
updates and stops by its own state only, so its answer does not depend on its neighbours.

Source: Fan, Chen and Lin, "Working set selection using second order information", JMLR 6 (2005);
Wen et al., "ThunderSVM", JMLR 19 (2018).
"""

import torch
from torch import Tensor

TAU = 1e-12
"""Floor of the curvature along a pair, for duplicate samples (as in LIBSVM)."""
CHECK_EVERY = 32
"""Two-variable updates between two looks at whether all problems are done (a device sync)."""


def select_working_sets(
    gradient: Tensor, dual_coef: Tensor, lower: Tensor, upper: Tensor, size: int
) -> Tensor:
    """Choose each problem's working set: half may grow b, half may shrink it, worst first.

    Args:
        gradient: F = K b - y, ``(P, n)``.
        dual_coef: b, ``(P, n)``.
        lower: Lower bounds of b, ``(P, n)``.
        upper: Upper bounds of b, ``(P, n)``.
        size: Samples in a working set, at most n.

    Returns:
        Indices without repetition, ``(P, size)``.
    """
    n = gradient.shape[1]
    if size >= n:
        return torch.arange(n, device=gradient.device).expand(len(gradient), n)
    growing = (-gradient).masked_fill(dual_coef >= upper, -torch.inf)
    top = growing.topk(size - size // 2, dim=1).indices
    shrinking = gradient.masked_fill(dual_coef <= lower, -torch.inf)
    # Below all real candidates, but above the samples that are in the set already.
    shrinking = shrinking.clamp_min(torch.finfo(gradient.dtype).min)
    shrinking = shrinking.scatter(1, top, -torch.inf)
    return torch.cat([top, shrinking.topk(size // 2, dim=1).indices], dim=1)


def solve_blocks(
    kernels: Tensor,
    gradient: Tensor,
    dual_coef: Tensor,
    lower: Tensor,
    upper: Tensor,
    tol: Tensor,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Solve P small dual problems by two-variable updates, second-order selection.

    Args:
        kernels: Gram matrices of the working sets, ``(P, q, q)``.
        gradient: F of the working sets, ``(P, q)``.
        dual_coef: b of the working sets, ``(P, q)``.
        lower: Lower bounds of b, ``(P, q)``.
        upper: Upper bounds of b, ``(P, q)``.
        tol: Violation at which each problem stops, ``(P,)``.
        max_steps: Updates of one problem at the most.

    Returns:
        New b, ``(P, q)``, and updates spent, ``(P,)``.
    """
    count, size = gradient.shape
    problem = torch.arange(count, device=gradient.device)
    diagonal = kernels.diagonal(dim1=1, dim2=2)
    rows = kernels.reshape(count * size, size)
    offset = problem * size
    negative = -gradient
    dual_coef = dual_coef.clone()
    blocked_up = torch.zeros_like(negative).masked_fill_(dual_coef >= upper, -torch.inf)
    blocked_down = torch.zeros_like(negative).masked_fill_(dual_coef <= lower, torch.inf)
    steps = torch.zeros(count, dtype=torch.int64, device=gradient.device)
    for step in range(max_steps):
        steepest_up, i = (negative + blocked_up).max(dim=1, keepdim=True)
        down = negative + blocked_down
        running = steepest_up - down.amin(dim=1, keepdim=True) > tol.unsqueeze(1)
        if step % CHECK_EVERY == 0 and not running.any():
            break
        row_i = rows[offset + i.squeeze(1)]
        slope = (steepest_up - down).clamp_min_(0.0)
        curvature = torch.add(diagonal + diagonal.gather(1, i), row_i, alpha=-2.0).clamp_min_(TAU)
        j = (slope.square() / curvature).argmax(dim=1, keepdim=True)
        room = torch.minimum(
            upper.gather(1, i) - dual_coef.gather(1, i), dual_coef.gather(1, j) - lower.gather(1, j)
        )
        change = torch.minimum(slope.gather(1, j) / curvature.gather(1, j), room) * running
        negative.addcmul_(change, rows[offset + j.squeeze(1)] - row_i)
        pair, signed = torch.cat([i, j], dim=1), torch.cat([change, -change], dim=1)
        low, high = lower.gather(1, pair), upper.gather(1, pair)
        moved = snap_to_bounds(dual_coef.gather(1, pair) + signed, low, high)
        dual_coef.scatter_(1, pair, moved)
        blocked_up.scatter_(
            1, pair, torch.zeros_like(moved).masked_fill_(moved >= high, -torch.inf)
        )
        blocked_down.scatter_(
            1, pair, torch.zeros_like(moved).masked_fill_(moved <= low, torch.inf)
        )
        steps += running.squeeze(1)
    return dual_coef, steps


def snap_to_bounds(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Put values within rounding of a bound exactly on it: else they would count as free.

    Args:
        values: b or entries of it.
        lower: Their lower bounds.
        upper: Their upper bounds.

    Returns:
        Values within the bounds.
    """
    slack = 1e-12 * (upper - lower)
    values = torch.where(values <= lower + slack, lower, values)
    return torch.where(values >= upper - slack, upper, values)
