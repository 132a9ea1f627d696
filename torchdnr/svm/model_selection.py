"""Model selection for RBF-SVMs: stratified folds, a grid over (C, gamma), out-of-fold scores."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.arrays import ArrayLike, as_labels
from torchdnr.distributed.processes import ALONE, Processes, alone, warn_once
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.kernels.any_kernel import gamma_for_variance
from torchdnr.resources import progress_bar
from torchdnr.svm.checks import check_labels, checked_features, checked_sample_weight
from torchdnr.svm.dual import ACTIVE_SET, DESCENT, HANDED_OVER
from torchdnr.svm.folded_fits import FoldedFits, Kernels
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.multiclass import CheckedWeight, ClassWeight, PerClass, checked_class_weight
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.refinement import JUDGED, Refine, Refinement, check_refine, refine_point

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMA_GRID = (0.0625, 0.25, 1.0, 4.0)
"""Multiples of gamma = "scale", so that one grid fits any layer."""


METHODS = (DESCENT, ACTIVE_SET, HANDED_OVER)
PART = 1200
"""Samples on which points are tried before they are pruned, at the least."""


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
        pruned: Points that were not finished, bool as ``accuracy``, which is that on a part of the
            samples there; None where pruning was not asked for.
        method: What solved the problems of each point, those of all folds and of all samples: a
            name as in ``DualSolution.method`` to how many, int64 as ``accuracy``; 0 where pruned.
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
    pruned: Tensor | None = None
    method: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> Tensor | None:
        """Factors of the features that ``svm`` takes, ``(d,)``; None: it takes them as they are."""
        refined = self.refinement
        if refined is None or refined.scale is None or not refined.kept:
            return None
        return torch.tensor(refined.scale, dtype=torch.float64).to(self.svm.center)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the fit as JSON values."""
        apart = ("svm", "refinement", "pruned", "method")
        values = {name: value for name, value in vars(self).items() if name not in apart}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        refined = {} if self.refinement is None else {"refinement": self.refinement.to_dict()}
        pruned = {} if self.pruned is None else {"pruned": self.pruned.tolist()}
        method = {name: counts.tolist() for name, counts in self.method.items()}
        return {**values, "accuracy": self.accuracy.tolist(), "method": method} | refined | pruned


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
    pruning: bool = False,
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
        pruning: Whether to try all points on a part of the samples first, at least 1,200 of them,
            and to finish only those within two standard errors of the best one there. It saves most
            of the time of a large grid; a point that needs all samples to win may be missed.
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
    fold = stratified_folds(labels, folds, seed)
    if refine:
        stratified_folds(labels, JUDGED)  # before the work, an error if a class has too few samples
    grid = _Grid(Cs, gammas, scale, labels, fold, c, weight, tol, max_steps, class_weight)
    pruned, not_converged = torch.zeros(len(Cs), len(gammas), dtype=torch.bool), 0
    rough = pruned.double()
    if pruning:
        rough, pruned, not_converged = _prune(features, grid, memory_limit)
    kernels = Kernels(features, distances, c * folds, memory_limit)
    processes, searched = ALONE, kernels
    if distances is None and _searched_apart(features, len(gammas), kernels.limit):
        processes = features.partition.processes
        whole = features.rows(slice(0, len(features)))
        searched = Kernels(whole, None, c * folds, memory_limit)
    total = sum(int((~pruned[:, j]).sum()) for j in range(len(gammas)) if processes.mine(j))
    with progress_bar(progress, total=total, desc=description, unit="point") as bar:
        trials = _Trials(grid, pruned, processes)
        for row, column, fits in trials.fits(searched):
            trials.judge(row, column, fits, fits.advance(Cs[row]))
            bar.update()
    accuracy, missed, method = trials.gathered()
    not_converged += missed
    finished = accuracy.masked_fill(pruned, -torch.inf)
    row, column, reason = _choose(finished, Cs, gammas, scale, grid.samples(), description)
    C, gamma = Cs[row], gammas[column]
    starts = {point.rank: point.start for point in trials.points}
    none = torch.zeros(len(labels), c, dtype=torch.float64, device=labels.device)
    start = starts.get(_rank(C, gamma, scale), none)
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
    accuracy = torch.where(pruned, rough, accuracy)
    result = GridSearch(*chosen, Cs, gammas, accuracy, reason, not_converged, svm, refinement)
    return replace(result, pruned=pruned if pruning else None, method=method)


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


@dataclass(frozen=True)
class _Grid:
    """What a search tries, and on which labels and folds."""

    Cs: tuple[float, ...]
    gammas: tuple[float, ...]
    scale: float
    labels: Tensor
    fold: Tensor
    classes: int
    weight: Tensor | None
    tol: float
    max_steps: int
    class_weight: ClassWeight | None

    def each(self) -> Tensor:
        """Return what each sample counts, float64 ``(n,)``."""
        ones = torch.ones_like(self.labels, dtype=torch.float64)
        return ones if self.weight is None else self.weight

    def samples(self) -> float:
        """Return how many equal weights tell as much: Kish's effective sample size."""
        each = self.each()
        return (each.sum().square() / each.square().sum()).item()

    def part(self, index: Tensor) -> "_Grid":
        """Return the same grid on some of the samples, with folds of their own."""
        labels, weight = self.labels[index], None if self.weight is None else self.weight[index]
        fold = stratified_folds(labels, int(self.fold.max()) + 1)
        return replace(self, labels=labels, fold=fold, weight=weight)


@dataclass
class _Trials:
    """Points of a grid as they are tried, all but the pruned ones, each width in one process.

    ``accuracy`` and ``solved``, the number of problems by METHODS ``(3, C, gamma)``, are 0 for what
    is not tried here; ``points`` are those that may be chosen, and ``not_converged`` counts
    problems that missed the tolerance.
    """

    grid: _Grid
    pruned: Tensor
    processes: Processes
    accuracy: Tensor = field(init=False)
    points: list["_Point"] = field(default_factory=list)
    not_converged: int = 0
    solved: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.accuracy = torch.zeros(self.pruned.shape, dtype=torch.float64)
        self.solved = torch.zeros(len(METHODS), *self.pruned.shape, dtype=torch.int64)
        self._each = self.grid.each()

    def fits(self, kernels: Kernels) -> Iterator[tuple[int, int, FoldedFits]]:
        """Give the points by place, each with fits that went as far as the C before."""
        grid = self.grid
        with nullcontext() if self.processes is ALONE else alone():  # each warns of its own
            for column, gamma in enumerate(grid.gammas):
                rows = (~self.pruned[:, column]).nonzero().squeeze(1).tolist()
                if not rows or not self.processes.mine(column):
                    continue
                problems = grid.labels, grid.classes, grid.fold, grid.tol, grid.max_steps
                fits = FoldedFits(kernels.rows(gamma), *problems, grid.class_weight, grid.weight)
                for row in rows:  # ascending: each C starts from the one before
                    yield row, column, fits
                self.not_converged += fits.not_converged

    def judge(self, row: int, column: int, fits: FoldedFits, scores: Tensor) -> None:
        """Note how many out-of-fold scores are right at a point."""
        grid, right = self.grid, scores.argmax(dim=1) == self.grid.labels
        share = ((self._each * right).sum() / self._each.sum()).item()
        self.accuracy[row, column] = share
        counts = fits.methods()
        self.solved[:, row, column] = torch.tensor([counts[name] for name in METHODS])
        rank = _rank(grid.Cs[row], grid.gammas[column], grid.scale)
        self.points = _contenders([*self.points, _Point(share, rank, fits.whole_start())])

    def gathered(self) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return accuracy, failures and what solved how many problems, over all processes."""
        accuracy, solved = (self.processes.all_reduce(t) for t in (self.accuracy, self.solved))
        failures = sum(self.processes.numbers(self.not_converged))
        return accuracy, failures, dict(zip(METHODS, solved, strict=True))


def _prune(
    features: ShardedFeatures, grid: _Grid, memory_limit: int | None
) -> tuple[Tensor, Tensor, int]:
    """Try all points on a part of the samples: accuracy, which ones cannot win, and failures.

    A class too small to be divided, or few samples, leave nothing to prune.
    """
    counted = (grid.each() > 0).nonzero().squeeze(1)
    labels, folds = grid.labels[counted], int(grid.fold.max()) + 1
    smallest = int(torch.bincount(labels, minlength=grid.classes).min())
    parts = min(len(labels) // PART, smallest // folds)  # every class in each fold of the part
    pruned = torch.zeros(len(grid.Cs), len(grid.gammas), dtype=torch.bool)
    if parts < 2:
        return pruned.double(), pruned, 0
    index = counted[stratified_folds(labels, parts) == 0]
    part, processes = grid.part(index), features.partition.processes
    kernels = Kernels(features.rows(index), None, part.classes * folds, memory_limit)
    trials = _Trials(part, pruned, processes)
    for row, column, fits in trials.fits(kernels):
        trials.judge(row, column, fits, fits.advance(part.Cs[row]))
    accuracy, not_converged, _ = trials.gathered()
    top = accuracy.max().item()
    pruned = accuracy < top - 2.0 * _standard_error(top, part.samples())
    return accuracy, pruned, not_converged


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
    good = accuracy >= top - _standard_error(top, n)
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


def _standard_error(accuracy: float, n: float) -> float:
    likely = (accuracy * n + 2.0) / (n + 4.0)  # Agresti and Coull's: at 100 % the error is not 0
    return math.sqrt(likely * (1.0 - likely) / (n + 4.0))


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
    kernels = Kernels(features, distances, c * folds, memory_limit)
    weight = checked_sample_weight(sample_weight, labels, c)
    fits = FoldedFits(
        kernels.rows(gamma), labels, c, fold, tol, class_weight=class_weight, weight=weight, C=C
    )
    scores = fits.advance(1.0)
    return scores.to(kernels.features.local)
