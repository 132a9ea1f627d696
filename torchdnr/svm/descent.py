"""Outer steps of the dual solver: choose working sets, improve on them, update the gradients.

Each problem chooses, improves and stops by its own state only. A step is kept only if it lowers
the problem's objective; where Newton's method on the working set fails to, two-variable updates,
which cannot, take over. So every problem converges.

Several processes may share the kernel rows (``KernelRows``). All hold the same state and take the
same steps; the blocks of a step are dealt to them, and each block is solved by one process.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdnr.svm.dealing import dealt
from torchdnr.svm.dual import intercepts, snap_to_bounds, to_double, violation_bounds
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.newton import multiply, newton_blocks
from torchdnr.svm.working_set import (
    first_sets,
    largest_violators,
    select_working_sets,
    settle,
    solve_blocks,
)

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
