"""Fits on all samples and on all folds at once, for growing C, each from what is known already."""

import torch
from torch import Tensor

from torchdnr.svm.dual import DualSolution, dual_bounds
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.multiclass import one_vs_rest
from torchdnr.svm.solver import solve_dual
from torchdnr.svm.working_set import settle


class FoldedFits:
    """One-vs-rest problems on all samples, and without each fold: held-out samples have C = 0.

    Args:
        rows: The Gram matrix of all samples.
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.
        fold: Fold of each sample, ``(n,)`` from 0.
        tol: Largest KKT violation accepted.

    Attributes:
        not_converged: Problems that missed the tolerance so far.
    """

    def __init__(
        self, rows: KernelRows, labels: Tensor, num_classes: int, fold: Tensor, tol: float
    ) -> None:
        self._rows, self._fold, self._tol = rows, fold, tol
        self._folds, self._classes = int(fold.max()) + 1, num_classes
        self._targets = one_vs_rest(labels, num_classes)
        kept = fold.unsqueeze(1) != torch.arange(self._folds, device=fold.device)
        self._kept = kept.double().repeat_interleave(num_classes, dim=1)  # fold * c + class
        self._whole: DualSolution | None = None
        self._parts: DualSolution | None = None
        self._C, self._whole_C, self.not_converged = 0.0, 0.0, 0

    @property
    def dual_coef(self) -> Tensor:
        """Start of a fit on all samples with the last C, float64 ``(n, c)``; see ``advance``."""
        dual_coef = self._whole.dual_coef
        at_bound = dual_coef.abs() >= self._whole_C * (1.0 - 1e-9)
        return torch.where(at_bound, dual_coef * (self._C / self._whole_C), dual_coef)

    def advance(self, C: float) -> Tensor:
        """Fit with a larger C than before.

        Args:
            C: Upper bound of the dual variables.

        Returns:
            Scores of each sample by the machine fitted without its fold, float64 ``(n, c)``.
        """
        targets = self._targets.repeat(1, self._folds)
        # Samples at a bound pull less without a fold, by its share: as with a C so much smaller.
        smaller = C * (1.0 - 1.0 / self._folds)
        whole = solve_dual(
            self._rows, self._targets, smaller, tol=self._tol, initial=self._stretched(smaller)
        )
        limits = C * self._kept
        start = self._without_folds(whole, targets, limits)
        if self._parts is not None:
            # Where nothing was at a bound, a larger C changes nothing.
            at_bound = self._parts.dual_coef.abs() >= self._C * (1.0 - 1e-9)
            start = torch.where(at_bound.any(dim=0), start, self._parts.dual_coef)
        parts = solve_dual(self._rows, targets, limits, tol=self._tol, initial=start)
        self._whole, self._parts, self._whole_C, self._C = whole, parts, smaller, C
        self.not_converged += int((~parts.converged).sum() + (~whole.converged).sum())
        scores = parts.scores.view(len(targets), self._folds, self._classes)
        return scores[torch.arange(len(targets), device=targets.device), self._fold]

    def _stretched(self, C: float) -> Tensor | None:
        """Take the last b to its best multiple within the new bounds."""
        if self._whole is None:
            return None
        linear = (self._targets * self._whole.dual_coef).sum(dim=0)
        best = _best_multiple(linear, 2.0 * (self._whole.objective + linear))
        return self._whole.dual_coef * best.clamp(1.0, max(1.0, C / self._whole_C))

    def _without_folds(self, whole: DualSolution, targets: Tensor, limits: Tensor) -> Tensor:
        """Take the held-out samples out of the fit on all, and stretch and balance what is left."""
        gradient = (whole.scores - whole.intercept).repeat(1, self._folds) - targets
        lower, upper = dual_bounds(targets, limits)
        kept = (whole.dual_coef.repeat(1, self._folds) * self._kept).T.contiguous()
        product = self._rows.product(kept, exact=False)
        best = _best_multiple((targets.T * kept).sum(dim=1), (kept * product).sum(dim=1))
        kept *= best.clamp(1.0, self._folds / (self._folds - 1.0)).unsqueeze(1)
        return settle(kept, gradient.T, lower.T, upper.T, torch.zeros_like(best)).T


def _best_multiple(linear: Tensor, quadratic: Tensor) -> Tensor:
    """Minimise ``1/2 t^2 quadratic - t linear``."""
    return linear / quadratic.clamp_min(torch.finfo(quadratic.dtype).tiny)
