"""`solve_dual`: many dual problems on one kernel, from cold or warm start to certificate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdnr.svm.dual import (
    DualSolution,
    certify,
    dual_bounds,
    intercepts,
    join_solutions,
    snap_to_bounds,
    to_double,
    violation_bounds,
    warn_if_not_converged,
)
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.memory_plan import column_groups
from torchdnr.svm.newton import multiply, newton_blocks
from torchdnr.svm.projected_gradient import bounded_start
from torchdnr.svm.working_set import (
    first_sets,
    largest_violators,
    select_working_sets,
    settle,
    solve_blocks,
)

Block = tuple[Tensor, Tensor, Tensor]
"""Problems of a block, ``(p,)``; their working sets, ``(p, k)``; and which entries count."""


def dealt(
    rows: KernelRows, blocks: Sequence[Block], solve: Callable[..., Tensor], extra: int
) -> Iterator[tuple[Block, Tensor]]:
    """Let each process solve a block in turn, and tell all what came of it.

    Args:
        rows: The kernel, and the processes that share it.
        blocks: What is to be solved.
        solve: Makes an outcome, float64 ``(p, k + extra)``, of a block and its kernels.
        extra: Numbers per problem beside those of the working set.

    Yields:
        Blocks in their order, with outcomes.
    """
    processes = rows.processes
    for first in range(0, len(blocks), processes.count):
        turn = blocks[first : first + processes.count]  # a block each, solved at the same time
        outcomes = [
            torch.empty(*t.shape[:1], t.shape[1] + extra, dtype=torch.float64, device=t.device)
            for _, t, _ in turn
        ]
        held = []
        for owner, (_, taken, _) in enumerate(turn):
            kernels = rows.block(taken, owner)  # all take part in it
            if owner == processes.rank:
                held.append(kernels)
            del kernels
        if held:
            outcomes[processes.rank] = solve(*turn[processes.rank], held.pop())
        for owner, (block, outcome) in enumerate(zip(turn, outcomes, strict=True)):
            yield block, processes.share(outcome, owner)


BLOCK_ACCURACY = 0.1
"""Two-variable updates stop when the violation is this share of the whole problem's."""
NEWTON_ACCURACY = 0.01
"""The same for Newton's method, whose last digits cost little; a tenth would leave points that are
no better than where the block began."""
SHORTEST_STEP = 1e-3
"""Share of the way to Newton's answer below which a block counts as not improved."""
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 0.3, 1e-9, 1.0
SINGLE_DAMPING = 1e-4
"""Least damping at which systems are factored in float32: their condition is then below 1e7."""
SMALL_SET = 256
"""Samples up to which float64 costs next to nothing. Float32 is too coarse for the last steps where
many samples are at a small bound: its sums are off by more than what is left to gain."""
EASY_STEPS = 8
"""Newton steps up to which a block counts as easy, and the damping falls."""
FALLBACK_SET, FALLBACK_STEPS = 256, 1024
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Entries of the matrices that are factored together: on a CPU only small ones gain from it."""
PADDING = 0.75
"""Least share of the largest working set of a batch that the smallest one fills."""


@dataclass
class Descent:
    """State of P problems on n samples; one row each.

    Attributes:
        dual_coef: b, float64 ``(P, n)``.
        gradient: F = K b - y, float64 ``(P, n)``.
        lower: Lower bounds of b, ``(P, n)``.
        upper: Upper bounds of b, ``(P, n)``.
        steps: Newton steps and two-variable updates spent, ``(P,)``.
        damping: Proximal term of the next Newton steps, ``(P,)``.
        failures: Newton blocks in a row that were not solved, ``(P,)``.
    """

    dual_coef: Tensor
    gradient: Tensor
    lower: Tensor
    upper: Tensor
    steps: Tensor
    damping: Tensor
    failures: Tensor

    @classmethod
    def start(
        cls, dual_coef: Tensor | None, targets: Tensor, lower: Tensor, upper: Tensor
    ) -> "Descent":
        """Begin at given b, whose gradient is still to be set, or at b = 0.

        Args:
            dual_coef: b, ``(P, n)``, within the bounds; None for 0.
            targets: Labels in {-1, +1}, ``(P, n)``.
            lower: Lower bounds of b, ``(P, n)``.
            upper: Upper bounds of b, ``(P, n)``.

        Returns:
            The state; its gradient is that of b = 0.
        """
        dual_coef = torch.zeros_like(lower) if dual_coef is None else dual_coef
        counts = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        damping = torch.full_like(targets[:, 0], FIRST_DAMPING)
        return cls(dual_coef, -targets, lower, upper, counts, damping, counts.clone())


@torch.no_grad()
def descend(rows: KernelRows, state: Descent, goal: float, max_steps: int, largest: int) -> None:
    """Run outer steps until every problem is within the goal by its running gradient.

    Args:
        rows: The kernel.
        state: Of all problems; changed in place.
        goal: Largest violation to reach.
        max_steps: Steps of one problem at the most.
        largest: Samples in a working set at the most.
    """
    fresh = ~state.dual_coef.any(dim=1)
    polish = rows.n <= SMALL_SET
    while True:
        bounds = violation_bounds(state.gradient.T, state.dual_coef.T, state.lower.T, state.upper.T)
        violation = bounds[0] - bounds[1]
        # Finished problems leave the batch; that needs their number: one sync per outer step.
        running = ((violation > goal) & (state.steps < max_steps)).nonzero().squeeze(1)
        if len(running) == 0 and polish:  # one step without damping, to the last digits
            polish = False
            running = ((violation > 0.0) & (state.steps < max_steps)).nonzero().squeeze(1)
            state.damping.fill_(LEAST_DAMPING)
        if len(running) == 0:
            return
        _outer_step(rows, state, running, violation, goal, max_steps, largest, fresh)
        fresh = torch.zeros_like(fresh)


def _outer_step(
    rows: KernelRows,
    state: Descent,
    running: Tensor,
    violation: Tensor,
    goal: float,
    max_steps: int,
    largest: int,
    fresh: Tensor,
) -> None:
    current = [t[running] for t in (state.gradient, state.dual_coef, state.lower, state.upper)]
    intercept = intercepts(*(t.T for t in current))
    index, valid = largest_violators(*current, intercept, largest)
    if fresh.any():
        index, valid = first_sets(*current[2:], index, valid, fresh[running], largest)
    intercept, index, valid = map(rows.processes.agree, (intercept, index, valid))
    changes = torch.zeros_like(current[0])
    failed = torch.zeros(len(running), dtype=torch.bool, device=running.device)
    sizes = valid.sum(dim=1)
    double = (sizes <= SMALL_SET) | (state.damping[running] < SINGLE_DAMPING)
    double |= state.failures[running] > 0

    def improve(batch: Tensor, taken: Tensor, used: Tensor, kernels: Tensor) -> Tensor:
        who = running[batch]
        local = [t[batch].gather(1, taken) * used for t in current]
        block_tol = (NEWTON_ACCURACY * violation[who]).clamp_min(0.2 * goal)
        allowed, precise = max_steps - state.steps[who], bool(double[batch[0]])
        return _improve(kernels, local, intercept[batch], state, who, block_tol, allowed, precise)

    blocks = [
        (batch, *_compact(index[batch], valid[batch], width))
        for batch, width in _batches(sizes, double, rows)
    ]
    for (batch, taken, used), outcome in dealt(rows, blocks, improve, 4):
        *state_of_batch, lowered = outcome[:, -4:].unbind(dim=1)
        who = running[batch]
        for name, values in zip(("steps", "damping", "failures"), state_of_batch, strict=True):
            entries = getattr(state, name)
            entries[who] = values.to(entries.dtype)
        changes[batch] = changes[batch].scatter_add(1, taken, outcome[:, :-4] * used)
        failed[batch] = lowered == 0
    failed |= state.failures[running] >= 2
    _move(rows, state, running, changes)
    stuck = running[failed]
    if len(stuck):
        _fall_back(rows, state, stuck, violation[stuck], goal, max_steps)


def _batches(sizes: Tensor, double: Tensor, rows: KernelRows) -> list[tuple[Tensor, int]]:
    """Group problems of one precision and similar size, largest first."""
    limit = min(BLOCK_ELEMENTS[rows.store.device.type], rows.largest_set**2)
    batches = []
    for kind in (~double, double):
        members = kind.nonzero().squeeze(1)
        order = members[sizes[members].argsort(descending=True, stable=True)]
        lengths = sizes[order].tolist()
        start = 0
        while start < len(lengths):
            width, end = max(1, lengths[start]), start + 1
            most = min(limit // (width * width), rows.capacity // width)
            while end < len(lengths) and end - start < most and lengths[end] >= PADDING * width:
                end += 1
            batches.append((order[start:end], width))
            start = end
    return batches


def _compact(index: Tensor, valid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Put the valid entries first, cut the rest, and sort by sample for the sake of the cache."""
    order = valid.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    taken, order = index.gather(1, order).sort(dim=1), valid.gather(1, order)
    return taken.values, order.gather(1, taken.indices)


def _improve(
    kernels: Tensor,
    local: list[Tensor],
    intercept: Tensor,
    state: Descent,
    who: Tensor,
    tol: Tensor,
    allowed: Tensor,
    double: bool,
) -> Tensor:
    """Solve the blocks by Newton's method.

    Returns the change of b, then steps, damping and failures from now on, and whether it is
    downhill: ``(p, k + 4)``.
    """
    gradient, dual_coef, lower, upper = local
    damping = state.damping[who]
    kernels = kernels.double() if double else kernels
    dtype = kernels.dtype
    solution, solved, spent = newton_blocks(
        kernels,
        *(t.to(dtype) for t in (*local, intercept, damping, tol)),
        allowed,
    )
    solution = to_double(solution, lower, upper)
    target = settle(solution, gradient, lower, upper, dual_coef.sum(dim=1))
    change = target - dual_coef
    bent = multiply(kernels, change.to(dtype)).double()
    slope, bend = (gradient * change).sum(dim=1), (change * bent).sum(dim=1)
    # The minimum along the way to the target, which is feasible as both its ends are.
    length = (-slope / bend.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)
    length = torch.where(length > 0.9, 1.0, length)  # the target has its samples on the bounds
    lowered = (length * slope + length.square() * bend / 2 < 0) & (length > SHORTEST_STEP)
    easy = solved & (spent <= EASY_STEPS)
    # The proximal term leaves a violation of damping times the change: too much near the end.
    held_back = damping * change.abs().amax(dim=1) > tol
    floor = torch.where(held_back, LEAST_DAMPING, SINGLE_DAMPING)
    falling = torch.maximum(damping / 10, floor).minimum(damping)
    rising = (damping * 10).clamp_max(MOST_DAMPING)
    change = torch.where(lowered.unsqueeze(1), change * length.unsqueeze(1), 0.0)
    damping = torch.where(easy, falling, torch.where(solved, damping, rising))
    failures = torch.where(solved & lowered, 0, state.failures[who] + 1)
    entries = (state.steps[who] + spent, damping, failures, lowered)
    return torch.cat([change, *(entry.double().unsqueeze(1) for entry in entries)], dim=1)


def _move(rows: KernelRows, state: Descent, who: Tensor, changes: Tensor) -> None:
    """Add changes to b, and what they do to the gradient."""
    moved, lower, upper = state.dual_coef[who] + changes, state.lower[who], state.upper[who]
    state.dual_coef[who] = snap_to_bounds(moved, lower, upper, 1e-12)
    state.gradient[who] += rows.product(changes)


def _fall_back(
    rows: KernelRows, state: Descent, who: Tensor, violation: Tensor, goal: float, max_steps: int
) -> None:
    """Improve by two-variable updates, which lower every objective that can be lowered."""
    current = [t[who] for t in (state.gradient, state.dual_coef, state.lower, state.upper)]
    index = select_working_sets(*current, min(FALLBACK_SET, rows.n, rows.capacity))
    index = rows.processes.agree(index)

    def update(part: Tensor, taken: Tensor, _used: Tensor, kernels: Tensor) -> Tensor:
        local = [t[part].gather(1, taken) for t in current]
        tol = (BLOCK_ACCURACY * violation[part]).clamp_min(0.9 * goal)
        allowed = (max_steps - state.steps[who[part]]).clamp_max(FALLBACK_STEPS)
        solution, spent = solve_blocks(kernels.double(), *local, tol, allowed)
        return torch.cat([solution - local[1], spent.double().unsqueeze(1)], dim=1)

    together = max(1, min(FALLBACK_SET, rows.capacity // index.shape[1]))
    parts = torch.arange(len(who), device=who.device).split(together)
    blocks = [(part, index[part], torch.ones_like(index[part], dtype=torch.bool)) for part in parts]
    for (part, taken, _), outcome in dealt(rows, blocks, update, 1):
        state.steps[who[part]] += outcome[:, -1].long()
        changes = torch.zeros_like(current[0][part]).scatter(1, taken, outcome[:, :-1])
        _move(rows, state, who[part], changes)
    state.failures[who] = 0


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
