"""`solve_dual`: many dual problems on one kernel, from cold or warm start to certificate."""

import torch
from torch import Tensor

from torchdnr.svm.descent import Descent, descend
from torchdnr.svm.dual import (
    DualSolution,
    certify,
    dual_bounds,
    join_solutions,
    warn_if_not_converged,
)
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.memory_plan import column_groups
from torchdnr.svm.projected_gradient import bounded_start
from torchdnr.svm.working_set import settle

GOAL = 0.5
"""Share of the tolerance that the solver aims at, so that the certificate holds after rounding and
decision values agree with the exact optimum to about the tolerance."""
REFRESHES = 5
"""Times that drifted gradients are computed afresh before a problem counts as not converged."""


@torch.no_grad()
def solve_dual(
    kernel: Tensor | KernelRows,
    targets: Tensor,
    C: float | Tensor,
    *,
    tol: float = 1e-3,
    max_steps: int = 1_000_000,
    initial: Tensor | None = None,
) -> DualSolution:
    """Solve P independent C-SVC duals that share one kernel matrix.

    Column k minimises ``1/2 b'Kb - y'b`` with b = y * alpha, ``1'b = 0`` and alpha in [0, C].
    Columns advance together but stop alone: a problem gets the same answer, to within ``tol``,
    whichever problems it is batched with; rounding may decide at which step it stops. Where C is 0
    a sample is held out, so that folds are columns too. Outer steps choose working sets, on which
    Newton's method guesses the active set; where that fails, two-variable updates take over
    (``descent``). ``KernelRows`` may say how many columns advance together; the others come after
    them, on the rows that are held already.
    Processes that share the rows of the kernel all call this together, and get the same solution.

    Args:
        kernel: Symmetric positive semidefinite Gram matrix, ``(n, n)``, float32 or float64; or
            ``KernelRows``, of which only the rows that are needed get evaluated.
        targets: Labels in {-1, +1}, ``(n, P)``.
        C: Upper bound of alpha, >= 0: a number, or a tensor that broadcasts to ``(n, P)``.
        tol: Largest KKT violation accepted, in score units (the margin is 1).
        max_steps: Newton steps and two-variable updates per problem before it is returned as not
            converged.
        initial: b to start from, ``(n, P)``; clipped to the bounds and balanced. Default 0.

    Returns:
        Solutions with a certificate computed on a fresh float64 product.

    Raises:
        ValueError: If shapes, devices or values do not fit, or a problem holds one class only.

    Warns:
        ConvergenceWarning: Once, naming the columns that missed ``tol`` and their violation.

    Source: Fan, Chen and Lin, JMLR 6 (2005); Wen et al., JMLR 19 (2018); Hintermueller, Ito and
    Kunisch, SIAM J. Optim. 13 (2002).
    """
    rows = kernel if isinstance(kernel, KernelRows) else KernelRows.dense(kernel)
    limits = _check_problems(kernel, targets, C, rows.together)
    if initial is not None and (initial.shape != targets.shape or bool(torch.isnan(initial).any())):
        raise ValueError(
            f"initial must be {tuple(targets.shape)} as targets and hold no NaN, got "
            f"{tuple(initial.shape)} or NaN: leave it out to start from 0"
        )
    parts = [
        _solve(
            rows,
            targets[:, columns],
            *dual_bounds(targets[:, columns], limits[:, columns]),
            tol,
            max_steps,
            None if initial is None else initial[:, columns],
        )
        for columns in column_groups(targets.shape[1], rows.together)
    ]
    solution = join_solutions(parts)
    warn_if_not_converged(solution, tol)
    return solution


def _solve(
    rows: KernelRows,
    targets: Tensor,
    lower: Tensor,
    upper: Tensor,
    tol: float,
    max_steps: int,
    initial: Tensor | None,
) -> DualSolution:
    """Solve problems that advance together."""
    by_problem = [t.T.contiguous() for t in (targets.double(), lower, upper)]
    start = bounded_start(rows, *by_problem, GOAL * tol) if initial is None else initial.T
    if start is not None:
        start = rows.processes.agree(_feasible(start, *by_problem))
    state = Descent.start(start, *by_problem)
    if start is not None:
        state.gradient += rows.product(state.dual_coef)
    for _ in range(REFRESHES):
        descend(rows, state, GOAL * tol, max_steps, min(rows.largest_set, rows.capacity))
        dual_coef = state.dual_coef.T.contiguous()
        solution = certify(rows, targets, lower, upper, dual_coef, tol=tol, steps=state.steps)
        if (solution.converged | (state.steps >= max_steps)).all():
            break
        state.gradient = (solution.scores - solution.intercept - targets).T.contiguous()
    return solution


def _feasible(initial: Tensor, targets: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Clip to the bounds and balance, in a way that leaves on its bound what is there."""
    total = torch.zeros(len(initial), dtype=torch.float64, device=initial.device)
    return settle(initial.double(), -targets, lower, upper, total)


def _check_problems(
    kernel: Tensor | KernelRows, targets: Tensor, C: float | Tensor, together: int | None
) -> Tensor:
    """Check what the user gave, and return C as ``(n, P)``, without a copy of it."""
    whole = isinstance(kernel, Tensor)
    given = kernel if whole else kernel.store
    n = given.shape[0] if whole else kernel.n
    if whole and (given.ndim != 2 or given.shape[1] != n):
        raise ValueError(f"kernel must be square (n, n), got {tuple(given.shape)}")
    if targets.ndim != 2 or targets.shape[0] != n or targets.shape[1] == 0:
        raise ValueError(
            f"targets must be (n, P) with n = {n} rows of kernel, got {tuple(targets.shape)}"
        )
    if targets.device != given.device:
        raise ValueError(
            f"targets must be on the device of kernel, {given.device}, got {targets.device}"
        )
    if whole and not torch.isfinite(kernel).all():
        raise ValueError("kernel must be finite, got NaN or infinity: check the features and gamma")
    if not (targets.abs() == 1).all():
        raise ValueError("targets must be -1 or +1, got other values")
    limits = torch.as_tensor(C, dtype=torch.float64, device=given.device)
    if not (torch.isfinite(limits) & (limits >= 0)).all():
        raise ValueError(f"C must be finite and >= 0, got values down to {limits.min().item():g}")
    limits = limits.expand(targets.shape)
    both = [
        _has_both(targets[:, columns], limits[:, columns])
        for columns in column_groups(targets.shape[1], together)
    ]
    columns = (~torch.cat(both)).nonzero().squeeze(1).tolist()
    if columns:
        raise ValueError(
            f"each problem needs samples of both classes with C > 0; columns {columns[:10]} of "
            "targets have one class only: add samples of the missing class"
        )
    return limits


def _has_both(targets: Tensor, limits: Tensor) -> Tensor:
    """Tell for each problem whether samples of both classes take part, ``(P,)``."""
    taking_part = limits > 0
    return ((targets > 0) & taking_part).any(dim=0) & ((targets < 0) & taking_part).any(dim=0)
