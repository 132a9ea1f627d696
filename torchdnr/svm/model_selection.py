"""Model selection for RBF-SVMs: stratified folds, a grid over (C, gamma), out-of-fold scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.kernels import scale_gamma, squared_distances
from torchdnr.svm.checks import check_features, check_labels
from torchdnr.svm.dual import DualSolution
from torchdnr.svm.module import one_vs_rest
from torchdnr.svm.solver import solve_dual

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMA_GRID = (0.0625, 0.25, 1.0, 4.0)
"""Multiples of gamma = "scale", so that one grid fits any layer."""


@dataclass(frozen=True)
class GridSearch:
    """Result of a search over (C, gamma).

    Attributes:
        C: The chosen C.
        gamma: The chosen gamma, an absolute number.
        C_grid: Values of C tried.
        gamma_grid: Absolute values of gamma tried.
        accuracy: Cross-validated accuracy, ``(len(C_grid), len(gamma_grid))``.
        not_converged: Dual problems that missed the tolerance, over the whole search.
    """

    C: float
    gamma: float
    C_grid: tuple[float, ...]
    gamma_grid: tuple[float, ...]
    accuracy: Tensor
    not_converged: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("C_grid", "gamma_grid")}
        return {**vars(self), **lists, "accuracy": self.accuracy.tolist()}


def stratified_folds(labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Deal the samples of every class evenly to the folds, in a seeded random order.

    Args:
        labels: ``(n,)`` in 0..c-1.
        folds: Number of folds, >= 2.
        seed: Of the random order.

    Returns:
        Fold of each sample, ``(n,)`` in 0..folds-1. Sizes differ by at most one within a class
        and, the remainders being dealt on, over all samples.

    Raises:
        ValueError: If a class has fewer samples than there are folds.
    """
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    counts = torch.bincount(labels)
    present = counts[counts > 0]
    if len(present) == 0 or int(present.min()) < folds:
        smallest = int(present.min()) if len(present) else 0
        raise ValueError(
            f"every class needs at least as many samples as folds = {folds}, got a class with "
            f"{smallest}: add samples or use fewer folds"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=labels.device) % folds
    return fold


@torch.no_grad()
def grid_search(
    features: Tensor,
    labels: Tensor,
    *,
    C_grid: Sequence[float] = C_GRID,
    gamma_grid: Sequence[float] = GAMMA_GRID,
    folds: int = 5,
    seed: int = 0,
    tol: float = 1e-3,
    distances: Tensor | None = None,
    progress: bool = False,
    description: str = "grid search",
) -> GridSearch:
    """Find the (C, gamma) of the best cross-validated accuracy.

    Ties are broken towards the smallest C, then the largest gamma: among equally accurate
    machines the most regularised, and of these the one whose scores fall off fastest away from
    the data, which is what rejection is for.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` in 0..c-1.
        C_grid: Values of C, > 0.
        gamma_grid: Multiples of gamma = "scale", > 0.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand.
        progress: Whether to show a progress bar.
        description: What the progress bar is called.

    Returns:
        The chosen pair and the whole table.

    Raises:
        ValueError: If the data, a grid or the folds do not fit.

    Warns:
        ConvergenceWarning: For each grid point with problems that missed ``tol``.
    """
    check_features(features)
    c = check_labels(labels, len(features))
    Cs, scale = tuple(sorted(float(C) for C in C_grid)), scale_gamma(features)
    gammas = tuple(sorted(scale * float(multiple) for multiple in gamma_grid))
    if not Cs or not gammas or min(*Cs, *gammas) <= 0.0:
        raise ValueError(f"grids must hold numbers > 0, got C {C_grid} and gamma {gamma_grid}")
    fold = stratified_folds(labels, folds, seed)
    if distances is None:
        distances = squared_distances(features, features, features.mean(dim=0))
    accuracy = torch.zeros(len(Cs), len(gammas), dtype=torch.float64)
    not_converged = 0
    bar = tqdm(total=len(Cs) * len(gammas), desc=description, unit="fit", disable=not progress)
    with bar:
        for column, gamma in enumerate(gammas):
            kernel = torch.exp(distances * -gamma)
            initial = None
            for row, C in enumerate(Cs):
                scores, solution = _held_out_scores(kernel, labels, c, fold, C, tol, initial)
                initial = solution.dual_coef  # feasible for every larger C
                hits = scores.argmax(dim=1) == labels
                accuracy[row, column] = hits.double().mean()
                not_converged += int((~solution.converged).sum())
                bar.update()
    row, column = _best(accuracy)
    return GridSearch(Cs[row], gammas[column], Cs, gammas, accuracy, not_converged)


@torch.no_grad()
def out_of_fold_scores(
    features: Tensor,
    labels: Tensor,
    *,
    C: float,
    gamma: float,
    folds: int = 3,
    seed: int = 0,
    tol: float = 1e-3,
    distances: Tensor | None = None,
) -> Tensor:
    """Score every sample by the machine that was fitted on the other folds.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` in 0..c-1.
        C: Upper bound of the dual variables.
        gamma: Kernel width.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand.

    Returns:
        Scores, ``(n, c)``, in the dtype of the features.

    Raises:
        ValueError: If the data or the folds do not fit.

    Warns:
        ConvergenceWarning: If a problem missed ``tol``.

    Source: Wolpert, "Stacked generalization" (1992); Sotgiu et al., Sec. IV-A.
    """
    check_features(features)
    c = check_labels(labels, len(features))
    fold = stratified_folds(labels, folds, seed)
    if distances is None:
        distances = squared_distances(features, features, features.mean(dim=0))
    kernel = torch.exp(distances * -gamma)
    scores, _ = _held_out_scores(kernel, labels, c, fold, C, tol, initial=None)
    return scores.to(features)


def _held_out_scores(
    kernel: Tensor,
    labels: Tensor,
    c: int,
    fold: Tensor,
    C: float,
    tol: float,
    initial: Tensor | None,
) -> tuple[Tensor, DualSolution]:
    """Fit all folds in one batch, held-out samples being those with C = 0; score them."""
    folds = int(fold.max()) + 1
    kept = fold.unsqueeze(1) != torch.arange(folds, device=fold.device)
    limits = C * kept.double().repeat_interleave(c, dim=1)  # column = fold * c + class
    targets = one_vs_rest(labels, c).repeat(1, folds)
    solution = solve_dual(kernel, targets, limits, tol=tol, initial=initial)
    scores = solution.scores.view(len(labels), folds, c)
    return scores[torch.arange(len(labels), device=fold.device), fold], solution


def _best(accuracy: Tensor) -> tuple[int, int]:
    """Pick the best entry: ties to the first row (smallest C), then the last column."""
    best = accuracy >= accuracy.max() - 1e-12
    row = int(best.any(dim=1).nonzero()[0])
    return row, int(best[row].nonzero()[-1])
