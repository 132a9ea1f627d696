"""Model selection for RBF-SVMs: stratified folds, a grid over (C, gamma), out-of-fold scores."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.arrays import ArrayLike, as_labels
from torchdnr.distributed.processes import ALONE, alone, warn_once
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.kernels.any_kernel import gamma_for_variance
from torchdnr.resources import progress_bar
from torchdnr.svm.checks import check_labels, checked_features, checked_sample_weight
from torchdnr.svm.dual import DualSolution, dual_bounds
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.gram import all_distances, planned_rows
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import MEMORY_LIMIT, least_memory
from torchdnr.svm.multiclass import (
    ONE_VS_REST,
    CheckedWeight,
    ClassWeight,
    PerClass,
    checked_C,
    checked_class_weight,
    one_vs_rest,
    upper_bounds,
)
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.refinement import JUDGED, Refine, Refinement, check_refine, refine_point
from torchdnr.svm.solver import solve_dual
from torchdnr.svm.working_set import make_feasible

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMA_GRID = (0.0625, 0.25, 1.0, 4.0)
"""Multiples of gamma = "scale", so that one grid fits any layer."""


class SelectionWarning(UserWarning):
    """A grid of hyper-parameters leaves open which of its points is the best."""


@dataclass(frozen=True)
class GridSearch:
    """Result of a search over (C, gamma).

    Attributes:
        C: The chosen C; one per class where it was refined and that was kept.
        gamma: The chosen gamma, an absolute number.
        C_grid: Values of C tried.
        gamma_grid: Absolute values of gamma tried.
        accuracy: Cross-validated accuracy, ``(len(C_grid), len(gamma_grid))``.
        reason: Why this point was chosen, a sentence.
        not_converged: Dual problems that missed the tolerance, over the whole search.
        svm: The fit of the chosen point on all samples, times ``scale`` where there is one.
        refinement: What became of refining the point of the grid; None where it was not asked for.
    """

    C: float | tuple[float, ...]
    gamma: float
    C_grid: tuple[float, ...]
    gamma_grid: tuple[float, ...]
    accuracy: Tensor
    reason: str
    not_converged: int
    svm: RBFSVM
    refinement: Refinement | None = None

    @property
    def scale(self) -> Tensor | None:
        """Factors of the features that ``svm`` takes, ``(d,)``; None: it takes them as they are."""
        refined = self.refinement
        if refined is None or refined.scale is None or not refined.kept:
            return None
        return torch.tensor(refined.scale, dtype=torch.float64).to(self.svm.center)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the fit as JSON values."""
        apart = ("svm", "refinement")
        values = {name: value for name, value in vars(self).items() if name not in apart}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        refined = {} if self.refinement is None else {"refinement": self.refinement.to_dict()}
        return {**values, "accuracy": self.accuracy.tolist(), **refined}


@torch.no_grad()
def grid_search(
    features: ArrayLike | ShardedFeatures,
    labels: ArrayLike,
    *,
    C_grid: Sequence[float] = C_GRID,
    gamma_grid: Sequence[float] = GAMMA_GRID,
    folds: int = 5,
    seed: int = 0,
    tol: float = 1e-3,
    class_weight: ClassWeight | None = None,
    sample_weight: ArrayLike | None = None,
    max_steps: int = 1_000_000,
    distances: Tensor | None = None,
    memory_limit: int | None = None,
    refine: Refine = False,
    progress: bool = False,
    description: str = "grid search",
) -> GridSearch:
    """Search for the (C, gamma) of the best cross-validated accuracy, and fit it on all samples.

    Points within one standard error of the best accuracy are held for equally good. Of these the
    one nearest C = 1 is chosen, then nearest gamma = "scale", on a logarithmic scale: a rejecting
    classifier is the harder to evade the nearer it is to them. A much larger C fits single samples,
    a much smaller one accepts noise; a large gamma makes narrow peaks, on whose slopes little is
    needed to reach another class.

    Args:
        features: ``(n, d)``, or ``ShardedFeatures`` as in ``RBFSVM.fit``.
        labels: ``(n,)`` in 0..c-1.
        C_grid: Values of C, > 0.
        gamma_grid: Multiples of gamma = "scale", > 0.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        class_weight: Factors of C by class, as in ``RBFSVM``; ``"balanced"`` in every fold.
        sample_weight: Factor >= 0 of C per sample, ``(n,)``, and its share in the accuracy.
        max_steps: Steps per problem before it is given up with a warning, as in ``RBFSVM``.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand; of
            sharded features those to this process's rows, ``(n, k)``.
        memory_limit: Bytes that the search may take beyond its inputs; default 4 GiB.
        refine: Whether to improve the chosen point: C by class, and gamma, along the gradient of a
            smooth out-of-fold loss, in float64. What comes of it is kept if neither accuracy nor
            rejection is worse on samples that had no part in it, see ``Refinement``. ``"ard"``:
            also a width for each feature, by factors of the features, ``GridSearch.scale``.
        progress: Whether to show a progress bar.
        description: What the progress bar is called.

    Returns:
        The chosen pair, the whole table, and the fit of the chosen pair.

    Raises:
        ValueError: If the data, a grid, the folds, ``refine`` or the memory limit do not fit.

    Warns:
        ConvergenceWarning: For each grid point with problems that missed ``tol``.
        SelectionWarning: If all points are equally good, or only points at an end of a grid are.

    Source: the one-standard-error rule of Breiman et al., "Classification and regression trees",
    1984, Sec. 3.4.3.
    """
    check_refine(refine)
    features = ShardedFeatures.of(checked_features(features))
    labels = as_labels("labels", labels, features.local.device)
    c, labels = check_labels(labels, len(features)), labels.long()
    scale = gamma_for_variance(features.variance(), features.shape[1])
    Cs = tuple(sorted(float(C) for C in C_grid))
    gammas = tuple(sorted(scale * float(multiple) for multiple in gamma_grid))
    if not Cs or not gammas or min(*Cs, *gammas) <= 0.0:
        raise ValueError(f"grids must hold numbers > 0, got C {C_grid} and gamma {gamma_grid}")
    weight = checked_sample_weight(sample_weight, labels, c)
    each = torch.ones_like(labels, dtype=torch.float64) if weight is None else weight
    # Unequal weights tell as much as so many equal ones: Kish's effective sample size.
    samples = (each.sum().square() / each.square().sum()).item()
    fold = stratified_folds(labels, folds, seed)
    if refine:
        stratified_folds(labels, JUDGED)  # before the work, an error if a class has too few samples
    kernels = _Kernels(features, distances, c * folds, memory_limit)
    processes, searched = ALONE, kernels
    if distances is None and _searched_apart(features, len(gammas), kernels.limit):
        processes = features.partition.processes
        whole = features.rows(slice(0, len(features)))
        searched = _Kernels(whole, None, c * folds, memory_limit)
    accuracy = torch.zeros(len(Cs), len(gammas), dtype=torch.float64)
    points: list[_Point] = []
    not_converged = 0
    mine = [column for column in range(len(gammas)) if processes.mine(column)]
    bar = progress_bar(progress, total=len(Cs) * len(mine), desc=description, unit="point")
    with bar, nullcontext() if processes is ALONE else alone():  # each warns of its own
        for column in mine:
            gamma = gammas[column]
            fits = FoldedFits(
                searched.rows(gamma), labels, c, fold, tol, max_steps, class_weight, weight
            )
            for row, C in enumerate(Cs):  # ascending: each C starts from the one before
                scores = fits.advance(C)
                right = scores.argmax(dim=1) == labels
                share = ((each * right).sum() / each.sum()).item()
                accuracy[row, column] = share
                points.append(_Point(share, _rank(C, gamma, scale), fits.whole_start()))
                points = _contenders(points)
                bar.update()
            not_converged += fits.not_converged
    accuracy = processes.all_reduce(accuracy)
    not_converged = sum(processes.numbers(not_converged))
    row, column, reason = _choose(accuracy, Cs, gammas, scale, samples, description)
    C, gamma = Cs[row], gammas[column]
    starts = {point.rank: point.start for point in points}
    start = starts.get(_rank(C, gamma, scale), torch.zeros_like(points[0].start))
    start = processes.broadcast(start, processes.owner(column))
    refinement = None
    chosen: tuple[float | tuple[float, ...], float] = C, gamma
    if refine:
        refinement = _refined(
            features,
            labels,
            (C, gamma),
            checked_class_weight(class_weight),
            weight,
            folds=folds,
            seed=seed,
            ard=refine == "ard",
            memory_limit=kernels.limit,
        )
        reason = f"{reason}; refined: {refinement.reason}"
        if refinement.kept:
            chosen = refinement.C[1], refinement.gamma[1]
            if refinement.scale is not None:
                features = features.times(torch.tensor(refinement.scale, dtype=torch.float64))
                kernels.distances = None
    svm = RBFSVM(*chosen, tol=tol, max_steps=max_steps, class_weight=class_weight).fit(
        features,
        labels,
        sample_weight=weight,
        distances=kernels.distances,
        initial=start,
        memory_limit=kernels.limit,  # without the share of the distances
    )
    return GridSearch(*chosen, Cs, gammas, accuracy, reason, not_converged, svm, refinement)


def _refined(
    features: ShardedFeatures,
    labels: Tensor,
    point: tuple[float, float],
    class_weight: CheckedWeight,
    weight: Tensor | None,
    **options: Any,  # noqa: ANN401 - those of refine_point
) -> Refinement:
    """Refine a point in the first process, and tell the others what came of it."""
    processes, text = features.partition.processes, ""
    whole = features.rows(slice(0, len(features)))
    if processes.first:
        with alone():
            refinement = refine_point(whole, labels, point, class_weight, weight, **options)
        text = json.dumps(refinement.to_dict())
    return Refinement.from_dict(json.loads(processes.broadcast_text(text)))


class _Point(NamedTuple):
    """A point of the grid, and where a fit on all samples can start from."""

    accuracy: float
    rank: tuple[float, ...]  # of equally good points the one with the largest is chosen
    start: Tensor


def _searched_apart(features: ShardedFeatures, widths: int, limit: int) -> bool:
    """Tell whether several processes search some widths each: it saves them much waiting.

    Every one then needs all features and their Gram matrices, for which there has to be memory.
    """
    n, d = features.shape
    memory = features.local.element_size() * n * (4 * n + d)
    return 1 < features.partition.processes.count <= widths and memory <= limit


def _rank(C: float, gamma: float, scale: float) -> tuple[float, ...]:
    return -_octaves(C), -_octaves(gamma / scale), C, gamma


def _octaves(ratio: float) -> float:
    """Distance from 1 on a logarithmic scale, the same of a number and its inverse."""
    return round(abs(math.log2(ratio)), 9)


def _contenders(points: list[_Point]) -> list[_Point]:
    """Drop the points that cannot be chosen: another is as accurate, and ranks higher."""
    return [
        p for p in points if not any(q.accuracy >= p.accuracy and q.rank > p.rank for q in points)
    ]


def _choose(
    accuracy: Tensor,
    Cs: Sequence[float],
    gammas: Sequence[float],
    scale: float,
    n: float,
    name: str,
) -> tuple[int, int, str]:
    """Choose row and column of one of the equally good points, and say why.

    Warns where the grid leaves it open.
    """
    top = accuracy.max().item()
    likely = (top * n + 2.0) / (n + 4.0)  # Agresti and Coull's: at 100 % the error is not 0
    least = top - math.sqrt(likely * (1.0 - likely) / (n + 4.0))
    good = accuracy >= least
    row, column = max(
        good.nonzero().tolist(), key=lambda at: _rank(Cs[at[0]], gammas[at[1]], scale)
    )
    count, total = int(good.sum()), good.numel()
    reason = (
        f"C = {Cs[row]:g}, gamma = {gammas[column]:.4g}, the nearest to C = 1 and "
        f'gamma = "scale" of {count} in {total} points within one standard error of the best '
        f"accuracy, {top:.1%}"
    )
    if count == total > 1:
        _warn(f"{name}: the grid does not tell its points apart: {reason}; more samples may")
    for axis, grid, rows in (("C", Cs, good.any(dim=1)), ("gamma", gammas, good.any(dim=0))):
        only = grid[int(rows.int().argmax())]
        if len(grid) > 2 and rows.sum() == 1 and only in (grid[0], grid[-1]):
            _warn(
                f"{name}: the best accuracy, {top:.1%}, is at an end of the {axis} grid alone, "
                f"{only:g} in {grid[0]:g}..{grid[-1]:g}: extend {axis}_grid"
            )
    return row, column, reason


def _warn(message: str) -> None:
    warn_once(message, SelectionWarning, stacklevel=5)  # where grid_search was called


@torch.no_grad()
def out_of_fold_scores(
    features: ArrayLike | ShardedFeatures,
    labels: ArrayLike,
    *,
    C: PerClass,
    gamma: float,
    folds: int = 3,
    seed: int = 0,
    tol: float = 1e-3,
    class_weight: ClassWeight | None = None,
    sample_weight: ArrayLike | None = None,
    distances: Tensor | None = None,
    memory_limit: int | None = None,
) -> Tensor:
    """Score every sample by the machine that was fitted on the other folds.

    Args:
        features: ``(n, d)``, or ``ShardedFeatures`` as in ``RBFSVM.fit``.
        labels: ``(n,)`` in 0..c-1.
        C: Upper bound of the dual variables: a number, or one per class.
        gamma: Kernel width.
        folds: Number of stratified folds.
        seed: Of the folds.
        tol: Largest KKT violation accepted.
        class_weight: Factors of C by class, as in ``RBFSVM``; ``"balanced"`` in every fold.
        sample_weight: Factor >= 0 of C per sample, ``(n,)``.
        distances: Squared distances between all features, ``(n, n)``, if they are at hand; of
            sharded features those to this process's rows, ``(n, k)``.
        memory_limit: Bytes that the fits may take beyond their inputs; default 4 GiB.

    Returns:
        Scores, ``(n, c)``, in the dtype of the features; of all samples in every process.

    Raises:
        ValueError: If the data, the folds or the memory limit do not fit.

    Warns:
        ConvergenceWarning: If a problem missed ``tol``.

    Source: Wolpert, "Stacked generalization" (1992); Sotgiu et al., Sec. IV-A.
    """
    features = ShardedFeatures.of(checked_features(features))
    labels = as_labels("labels", labels, features.local.device)
    c, labels = check_labels(labels, len(features)), labels.long()
    fold = stratified_folds(labels, folds, seed)
    kernels = _Kernels(features, distances, c * folds, memory_limit)
    weight = checked_sample_weight(sample_weight, labels, c)
    fits = FoldedFits(
        kernels.rows(gamma), labels, c, fold, tol, class_weight=class_weight, weight=weight, C=C
    )
    scores = fits.advance(1.0)
    return scores.to(kernels.features.local)


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


class _Kernels:
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
