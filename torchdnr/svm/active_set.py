"""Newton's method on all samples at once, for problems of which a large share of samples is free.

A primal-dual active-set round guesses which samples sit at which bound and solves a linear system
for the rest. Where thousands are free, a factor of that system costs more than all else; but with a
preconditioner that all problems share, few steps of conjugate gradients do. Each is one product
with the kernel for all problems together, bound by reading the kernel, so that more problems cost
little. No system is solved better than its guess deserves. Rounds may cycle: what they find is kept
only if the objective fell or it is the optimum, and the caller has another solver ready.

Source: Hintermueller, Ito, Kunisch, "The primal-dual active set strategy as a semismooth Newton
method", SIAM J. Optim. 13 (2002); inexact steps: Dembo, Eisenstat and Steihaug, "Inexact Newton
methods", SIAM J. Numer. Anal. 19 (1982); constraint: Gould, Hribar and Nocedal, SIAM J. Sci.
Comput. 23 (2001).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.svm.dual import Points, intercepts, violation_bounds
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.nystroem import FreeInverse, LowRank
from torchdnr.svm.projected_gradient import project
from torchdnr.svm.working_set import make_feasible

JUMP = 3.0
"""A sample goes from one bound straight to the other only if its multiplier reaches this times the
distance and its kernel with itself."""
RELEASE = 0.5
"""Samples leave their bound that want it more than this times the average one. All at once would
overshoot: CIFAR-10 pixels then took a fifth more products, and some problems went round."""
FEW = 0.01
"""Share of the samples up to which all leave that want to."""
MAX_ROUNDS, PATIENCE = 60, 8
"""Rounds at the most, and those without fewer violations before a problem counts as cycling."""
ATTEMPTS = 5
"""Times that gradients are computed afresh, and rounds go on from there."""
MAX_STEPS = 40
"""Steps of conjugate gradients in a round; CIFAR-10 pixels and raw digits took 12. Where a round
is not done by then its system is nearly singular and leads astray: the problem is given up."""
REDUCTION = 0.01
"""Share of the squared residual that a round leaves at the most."""
ACCURACY = 0.015
"""Share of the violation to which rounds go before gradients are computed afresh."""
SIDE = 0.45
"""Share of a violation that each side may have; a violation is between two samples."""
RESIDUAL = 0.6
"""Share of what a side may have that systems are solved to."""
SLACK = 1e-6
"""Share of C by which a sample may be outside its bounds and count as at them."""


def solve_by_active_sets(
    rows: KernelRows, targets: Tensor, points: Points, goal: float, max_steps: Tensor
) -> tuple[Points, Tensor, Tensor]:
    """Improve P problems, from feasible points, on a kernel whose rows may all be held.

    Problems advance together, each by its own state. ``max_steps`` limits their rounds, ``(P,)``.
    Returns where they stand, with gradients computed afresh and objectives no larger than before;
    whether their violations are within the goal, ``(P,)``; and rounds spent.
    """
    rows.slots(torch.arange(rows.n, device=targets.device))
    solver = _Rounds(rows, LowRank.of(rows))
    points = Points(points.gradient.clone(), points.dual_coef.clone(), points.lower, points.upper)
    steps, hopeful = torch.zeros_like(max_steps), torch.ones_like(max_steps, dtype=torch.bool)
    violation = _violation(rows, points)
    for _ in range(ATTEMPTS):
        more = (violation > goal) & (steps < max_steps) & hopeful
        running = more.nonzero().squeeze(1)
        if len(running) == 0:
            break
        start, worst = points.of(running), violation[running]
        near = worst <= goal / ACCURACY / 3
        tol = SIDE * torch.where(near, goal, (ACCURACY * worst).clamp_min(goal))
        problem = _Problem(start, intercepts(start), tol, (max_steps - steps)[running])
        candidate, used = solver.solve(problem)
        total = torch.zeros_like(worst)
        candidate = make_feasible(candidate, start.gradient, start.lower, start.upper, total)
        gradient = rows.product(candidate) - targets[running]
        reached = _violation(rows, Points(gradient, candidate, start.lower, start.upper))
        change = ((gradient + start.gradient) * (candidate - start.dual_coef)).sum(dim=1)
        better = rows.replicate((change < 0) | (reached <= goal))
        steps[running] += used
        hopeful[running] = better
        violation[running] = torch.where(better, reached, worst)
        kept = better.unsqueeze(1)
        points.dual_coef[running] = torch.where(kept, candidate, start.dual_coef)
        points.gradient[running] = torch.where(kept, gradient, start.gradient)
    return points, violation <= goal, steps


def _violation(rows: KernelRows, points: Points) -> Tensor:
    steepest_up, steepest_down = violation_bounds(points)
    return rows.replicate(steepest_up - steepest_down)


class _Problem(NamedTuple):
    """Where P problems stand in their rounds; all but the points ``(P,)``."""

    points: Points
    intercept: Tensor
    tol: Tensor  # what a sample may violate
    max_steps: Tensor

    def of(self, problems: Tensor) -> "_Problem":
        """Select problems, ``(p,)``."""
        return _Problem(self.points.of(problems), *(t[problems] for t in self[1:]))


class _Guess(NamedTuple):
    """Which samples are held at their upper or lower bound, and which are not; bool ``(P, n)``."""

    up: Tensor
    low: Tensor
    free: Tensor

    @classmethod
    def at(cls, target: Tensor, points: Points) -> "_Guess":
        """Hold the samples whose target b is not within their bounds."""
        up = target >= points.upper
        low = (target <= points.lower) & ~up
        return cls(up, low, ~(up | low))

    def of(self, problems: Tensor) -> "_Guess":
        """Select problems, ``(p,)``."""
        return _Guess(*(t[problems] for t in self))


@dataclass
class _Rounds:
    """Rounds on one kernel."""

    rows: KernelRows
    low_rank: LowRank

    def solve(self, problem: _Problem) -> tuple[Tensor, Tensor]:
        """Run rounds until samples are where they want to be, or no fewer are not.

        Returns the best b ``(P, n)``, up to rounding within its bounds where that succeeded, and
        rounds spent.
        """
        best = problem.points.dual_coef.clone()
        steps = torch.zeros(len(best), dtype=torch.int64, device=best.device)
        fewest, waited = torch.full_like(steps, torch.iinfo(torch.int64).max), steps.clone()
        index = torch.arange(len(best), device=best.device)
        jump = JUMP * self.low_rank.diagonal
        guess = _first_guess(problem, jump)
        for _ in range(MAX_ROUNDS):
            problem, sound = self._round(problem, guess)
            bad, settled = _count_violations(problem, guess)
            done = settled & (bad == 0)
            better = sound & ((bad < fewest[index]) | done)
            fewest[index] = torch.where(better, bad, fewest[index])
            waited[index] = torch.where(better, 0, waited[index] + 1)
            best[index] = torch.where(better.unsqueeze(1), problem.points.dual_coef, best[index])
            steps[index] += 1
            more = sound & ~done & (waited[index] < PATIENCE) & (steps[index] < problem.max_steps)
            keep = self.rows.replicate(more).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) < len(index):
                problem, guess, index = problem.of(keep), guess.of(keep), index[keep]
            guess = _next_guess(problem, guess.free, jump)
        return best, steps

    def _round(self, problem: _Problem, guess: _Guess) -> tuple[_Problem, Tensor]:
        """Put samples on their bounds, and the others where their multipliers vanish, nearly.

        Returns where that is, and whether it is sound, ``(P,)``.
        """
        (slope, point, lower, upper), dtype = problem.points, self.rows.store.dtype
        change = torch.where(guess.up, upper, torch.where(guess.low, lower, point)) - point
        inverse = self.low_rank.inverse_between(guess.free)
        even = inverse.times(inverse.free)  # along it the sum changes at the least cost
        mass = even.sum(dim=1, keepdim=True)
        change = change - (point + change).sum(dim=1, keepdim=True) / mass * even
        slope = slope + self.rows.product(change.to(dtype), exact=False)
        intercept = -(slope * even).sum(dim=1, keepdim=True) / mass
        residual = -(slope + intercept) * guess.free  # small beside its terms: only then narrowed
        goal = RESIDUAL * problem.tol.unsqueeze(1)
        moved, bent, level, sound = self._conjugate_gradients(
            inverse, even, residual.to(dtype), goal
        )
        points = Points(slope + bent, point + change + moved, lower, upper)
        sound &= torch.isfinite(points.gradient).all(dim=1)
        return problem._replace(points=points, intercept=(intercept + level).squeeze(1)), sound

    def _conjugate_gradients(
        self, inverse: FreeInverse, even: Tensor, residual: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lower the residuals ``(P, n)`` of free samples by steps whose sums are 0.

        Returns the step, its product with the kernel, what the intercepts change by, and whether
        that is done.
        """
        moved, bent = torch.zeros_like(residual), torch.zeros_like(residual)
        mass = even.sum(dim=1, keepdim=True)

        def project(residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Split off the intercept: what remains is small, and float32 does for it."""
            downhill = inverse.times(residual)
            level = downhill.sum(dim=1, keepdim=True) / mass
            downhill, residual = downhill - level * even, residual - level * inverse.free
            return downhill, residual, level, (residual * downhill).sum(dim=1, keepdim=True)

        downhill, residual, level, energy = project(residual)
        total = level
        direction, enough = downhill, REDUCTION * energy
        running = residual.abs().amax(dim=1, keepdim=True) > goal
        for _ in range(MAX_STEPS):
            at = self.rows.replicate(running).squeeze(1).nonzero().squeeze(1)
            if len(at) == 0:
                break
            pull = torch.zeros_like(direction)
            pull[at] = self.rows.product(direction[at], exact=False)
            curvature = (direction * pull).sum(dim=1, keepdim=True)
            length = torch.where(running & (curvature > 0), energy / curvature, 0.0)
            moved, bent = moved + length * direction, bent + length * pull
            downhill, residual, level, left = project(residual - length * pull * inverse.free)
            total = total + torch.where(running, level, 0.0)
            running &= (left > enough) & (residual.abs().amax(dim=1, keepdim=True) > goal)
            direction, energy = downhill + left / energy * direction, left
        return moved, bent, total, ~running.squeeze(1)


def _first_guess(problem: _Problem, jump: Tensor) -> _Guess:
    """Hold samples that a step of projected gradients puts on a bound: never all, as sums are 0."""
    (slope, point, lower, upper), level = problem.points, problem.intercept
    target = project(point - slope / jump, lower, upper, level / jump)[0]
    return _Guess.at(target, problem.points)


def _next_guess(problem: _Problem, free: Tensor, jump: Tensor) -> _Guess:
    """Hold free samples that left their bounds, and free held ones that want most to leave."""
    (slope, point, lower, upper), n = problem.points, free.shape[1]
    multiplier = slope + problem.intercept.unsqueeze(1)
    inward = torch.where(point >= upper, multiplier, -multiplier).clamp_min(0.0)
    inward = inward.masked_fill(free | (upper <= lower), 0.0)
    count = (inward > 0).sum(dim=1)
    level = RELEASE * inward.sum(dim=1) / count.clamp_min(1)
    level = torch.where(free.any(dim=1) & (count > FEW * n), level, 0.0)
    stays = free | ((inward > 0) & (inward <= level.unsqueeze(1)))
    return _Guess.at(point - torch.where(stays, 0.0, multiplier) / jump, problem.points)


def _count_violations(problem: _Problem, guess: _Guess) -> tuple[Tensor, Tensor]:
    """Count the samples that the guess was wrong about; tell whether the system is solved."""
    slope, point, lower, upper = problem.points
    multiplier, tol = slope + problem.intercept.unsqueeze(1), problem.tol.unsqueeze(1)
    scale = point.abs().amax(dim=1, keepdim=True)  # C may be far beyond all values
    slack = torch.minimum(SLACK * torch.minimum(upper - lower, scale), 0.1 * tol)
    outside = (point < lower - slack) | (point > upper + slack)
    leaving = (guess.up & (multiplier > tol)) | (guess.low & (multiplier < -tol))
    bad = (outside | (leaving & (upper > lower))).sum(dim=1)
    return bad, (multiplier.abs() * guess.free).amax(dim=1) <= problem.tol
