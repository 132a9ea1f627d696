"""`solve_dual`: the outer loop over working sets, from cold or warm start to certificate."""

import torch
from torch import Tensor

from torchdnr.svm.dual import (
    DualSolution,
    certify,
    dual_bounds,
    kernel_product,
    violation_bounds,
    warn_if_not_converged,
)
from torchdnr.svm.working_set import select_working_sets, snap_to_bounds, solve_blocks

WORKING_SET = 256
BLOCK_PROBLEMS = 256
"""Problems whose working-set kernels are held at once (128 MiB at 256 samples each)."""
BLOCK_ACCURACY = 0.1
"""A working set is solved until its violation is this share of the whole problem's."""
GOAL = 0.5
"""Share of the tolerance that the solver aims at, so that the certificate holds after rounding and
decision values agree with the exact optimum to about the tolerance."""
REFRESHES = 5
"""Times that drifted gradients are computed afresh before a problem counts as not converged."""


@torch.no_grad()
def solve_dual(
    kernel: Tensor,
    targets: Tensor,
    C: float | Tensor,
    *,
    tol: float = 1e-3,
    max_steps: int = 1_000_000,
    initial: Tensor | None = None,
) -> DualSolution:
    """Solve P independent C-SVC duals that share one kernel matrix.

    Column k minimises ``1/2 b'Kb - y'b`` with b = y * alpha, ``1'b = 0`` and alpha in [0, C].
    Columns advance together but stop alone: a problem gets the same answer whichever problems it
    is batched with. Where C is 0 a sample is held out, so that folds are columns too.

    Args:
        kernel: Symmetric positive semidefinite Gram matrix, ``(n, n)``, float32 or float64.
        targets: Labels in {-1, +1}, ``(n, P)``.
        C: Upper bound of alpha, >= 0: a number, or a tensor that broadcasts to ``(n, P)``.
        tol: Largest KKT violation accepted, in score units (the margin is 1).
        max_steps: Two-variable updates per problem before it is returned as not converged.
        initial: b to start from, ``(n, P)``; clipped to the bounds and balanced. Default 0.

    Returns:
        Solutions with a certificate computed on a fresh float64 product.

    Raises:
        ValueError: If shapes, devices or values do not fit, or a problem holds one class only.

    Warns:
        ConvergenceWarning: Once, naming the columns that missed ``tol`` and their violation.

    Source: Fan, Chen and Lin, JMLR 6 (2005); Wen et al., JMLR 19 (2018).
    """
    lower, upper = _check_problem(kernel, targets, C)
    dual_coef = torch.zeros_like(lower) if initial is None else _feasible(initial, lower, upper)
    steps = torch.zeros(targets.shape[1], dtype=torch.int64, device=kernel.device)
    for _ in range(REFRESHES):
        gradient = kernel_product(kernel, dual_coef) - targets
        dual_coef, steps = _descend(
            kernel, gradient, dual_coef, lower, upper, steps, GOAL * tol, max_steps
        )
        solution = certify(kernel, targets, lower, upper, dual_coef, tol=tol, steps=steps)
        if (solution.converged | (steps >= max_steps)).all():
            break
    warn_if_not_converged(solution, tol)
    return solution


def _descend(
    kernel: Tensor,
    gradient: Tensor,
    dual_coef: Tensor,
    lower: Tensor,
    upper: Tensor,
    steps: Tensor,
    goal: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Run outer steps until every problem is within the goal by its running gradient."""
    gradient, dual_coef = gradient.T.contiguous(), dual_coef.T.contiguous()
    lower, upper = lower.T.contiguous(), upper.T.contiguous()
    size = min(WORKING_SET, kernel.shape[0])
    while True:
        steepest_up, steepest_down = violation_bounds(gradient.T, dual_coef.T, lower.T, upper.T)
        violation = steepest_up - steepest_down
        # Finished problems leave the batch; that needs their number: one sync per outer step.
        running = ((violation > goal) & (steps < max_steps)).nonzero().squeeze(1)
        if len(running) == 0:
            return dual_coef.T.contiguous(), steps
        block_tol = (BLOCK_ACCURACY * violation).clamp_min(0.9 * goal)
        changes = torch.zeros(len(running), kernel.shape[0]).to(dual_coef)
        for part in torch.arange(len(running), device=kernel.device).split(BLOCK_PROBLEMS):
            rows = running[part]
            state = gradient[rows], dual_coef[rows], lower[rows], upper[rows]
            chosen = select_working_sets(*state, size)
            block, start, low, high = (t.gather(1, chosen) for t in state)
            blocks = kernel[chosen.unsqueeze(2), chosen.unsqueeze(1)].double()
            new, spent = solve_blocks(blocks, block, start, low, high, block_tol[rows], 8 * size)
            changes[part] = changes[part].scatter(1, chosen, new - start)
            dual_coef[rows] = state[1].scatter(1, chosen, new)
            steps[rows] += spent
        gradient[running] += kernel_product(kernel, changes.T).T


def _feasible(initial: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Clip to the bounds, then shrink the heavier sign until b sums to 0."""
    clipped = torch.minimum(torch.maximum(initial.double(), lower), upper)
    positive, negative = clipped.clamp_min(0.0), clipped.clamp_max(0.0)
    up, down = positive.sum(dim=0), -negative.sum(dim=0)
    level = torch.minimum(up, down)
    tiny = torch.finfo(clipped.dtype).tiny
    balanced = positive * (level / up.clamp_min(tiny)) + negative * (level / down.clamp_min(tiny))
    return snap_to_bounds(balanced, lower, upper)


def _check_problem(kernel: Tensor, targets: Tensor, C: float | Tensor) -> tuple[Tensor, Tensor]:
    """Check what the user gave, and turn it into bounds of b."""
    n = kernel.shape[0]
    if kernel.ndim != 2 or kernel.shape[1] != n:
        raise ValueError(f"kernel must be square (n, n), got {tuple(kernel.shape)}")
    if targets.ndim != 2 or targets.shape[0] != n or targets.shape[1] == 0:
        raise ValueError(
            f"targets must be (n, P) with n = {n} rows of kernel, got {tuple(targets.shape)}"
        )
    if targets.device != kernel.device:
        raise ValueError(
            f"targets must be on the device of kernel, {kernel.device}, got {targets.device}"
        )
    if not torch.isfinite(kernel).all():
        raise ValueError("kernel must be finite, got NaN or infinity: check the features and gamma")
    if not (targets.abs() == 1).all():
        raise ValueError("targets must be -1 or +1, got other values")
    limits = torch.as_tensor(C, dtype=torch.float64, device=kernel.device)
    if not (torch.isfinite(limits) & (limits >= 0)).all():
        raise ValueError(f"C must be finite and >= 0, got values down to {limits.min().item():g}")
    lower, upper = dual_bounds(targets, limits)
    both = (lower < 0).any(dim=0) & (upper > 0).any(dim=0)
    if not both.all():
        columns = (~both).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"each problem needs samples of both classes with C > 0; columns {columns[:10]} of "
            "targets have one class only: add samples of the missing class"
        )
    return lower, upper
