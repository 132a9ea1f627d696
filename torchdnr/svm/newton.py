"""Newton's method on blocks of many dual problems at once: guess the active set, solve, repair.

On a working set the optimum is a linear system once it is known which samples sit at which bound.
A primal-dual active-set step guesses that from the current point and multipliers, solves the
system, and reads a better guess off the answer. It needs a handful of steps whatever the size of
the set, but it may cycle: the caller checks that the objective fell and has another solver ready.

Source: Hintermueller, Ito, Kunisch, "The primal-dual active set strategy as a semismooth Newton
method", SIAM J. Optim. 13 (2002); proximal term: Rockafellar, SIAM J. Control Optim. 14 (1976).
"""

import torch
from torch import Tensor

from torchdnr.svm.dual import Points
from torchdnr.svm.free_systems import FreeSystems, multiply

JUMP = 3.0
"""A sample at a bound goes straight to the other one only if its multiplier over this reaches it.
Kernel values are about 1, so 1 is Newton's own scale; 3 cycled less on raw digits at C = 1."""
SLACK = {torch.float32: 1e-6, torch.float64: 1e-9}
"""Share of C by which a sample may be outside its bounds and count as at them."""
MAX_STEPS = 30
PATIENCE = 6
"""Newton steps without fewer violations before a block counts as cycling."""


def newton_blocks(
    kernels: Tensor,
    points: Points,
    intercept: Tensor,
    damping: Tensor,
    tol: Tensor,
    max_steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise p dual problems on their working sets, plus ``damping / 2 |b - b_0|^2``.

    The sums of b are kept. A padded entry has both bounds and b at 0. The intercepts are a first
    guess; damping >= 0 makes singular kernels harmless; ``tol`` is the violation that a block may
    keep, and ``max_steps`` counts its Newton steps; all are ``(p,)``.

    Returns b, ``(p, k)``, within the bounds up to rounding where solved with no such sample;
    whether it was solved; and Newton steps.
    """
    point, slope, best = points.dual_coef, points.gradient, points.dual_coef.clone()
    solved = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    steps = torch.zeros(len(best), dtype=torch.int64, device=best.device)
    fewest = torch.full((len(best),), torch.iinfo(torch.int64).max, device=best.device)
    waited = torch.zeros_like(steps)
    rows = torch.arange(len(best), device=best.device)
    systems, slack = FreeSystems(kernels, damping), SLACK[kernels.dtype]
    for _ in range(MAX_STEPS):
        up, low, width = _guess_sets(point, slope, intercept, points)
        point, slope, intercept, sound = _newton_step(systems, points, up, low, width)
        bad = _count_violations(point, slope, intercept, points, up, low, tol, slack)
        done = bad == 0
        better = sound & (bad < fewest[rows])
        fewest[rows] = torch.where(better, bad, fewest[rows])
        best[rows] = torch.where(better.unsqueeze(1), point, best[rows])
        waited[rows] = torch.where(better, 0, waited[rows] + 1)
        steps[rows] += 1
        solved[rows] |= better & done
        more = (waited[rows] < PATIENCE) & (steps[rows] < max_steps)
        keep = (sound & ~done & more).nonzero().squeeze(1)  # the second sync of a Newton step
        if len(keep) == 0:
            break
        if len(keep) < len(rows):
            points, tol, max_steps = points.of(keep), tol[keep], max_steps[keep]
            systems.keep(keep)
            point, slope, intercept, rows = point[keep], slope[keep], intercept[keep], rows[keep]
    return best, solved, steps


def _guess_sets(
    point: Tensor, slope: Tensor, intercept: Tensor, points: Points
) -> tuple[Tensor, Tensor, int]:
    """Predict which samples sit at the upper and which at the lower bound; never all of them.

    Returns the most samples between their bounds, too.
    """
    lower, upper = points.lower, points.upper
    target = point - slope / JUMP
    shift = intercept.unsqueeze(1) / JUMP
    up = target - shift >= upper
    low = (target - shift <= lower) & ~up
    free = (~(up | low)).sum(dim=1)
    least, most = torch.stack([free.amin(), free.amax()]).tolist()  # a sync: the systems' size
    if least == 0:  # a level at which the sum is kept leaves some sample between its bounds
        stuck = free == 0
        level = _balancing_shift(target[stuck], lower[stuck], upper[stuck], point[stuck].sum(1))
        moved = target[stuck] - level.unsqueeze(1)
        up[stuck], low[stuck] = moved >= upper[stuck], moved <= lower[stuck]
        low[stuck] &= ~up[stuck]
        most = int((~(up | low)).sum(dim=1).amax())
    return up, low, max(1, most)


def _balancing_shift(target: Tensor, lower: Tensor, upper: Tensor, total: Tensor) -> Tensor:
    """Find by bisection the shift at which the clipped targets sum to the total."""
    least, most = (target - upper).amin(dim=1), (target - lower).amax(dim=1)
    for _ in range(60):
        middle = (least + most) / 2
        clipped = torch.minimum(torch.maximum(target - middle.unsqueeze(1), lower), upper)
        heavy = clipped.sum(dim=1) > total
        least, most = torch.where(heavy, middle, least), torch.where(heavy, most, middle)
    return (least + most) / 2


def _newton_step(
    systems: FreeSystems, points: Points, up: Tensor, low: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put samples at their bounds and solve for the free ones and the intercept."""
    gradient, dual_coef, lower, upper = points
    free = ~(up | low)
    change = torch.where(up, upper, torch.where(low, lower, dual_coef)) - dual_coef
    pulled = gradient + multiply(systems.kernels, change)
    index, weight = systems.choose(free, width)
    right = torch.stack([-pulled.gather(1, index) * weight, weight.to(pulled)], dim=2)
    answer, info = systems.solve(right, weight)
    intercept = (answer[:, :, 0].sum(1) + change.sum(1)) / answer[:, :, 1].sum(1)
    moved = answer[:, :, 0] - intercept.unsqueeze(1) * answer[:, :, 1]
    change = change.scatter_add(1, index, moved)
    slope = gradient + multiply(systems.kernels, change)
    slope = slope + systems.damping.unsqueeze(1) * change
    sound = (info == 0) & torch.isfinite(slope).all(dim=1) & free.any(dim=1)
    return dual_coef + change, slope, intercept, sound


def _count_violations(
    point: Tensor,
    slope: Tensor,
    intercept: Tensor,
    points: Points,
    up: Tensor,
    low: Tensor,
    tol: Tensor,
    share: float,
) -> Tensor:
    """Count samples outside their bounds, by more than a share of C, and those that want to leave.

    The latter are at a bound, and violate by more than ``tol``.
    """
    lower, upper = points.lower, points.upper
    multiplier = slope + intercept.unsqueeze(1)
    tol = tol.unsqueeze(1)
    scale = point.abs().amax(dim=1, keepdim=True)  # C may be far beyond all values
    slack = share * torch.minimum(upper - lower, scale)
    outside = (point < lower - slack) | (point > upper + slack)
    leaving = (up & (multiplier > tol)) | (low & (multiplier < -tol))
    return (outside | (leaving & (upper > lower))).sum(dim=1)
