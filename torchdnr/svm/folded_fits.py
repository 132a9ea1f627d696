"""Fits of one-vs-rest problems with and without each fold, at one point of a grid after another."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.svm.dual import DualSolution, dual_bounds
from torchdnr.svm.gram import all_distances, planned_rows
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import MEMORY_LIMIT, least_memory
from torchdnr.svm.multiclass import (
    ONE_VS_REST,
    ClassWeight,
    PerClass,
    checked_C,
    checked_class_weight,
    one_vs_rest,
    upper_bounds,
)
from torchdnr.svm.solver import solve_dual
from torchdnr.svm.working_set import make_feasible


class FoldedFits:
    """One-vs-rest problems on all samples, and without each fold: held-out samples have C = 0."""

    def __init__(
        self,
        rows: KernelRows,
        labels: Tensor,
        num_classes: int,
        fold: Tensor,
        tol: float,
        max_steps: int = 1_000_000,
        class_weight: ClassWeight | None = None,
        weight: Tensor | None = None,
        C: PerClass = 1.0,
    ) -> None:
        self._rows, self._fold = rows, fold
        self._stop: dict[str, Any] = {"tol": tol, "max_steps": max_steps}
        self._folds, self._classes = int(fold.max()) + 1, num_classes
        self._targets = one_vs_rest(labels, num_classes)
        factors, unit = checked_class_weight(class_weight), checked_C(C)

        def bounds(weight: Tensor | None) -> float | Tensor:
            return upper_bounds(labels, num_classes, ONE_VS_REST, unit, factors, weight)

        self._bounds = bounds(weight)  # of alpha, to be multiplied as ``advance`` says
        every = torch.ones_like(fold, dtype=torch.float64) if weight is None else weight
        without = [torch.as_tensor(bounds(every * (fold != k))) for k in range(self._folds)]
        self._part_bounds = torch.cat([b.expand(-1, num_classes) for b in without], dim=1)
        # Samples at a bound pull less without a fold, by its share: as with a C so much smaller.
        self._share = 1.0 - 1.0 / self._folds
        self._last: tuple[DualSolution, DualSolution, float] | None = None  # whole, parts and C
        self.not_converged = 0

    def advance(self, C: float) -> Tensor:
        """Fit with a larger multiple of C; return out-of-fold scores, float64 ``(n, c)``."""
        last, targets = self._last, self._targets.repeat(1, self._folds)
        start = None if last is None else self._stretched(last[0], C / last[2])
        limits = C * self._share * self._bounds
        whole = solve_dual(self._rows, self._targets, limits, **self._stop, initial=start)
        limits = C * self._part_bounds
        start = self._without_folds(whole, targets, limits)
        if last is not None:  # where nothing was at a bound, a larger C changes nothing
            _, parts, last_C = last
            at_bound = _at_bound(parts, last_C * self._part_bounds)
            start = torch.where(at_bound.any(dim=0), start, parts.dual_coef)
        parts = solve_dual(self._rows, targets, limits, **self._stop, initial=start)
        self._last = whole, parts, C
        self.not_converged += int((~parts.converged).sum() + (~whole.converged).sum())
        scores = parts.scores.view(len(targets), self._folds, self._classes)
        return scores[torch.arange(len(targets), device=targets.device), self._fold]

    def methods(self) -> Counter[str]:
        """Count what solved the problems of the last point, by ``DualSolution.method``."""
        solutions = () if self._last is None else self._last[:2]
        return Counter(name for solution in solutions for name in solution.method)

    def whole_start(self) -> Tensor:
        """Return a start for a fit on all samples with the last C, float64 ``(n, c)``."""
        if self._last is None:
            return torch.zeros_like(self._targets, dtype=torch.float64)
        whole, _, C = self._last
        at_bound = _at_bound(whole, C * self._share * self._bounds)
        return torch.where(at_bound, whole.dual_coef / self._share, whole.dual_coef)

    def _stretched(self, whole: DualSolution, growth: float) -> Tensor:
        """Multiply the last b by the best factor within the bounds, which grew by ``growth``."""
        linear = (self._targets * whole.dual_coef).sum(dim=0)
        best = _best_multiple(linear, 2.0 * (whole.objective + linear))
        return whole.dual_coef * best.clamp(1.0, max(1.0, growth))

    def _without_folds(self, whole: DualSolution, targets: Tensor, limits: Tensor) -> Tensor:
        """Set the held-out samples of the fit on all to 0, and stretch and balance the rest."""
        gradient = (whole.scores - whole.intercept).repeat(1, self._folds) - targets
        lower, upper = dual_bounds(targets, limits)
        kept = whole.dual_coef.repeat(1, self._folds) * (self._part_bounds > 0)
        kept = kept.T.contiguous()
        product = self._rows.product(kept, exact=False)
        best = _best_multiple((targets.T * kept).sum(dim=1), (kept * product).sum(dim=1))
        kept *= best.clamp(1.0, self._folds / (self._folds - 1.0)).unsqueeze(1)
        return make_feasible(kept, gradient.T, lower.T, upper.T, torch.zeros_like(best)).T


def _at_bound(solution: DualSolution, limits: float | Tensor) -> Tensor:
    """Tell which samples that are not held out are at their bound, bool ``(n, P)``."""
    size = solution.dual_coef.abs()
    return (size > 0) & (size >= limits * (1.0 - 1e-9))


def _best_multiple(linear: Tensor, quadratic: Tensor) -> Tensor:
    """Minimise ``1/2 t^2 quadratic - t linear``."""
    return linear / quadratic.clamp_min(torch.finfo(quadratic.dtype).tiny)


class Kernels:
    """Gram matrices of more than one width: from common distances, where these fit."""

    def __init__(
        self,
        features: Tensor | ShardedFeatures,
        distances: Tensor | None,
        problems: int,
        memory_limit: int | None,
    ) -> None:
        self.features = ShardedFeatures.of(features)
        self.distances, self._problems = distances, problems
        self.limit = MEMORY_LIMIT if memory_limit is None else int(memory_limit)
        self._center = self.features.means()
        if distances is not None:
            return
        partition, itemsize = self.features.partition, self.features.local.element_size()
        n, width = partition.n, partition.largest
        size = itemsize * n * width
        rest = self.limit - size
        # Half of what remains has to do for the rows of one width.
        if 3 * size <= rest and least_memory(n, problems, itemsize, width=width) <= rest:
            self.distances = all_distances(self.features, self._center, rest)
            self.limit = rest  # what is left beside them

    def rows(self, gamma: float) -> KernelRows:
        """Prepare the Gram matrix of one width."""
        return planned_rows(
            self.features, gamma, self._center, self._problems, self.limit, self.distances
        )
