"""Model selection for RBF-SVMs: stratified folds, a grid over (C, gamma), out-of-fold scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.distributed.sharing import SharedFeatures
from torchdnr.kernels.any_kernel import scale_gamma
from torchdnr.svm.checks import check_features, check_labels
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.memory_plan import MEMORY_LIMIT, least_memory, plan_memory
from torchdnr.svm.rbf_rows import all_distances, distance_rows, plan_features, rbf_rows
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.warm_start import FoldedFits

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
        svm: The fit of the chosen point on all samples.
    """

    C: float
    gamma: float
    C_grid: tuple[float, ...]
    gamma_grid: tuple[float, ...]
    accuracy: Tensor
    not_converged: int
    svm: RBFSVM

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the fit as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "svm"}
        lists = {name: list(values[name]) for name in ("C_grid", "gamma_grid")}
        return {**values, **lists, "accuracy": self.accuracy.tolist()}


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
    features: Tensor | SharedFeatures,
    labels: Tensor,
    *,
    C_grid: Sequence[float] = C_GRID,
    gamma_grid: Sequence[float] = GAMMA_GRID,
    folds: int = 5,
    seed: int = 0,
    tol: float = 1e-3,
    distances: Tensor | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
    description: str = "grid search",
) -> GridSearch:
    """Find the (C, gamma) of the best cross-validated accuracy, and fit it on all samples.

    Ties are broken towards the smallest C, then the largest gamma: among equally accurate
    machines the most regularised, and of these the one whose scores fall off fastest away from
    the data, which is what rejection is for.

    Args:
        features: ``(n, d)``, or ``SharedFeatures`` as in ``RBFSVM.fit``.
        labels: ``(n,)`` in 0..c-1.
        C_grid: Values of C, > 0.
        gamma_grid: Multiples of gamma = "scale", > 0.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand; of
            shared features those to this process's rows, ``(n, k)``.
        memory_limit: Bytes that the search may take beyond its inputs; default 4 GiB.
        progress: Whether to show a progress bar.
        description: What the progress bar is called.

    Returns:
        The chosen pair, the whole table, and the fit of the chosen pair.

    Raises:
        ValueError: If the data, a grid, the folds or the memory limit do not fit.

    Warns:
        ConvergenceWarning: For each grid point with problems that missed ``tol``.
    """
    check_features(features)
    c, labels = check_labels(labels, len(features)), labels.long()
    Cs, scale = tuple(sorted(float(C) for C in C_grid)), scale_gamma(features)
    gammas = tuple(sorted(scale * float(multiple) for multiple in gamma_grid))
    if not Cs or not gammas or min(*Cs, *gammas) <= 0.0:
        raise ValueError(f"grids must hold numbers > 0, got C {C_grid} and gamma {gamma_grid}")
    fold = stratified_folds(labels, folds, seed)
    kernels = _Kernels(features, distances, c * folds, memory_limit)
    accuracy = torch.zeros(len(Cs), len(gammas), dtype=torch.float64)
    best, not_converged = None, 0
    bar = tqdm(total=len(Cs) * len(gammas), desc=description, unit="point", disable=not progress)
    with bar:
        for column, gamma in enumerate(gammas):
            fits = FoldedFits(kernels.rows(gamma), labels, c, fold, tol)
            for row, C in enumerate(Cs):  # ascending: each C starts from the one before
                scores = fits.advance(C)
                hits = int((scores.argmax(dim=1) == labels).sum())
                accuracy[row, column] = hits / len(labels)
                if best is None or (hits, -row, column) > best[0]:
                    best = (hits, -row, column), C, gamma, fits.dual_coef
                bar.update()
            not_converged += fits.not_converged
    _, C, gamma, dual_coef = best
    svm = RBFSVM(C, gamma, tol=tol).fit(
        features,
        labels,
        distances=kernels.distances,
        initial=dual_coef,
        memory_limit=kernels.limit,  # the distances have their share of it
    )
    return GridSearch(C, gamma, Cs, gammas, accuracy, not_converged, svm)


@torch.no_grad()
def out_of_fold_scores(
    features: Tensor | SharedFeatures,
    labels: Tensor,
    *,
    C: float,
    gamma: float,
    folds: int = 3,
    seed: int = 0,
    tol: float = 1e-3,
    distances: Tensor | None = None,
    memory_limit: int | None = None,
) -> Tensor:
    """Score every sample by the machine that was fitted on the other folds.

    Args:
        features: ``(n, d)``, or ``SharedFeatures`` as in ``RBFSVM.fit``.
        labels: ``(n,)`` in 0..c-1.
        C: Upper bound of the dual variables.
        gamma: Kernel width.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand; of
            shared features those to this process's rows, ``(n, k)``.
        memory_limit: Bytes that the fits may take beyond their inputs; default 4 GiB.

    Returns:
        Scores, ``(n, c)``, in the dtype of the features; of all samples in every process.

    Raises:
        ValueError: If the data, the folds or the memory limit do not fit.

    Warns:
        ConvergenceWarning: If a problem missed ``tol``.

    Source: Wolpert, "Stacked generalization" (1992); Sotgiu et al., Sec. IV-A.
    """
    check_features(features)
    c, labels = check_labels(labels, len(features)), labels.long()
    fold = stratified_folds(labels, folds, seed)
    kernels = _Kernels(features, distances, c * folds, memory_limit)
    scores = FoldedFits(kernels.rows(gamma), labels, c, fold, tol).advance(C)
    return scores.to(kernels.features.own)


class _Kernels:
    """Gram matrices of several widths: from common distances, where there is room for them.

    Attributes:
        limit: Bytes that are left beside the distances computed here.
    """

    def __init__(
        self,
        features: Tensor | SharedFeatures,
        distances: Tensor | None,
        problems: int,
        memory_limit: int | None,
    ) -> None:
        self.features = features = SharedFeatures.of(features)
        n, itemsize, width = len(features), features.own.element_size(), features.shares.largest
        self.limit = MEMORY_LIMIT if memory_limit is None else int(memory_limit)
        self.center = features.means()
        self.distances = distances
        if distances is None:
            whole = itemsize * n * width
            left = self.limit - whole
            # Half of what remains has to do for the rows of one width.
            if 3 * whole <= left and least_memory(n, problems, itemsize, width=width) <= left:
                self.distances = all_distances(features, self.center, left)
                self.limit = left
        self.blocks = plan_features(features, problems, self.limit)
        copies = self.blocks.taken if self.distances is None else 0
        self.plan = plan_memory(n, problems, itemsize, self.limit, copies, width)

    def rows(self, gamma: float) -> KernelRows:
        """Prepare the Gram matrix of one width."""
        if self.distances is not None:
            return distance_rows(self.distances, gamma, self.plan, self.features.shares)
        return rbf_rows(self.features, gamma, self.center, self.plan, self.blocks)
