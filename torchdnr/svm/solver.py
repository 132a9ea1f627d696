"""`solve_dual`: many dual problems on one kernel, from cold or warm start to certificate.

Outer steps choose working sets, on which Newton's method guesses the active set; where that fails,
two-variable updates take over. One product with the kernel then updates the gradients of all
samples. Where a large share of samples will be free, `active_set` goes first, and these steps take
over what it does not solve. Every problem has its own state, and its answer does not depend on its
neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdnr.arrays import as_features
from torchdnr.svm.active_set import solve_by_active_sets
from torchdnr.svm.checks import check_device
from torchdnr.svm.dual import (
    ACTIVE_SET,
    DESCENT,
    HANDED_OVER,
    DualSolution,
    Points,
    certify,
    dual_bounds,
    intercepts,
    join_solutions,
    snap_to_bounds,
    violation_bounds,
    warn_if_not_converged,
)
from torchdnr.svm.free_share import many_are_free
from torchdnr.svm.free_systems import multiply
from torchdnr.svm.kernel_rows import Block, KernelRows
from torchdnr.svm.memory_plan import column_groups
from torchdnr.svm.newton import newton_blocks
from torchdnr.svm.projected_gradient import bounded_start
from torchdnr.svm.working_set import (
    first_sets,
    largest_violators,
    make_feasible,
    select_working_sets,
    solve_blocks,
)

GOAL = 0.5
"""Share of the tolerance that the solver aims at, so that the certificate holds after rounding and
decision values agree with the exact optimum to about the tolerance."""
REFRESHES = 5
"""Times that drifted gradients are computed afresh before a problem counts as not converged."""
NEWTON_ACCURACY = 0.01
"""Newton's method stops when the violation is this share of the whole problem's. Its last digits
cost little; a tenth would leave points that are no better than where the block began."""
UPDATE_ACCURACY = 0.1
"""The same for two-variable updates."""
SHORTEST_STEP = 1e-3
"""Share of the way to Newton's answer below which a block counts as not improved."""
EASY_STEPS = 8
"""Newton steps up to which a block counts as easy, and the damping falls."""
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 0.3, 1e-9, 1.0
SINGLE_DAMPING = 1e-4
"""Least damping that is not in the way of the goal: what is solved with less has to be close."""
SMALL_SET = 256
"""Samples up to which float64 costs next to nothing. Float32 is too coarse for the last steps where
many samples are at a small bound: its sums are off by more than what is left to gain."""
FALLBACK_SET, FALLBACK_STEPS = 256, 1024
BLOCK_ELEMENTS, CPU_BLOCK_ELEMENTS = 2**27, 2**22
"""Entries of the matrices that are factored together: on a CPU only small ones gain from it."""
SMALL_BLOCKS = 2**20
"""The same, whatever the number of samples: they take a few MiB, and save most of the calls."""
PADDING = 0.75
"""Least share of the largest working set of a batch that the smallest one fills; small sets go
together whatever their sizes, as calls take longer than sums there."""


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
    a sample is held out, so that folds are columns too. ``KernelRows`` may limit how many columns
    advance together; the others come after them, on the rows that are held already.

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
    if not isinstance(kernel, KernelRows):
        matrix = as_features("kernel", kernel)
        check_device(matrix.device)
        targets = as_features("targets", targets, matrix)
        _check_kernel(matrix)
        kernel = KernelRows.dense(matrix)
    limits = _check_problems(kernel, targets, C)
    if initial is not None and (initial.shape != targets.shape or bool(torch.isnan(initial).any())):
        raise ValueError(
            f"initial must be {tuple(targets.shape)} as targets and hold no NaN, got "
            f"{tuple(initial.shape)} or NaN: leave it out to start from 0"
        )
    parts = []
    for columns in column_groups(targets.shape[1], kernel.together):
        y = targets[:, columns]
        lower, upper = dual_bounds(y, limits[:, columns])
        start = None if initial is None else initial[:, columns]
        state = SolverState.start(kernel, y, lower, upper, start, GOAL * tol, max_steps)
        method = _solve_where_many_are_free(state, y.T.double())
        for _ in range(REFRESHES):
            descend(state)
            dual_coef = state.dual_coef.T.contiguous()
            solution = certify(kernel, y, lower, upper, dual_coef, tol=tol, steps=state.steps)
            if (solution.converged | (state.steps >= max_steps)).all():
                break
            state.gradient = (solution.scores - solution.intercept - y).T.contiguous()
        parts.append(replace(solution, method=method))
    joined = join_solutions(parts)
    warn_if_not_converged(joined, tol)
    return joined


@dataclass
class SolverState:
    """State of P problems on n samples; one row each, of float64 ``(P, n)`` or ``(P,)``.

    ``goal`` is the violation at which a problem is done, and ``damping`` the proximal term of its
    next Newton steps; ``failures`` counts its Newton blocks in a row that were not solved.
    ``solve`` improves problems on their working sets; whatever it returns is checked.
    """

    rows: KernelRows
    goal: float
    max_steps: int
    gradient: Tensor
    dual_coef: Tensor
    lower: Tensor
    upper: Tensor
    steps: Tensor
    damping: Tensor
    failures: Tensor
    solve: Callable[..., tuple[Tensor, Tensor, Tensor]] = newton_blocks

    @classmethod
    def start(
        cls,
        rows: KernelRows,
        targets: Tensor,
        lower: Tensor,
        upper: Tensor,
        initial: Tensor | None,
        goal: float,
        max_steps: int,
    ) -> "SolverState":
        """Begin at given b, made feasible, or wherever a better start than b = 0 is worth it."""
        targets, lower, upper = (t.T.contiguous() for t in (targets.double(), lower, upper))
        steps, failures = torch.zeros(2, len(targets), dtype=torch.int64, device=targets.device)
        damping, dual_coef = torch.full_like(targets[:, 0], FIRST_DAMPING), torch.zeros_like(lower)
        problem = (rows, goal, max_steps, -targets, dual_coef, lower, upper)
        state = cls(*problem, steps, damping, failures)
        start = None if initial is None else initial.T
        if start is None:
            start = bounded_start(rows, targets, lower, upper, goal)
        if start is not None:
            total = torch.zeros_like(targets[:, 0])
            start = make_feasible(start.double(), -targets, lower, upper, total)
            state.dual_coef = rows.replicate(start)
            state.gradient += rows.product(state.dual_coef)
        return state

    def points(self) -> Points:
        """Return where all problems stand."""
        return Points(self.gradient, self.dual_coef, self.lower, self.upper)

    def move(self, problems: Tensor, changes: Tensor) -> None:
        """Add changes ``(p, n)`` to b, and what they do to the gradient."""
        lower, upper = self.lower[problems], self.upper[problems]
        moved = self.dual_coef[problems] + changes
        self.dual_coef[problems] = snap_to_bounds(moved, lower, upper, 1e-12)
        self.gradient[problems] += self.rows.product(changes)


def _solve_where_many_are_free(state: SolverState, targets: Tensor) -> tuple[str, ...]:
    """Let active sets do what they can, where that pays, and say what solves each problem."""
    steepest_up, steepest_down = violation_bounds(state.points())
    open_ones = state.rows.replicate(steepest_up - steepest_down > state.goal)
    if not open_ones.any() or not many_are_free(state.rows, targets, state.points()):
        return (DESCENT,) * len(targets)
    most = state.max_steps - state.steps
    points, solved, steps = solve_by_active_sets(
        state.rows, targets, state.points(), state.goal, most
    )
    state.gradient, state.dual_coef = points.gradient, points.dual_coef
    state.steps += steps
    return tuple(ACTIVE_SET if one else HANDED_OVER for one in solved.tolist())


def descend(state: SolverState) -> None:
    """Run outer steps until every problem is within the goal by its running gradient."""
    fresh = ~state.dual_coef.any(dim=1)
    polish = state.rows.n <= SMALL_SET
    while True:
        steepest_up, steepest_down = violation_bounds(state.points())
        violation, may_go_on = steepest_up - steepest_down, state.steps < state.max_steps
        # Finished problems leave the batch; that needs their number: one sync per outer step.
        running = ((violation > state.goal) & may_go_on).nonzero().squeeze(1)
        if len(running) == 0 and polish:  # one step without damping, to the last digits
            polish = False
            running = ((violation > 0.0) & may_go_on).nonzero().squeeze(1)
            state.damping.fill_(LEAST_DAMPING)
        if len(running) == 0:
            return
        failed = _newton_update(state, running, violation[running], fresh)
        fresh = torch.zeros_like(fresh)
        if len(failed):
            _two_variable_update(state, failed, violation[failed])


def _newton_update(state: SolverState, running: Tensor, violation: Tensor, fresh: Tensor) -> Tensor:
    """Improve the running problems by Newton's method, and return those that need another."""
    rows, points = state.rows, state.points()
    points = points if len(running) == len(state.steps) else points.of(running)
    intercept, blocks, double = _choose_blocks(state, running, points, fresh)
    results = []
    for (batch, samples, valid), kernels in rows.assigned(blocks):
        problems = running[batch]
        tol = (NEWTON_ACCURACY * violation[batch]).clamp_min(0.2 * state.goal)
        local = Points(*(t * valid for t in points.of(batch).at(samples)))
        kernels = kernels.double() if bool(double[batch[0]]) else kernels
        damping = state.damping[problems]
        allowed = state.max_steps - state.steps[problems]
        solution, solved, steps = state.solve(
            kernels, local, intercept[batch], damping, tol, allowed
        )
        change, damping, improved = _line_search(
            kernels, local, solution, damping, tol, solved, solved & (steps <= EASY_STEPS)
        )
        del kernels  # before the next are made
        failures = torch.where(solved & improved, 0, state.failures[problems] + 1)
        entries = (state.steps[problems] + steps, damping, failures, improved)
        columns = [entry.double().unsqueeze(1) for entry in entries]
        results.append(torch.cat([change, *columns], dim=1))
    changes = torch.zeros_like(points.gradient)
    failed = torch.zeros(len(running), dtype=torch.bool, device=running.device)
    collected = rows.collect(blocks, results, 4)
    for (batch, samples, valid), result in zip(blocks, collected, strict=True):
        problems, (new_steps, damping, failures, improved) = running[batch], result[:, -4:].T
        state.steps[problems], state.damping[problems] = new_steps.long(), damping
        state.failures[problems] = failures.long()
        changes[batch] = changes[batch].scatter_add(1, samples, result[:, :-4] * valid)
        failed[batch] = improved == 0
    failed |= state.failures[running] >= 2
    state.move(running, changes)
    return running[failed]


def _choose_blocks(
    state: SolverState, running: Tensor, points: Points, fresh: Tensor
) -> tuple[Tensor, list[Block], Tensor]:
    """Return intercepts, working sets in batches, and which problems take float64."""
    rows = state.rows
    largest = min(rows.largest_set, rows.in_sets)
    intercept = intercepts(points)
    index, valid = largest_violators(points, intercept, largest)
    if fresh.any():
        index, valid = first_sets(points.lower, points.upper, index, valid, fresh[running], largest)
    intercept, index, valid = (rows.replicate(t) for t in (intercept, index, valid))
    sizes = valid.sum(dim=1)
    double = (sizes <= SMALL_SET) | (state.failures[running] > 0)
    blocks = [
        Block(batch, *_compact(index[batch], valid[batch], width))
        for batch, width in _batches(sizes, double, rows)
    ]
    return intercept, blocks, double


def _batches(sizes: Tensor, double: Tensor, rows: KernelRows) -> list[tuple[Tensor, int]]:
    """Group problems of one precision and similar size, largest first."""
    on_cpu = rows.store.device.type == "cpu"
    limit = min(CPU_BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS, rows.largest_set**2)
    # Where all rows are held, so are those of any sets; small ones are best solved together.
    few = min(limit, SMALL_BLOCKS) if rows.capacity >= rows.n else 0
    batches = []
    for kind in (~double, double):
        members = kind.nonzero().squeeze(1)
        order = members[sizes[members].argsort(descending=True, stable=True)]
        lengths = sizes[order].tolist()
        start, share = 0, math.ceil(len(lengths) / rows.parts)
        while start < len(lengths):
            width, end = max(1, lengths[start]), start + 1
            most = min(limit // (width * width), rows.in_sets // width)
            most = min(max(most, few // (width * width)), share)
            least = PADDING * width if width > SMALL_SET else 0
            while end < len(lengths) and end - start < most and lengths[end] >= least:
                end += 1
            batches.append((order[start:end], width))
            start = end
    return batches


def _compact(index: Tensor, valid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Put the valid entries first, cut the rest, and sort by sample for the sake of the cache."""
    order = valid.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    valid, samples = valid.gather(1, order), index.gather(1, order)
    samples = torch.where(valid, samples, samples[:, :1])  # no rows but those of the set
    ordered = samples.sort(dim=1, stable=True)
    return ordered.values, valid.gather(1, ordered.indices)


def _line_search(
    kernels: Tensor,
    local: Points,
    solution: Tensor,
    damping: Tensor,
    tol: Tensor,
    solved: Tensor,
    easy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go to the minimum on the way to Newton's answer: changes of b, damping, and success."""
    gradient, dual_coef, lower, upper = local
    target = make_feasible(solution, gradient, lower, upper, dual_coef.sum(dim=1))
    change = target - dual_coef
    bent = multiply(kernels, change.to(kernels.dtype)).double()
    slope, bend = (gradient * change).sum(dim=1), (change * bent).sum(dim=1)
    # The minimum along the way to the target, which is feasible as both its ends are.
    length = (-slope / bend.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)
    length = torch.where(length > 0.9, 1.0, length)  # the target has its samples on the bounds
    improved = (length * slope + length.square() * bend / 2 < 0) & (length > SHORTEST_STEP)
    # The proximal term leaves a violation of damping times the change: too much near the end.
    held_back = damping * change.abs().amax(dim=1) > tol
    floor = torch.where(held_back, LEAST_DAMPING, SINGLE_DAMPING)
    falling = torch.maximum(damping / 10, floor).minimum(damping)
    rising = (damping * 10).clamp_max(MOST_DAMPING)
    damping = torch.where(easy, falling, torch.where(solved, damping, rising))
    change = torch.where(improved.unsqueeze(1), change * length.unsqueeze(1), 0.0)
    return change, damping, improved


def _two_variable_update(state: SolverState, problems: Tensor, violation: Tensor) -> None:
    """Improve by two-variable updates, which lower every objective that can be lowered."""
    rows, points = state.rows, state.points().of(problems)
    size = min(FALLBACK_SET, rows.n, rows.capacity)
    index = rows.replicate(select_working_sets(points, size))
    together = max(1, min(FALLBACK_SET, rows.capacity // index.shape[1]))
    batches = torch.arange(len(problems), device=problems.device).split(together)
    valid = torch.ones_like(index, dtype=torch.bool)
    blocks = [Block(batch, index[batch], valid[batch]) for batch in batches]
    results = []
    for (batch, samples, _), kernels in rows.assigned(blocks):
        local = points.of(batch).at(samples)
        tol = (UPDATE_ACCURACY * violation[batch]).clamp_min(0.9 * state.goal)
        allowed = (state.max_steps - state.steps[problems[batch]]).clamp_max(FALLBACK_STEPS)
        solution, steps = solve_blocks(kernels.double(), local, tol, allowed)
        del kernels
        change = solution - local.dual_coef
        results.append(torch.cat([change, steps.double().unsqueeze(1)], dim=1))
    for (batch, samples, _), result in zip(blocks, rows.collect(blocks, results, 1), strict=True):
        state.steps[problems[batch]] += result[:, -1].long()
        changes = torch.zeros_like(points.gradient[batch]).scatter(1, samples, result[:, :-1])
        state.move(problems[batch], changes)
    state.failures[problems] = 0


def _check_kernel(kernel: Tensor) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be square (n, n), got {tuple(kernel.shape)}")
    if not torch.isfinite(kernel).all():
        raise ValueError("kernel must be finite, got NaN or infinity: check the features and gamma")


def _check_problems(rows: KernelRows, targets: Tensor, C: float | Tensor) -> Tensor:
    """Check what the user gave, and return C as ``(n, P)``, without a copy of it."""
    device = rows.store.device
    if targets.ndim != 2 or targets.shape[0] != rows.n or targets.shape[1] == 0:
        raise ValueError(
            f"targets must be (n, P) with n = {rows.n} rows of kernel, got {tuple(targets.shape)}"
        )
    if targets.device != device:
        raise ValueError(f"targets must be on the device of kernel, {device}, got {targets.device}")
    if not (targets.abs() == 1).all():
        raise ValueError("targets must be -1 or +1, got other values")
    limits = torch.as_tensor(C, dtype=torch.float64, device=device)
    if not (torch.isfinite(limits) & (limits >= 0)).all():
        raise ValueError(f"C must be finite and >= 0, got values down to {limits.min().item():g}")
    limits = limits.expand(targets.shape)
    both = []
    for columns in column_groups(targets.shape[1], rows.together):
        takes_part, signs = limits[:, columns] > 0, targets[:, columns]
        positive, negative = (signs > 0) & takes_part, (signs < 0) & takes_part
        both.append(positive.any(dim=0) & negative.any(dim=0))
    missing = (~torch.cat(both)).nonzero().squeeze(1).tolist()
    if missing:
        raise ValueError(
            f"each problem needs samples of both classes with C > 0; columns {missing[:10]} of "
            "targets have one class only: add samples of the missing class"
        )
    return limits
