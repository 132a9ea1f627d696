"""A stack of SVMs whose prototypes and coefficients move together, on what the last one returns."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from torchdnr.costs import stage
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.svm.compression import KernelSum, compress_svm, minimise, score_bound, with_prototypes
from torchdnr.svm.model_selection import grid_search, out_of_fold_scores
from torchdnr.svm.rbf_svm import RBFSVM

if TYPE_CHECKING:
    from torchdnr.dnr import SVMRejection

ANCHOR = 0.1
"""Weight of what each SVM loses by itself, against what the final scores lose."""


def stack_scores(
    svms: Mapping[str, Callable[[Tensor], Tensor]], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score features by every SVM of a stack.

    Args:
        svms: By layer, and under another name the combiner, if there is one.
        features: By layer, ``(n, d)``.

    Returns:
        Scores by SVM, ``(n, c)``, the final ones last.
    """
    scores = {name: svms[name](values) for name, values in features.items()}
    for name in svms:
        if name not in features:
            scores[name] = svms[name](torch.cat(list(scores.values()), dim=1))
    return scores


class JointProblem:
    """Least squares on the final scores, each SVM anchored at what it was to return by itself.

    Args:
        svms: The stack to replace.
        compressed: The stack to begin with.
        features: By layer, ``(n, d)``.
        wanted: Scores of ``svms`` by name.
        names: The SVMs whose prototypes move.
        smoothness: Weight of the difference in the space of the kernel.
    """

    def __init__(
        self,
        svms: Mapping[str, RBFSVM],
        compressed: Mapping[str, RBFSVM],
        features: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        names: Sequence[str],
        smoothness: float,
    ) -> None:
        self.targets = {name: KernelSum.of(svm) for name, svm in svms.items()}
        self.start = {name: KernelSum.of(svm) for name, svm in compressed.items()}
        self.intercepts = {name: svm.intercept.double() for name, svm in svms.items()}
        self.features, self.wanted, self.names = features, wanted, list(names)
        self.smoothness = smoothness
        self.final = list(svms)[-1]
        spreads = {n: w.double().var(dim=0, correction=0).sum() for n, w in wanted.items()}
        self.scale = {n: torch.where(spread > 0.0, spread, 1.0) for n, spread in spreads.items()}

    def pairs(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tell prototypes and coefficients of the SVMs that move."""
        return dict(zip(self.names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate the objective, and add its gradient to ``.grad`` of the tensors."""
        moved, total = self.pairs(tensors), torch.zeros_like(self.scale[self.final])
        for name, pair in moved.items():
            part = 2 * self.smoothness * self.targets[name].distance(*pair) / self.scale[name]
            (ANCHOR * part).backward()
            total = total + ANCHOR * part.detach()
        scorers = {
            name: partial(self._score, name, moved.get(name, (own.vectors, own.coefficients)))
            for name, own in self.start.items()
        }
        count = len(self.wanted[self.final])
        rows = min(target.block_rows for target in self.targets.values())
        for top in range(0, count, rows):
            block = slice(top, top + rows)
            inputs = {name: z[block].double() for name, z in self.features.items()}
            part = torch.zeros_like(total)
            for name, found in stack_scores(scorers, inputs).items():
                error = (found - self.wanted[name][block]).square().sum() / self.scale[name]
                part = part + (1.0 if name == self.final else ANCHOR) * error / count
            part.backward()
            total = total + part.detach()
        return total

    def _score(self, name: str, pair: tuple[Tensor, Tensor], inputs: Tensor) -> Tensor:
        return self.targets[name].scores(inputs, *pair) + self.intercepts[name]


def tune_together(
    svms: Mapping[str, RBFSVM],
    compressed: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    steps: int,
    smoothness: float,
) -> dict[str, RBFSVM]:
    """Descend on the difference of the final scores by all prototypes and coefficients at once.

    Args:
        svms: The original SVMs: by layer, then the combiner.
        compressed: Those in their place, left as they are.
        features: By layer, ``(n, d)``.
        wanted: Scores of the original SVMs, by name.
        names: The SVMs whose prototypes move.
        steps: Iterations of L-BFGS; the best point is kept.
        smoothness: Weight of the difference in the space of the kernel.

    Returns:
        SVMs by name, the ones that do not move as they were.
    """
    problem = JointProblem(svms, compressed, features, wanted, names, smoothness)
    start = [
        t for n in problem.names for t in (problem.start[n].vectors, problem.start[n].coefficients)
    ]
    found = problem.pairs(minimise(start, problem.loss, steps))
    return {
        name: with_prototypes(svm, *found[name]) if name in found else svm
        for name, svm in compressed.items()
    }


Classifier = TypeVar("Classifier", bound="SVMRejection")

WARN_BELOW = 0.99
"""Least R^2 of the final scores, and least share of labels kept, without a warning."""


class CompressionWarning(UserWarning):
    """A compressed classifier scores visibly unlike the one it stands for."""


def chosen_sizes(
    svms: Mapping[str, RBFSVM],
    prototypes: int | Mapping[str, int] | None,
    factor: float | None,
) -> dict[str, int]:
    """Settle how many prototypes each SVM gets.

    Args:
        svms: The fitted SVMs by name.
        prototypes: A number for each SVM, or numbers by name; SVMs without one stay as they are.
        factor: How many times fewer vectors each SVM gets, >= 1, in the place of ``prototypes``.

    Returns:
        Prototypes by name.

    Raises:
        ValueError: If not exactly one of the two is given, or it is not as said above.
    """
    if (prototypes is None) == (factor is None):
        raise ValueError(
            "compress takes either prototypes, a number or numbers by SVM, or factor, how many "
            f"times fewer; got prototypes={prototypes!r} and factor={factor!r}"
        )
    counts = {name: len(svm.support_vectors) for name, svm in svms.items()}
    if factor is not None:
        if not isinstance(factor, Real) or not 1.0 <= factor < float("inf"):
            raise ValueError(f"factor must be a number >= 1, got {factor!r}")
        return {name: max(1, round(m / factor)) for name, m in counts.items()}
    sizes = dict(prototypes) if isinstance(prototypes, Mapping) else dict.fromkeys(svms, prototypes)
    unknown = sorted(set(sizes) - set(svms))
    if unknown or not sizes:
        raise ValueError(f"prototypes must be named after {list(svms)}, got {unknown or 'none'}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= counts[name]:
            raise ValueError(
                f"prototypes of {name!r} must be an integer in 1..{counts[name]}, its number of "
                f"support vectors, got {size!r}; numbers by SVM, or factor, suit several sizes"
            )
    return sizes


@torch.no_grad()
def compress_stack(
    svms: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    *,
    steps: int,
    joint_steps: int,
    smoothness: float,
) -> dict[str, RBFSVM]:
    """Compress the SVMs of a stack one after the other, then fine-tune them on the final scores.

    The combiner learns to give the original scores on what the compressed SVMs return.

    Args:
        svms: By layer, and the combiner if there is one.
        features: By layer, ``(n, d)``.
        sizes: Prototypes by SVM; an SVM without stays as it is.
        steps: Iterations of L-BFGS for each SVM.
        joint_steps: Iterations of L-BFGS for all of them together.
        smoothness: Weight of the difference in the space of the kernel.

    Returns:
        SVMs by the same names.
    """
    wanted = stack_scores(svms, features)
    compressed: dict[str, RBFSVM] = {}
    options = {"steps": steps, "smoothness": smoothness}
    for name, svm in svms.items():
        inputs = features.get(name)
        if inputs is None:
            inputs = torch.cat([compressed[layer](z) for layer, z in features.items()], dim=1)
        compressed[name] = svm if name in sizes else deepcopy(svm)
        if name in sizes:
            compressed[name] = compress_svm(
                svm, inputs, sizes[name], targets=wanted[name], **options
            )
    if len(svms) == len(features):
        return compressed
    parts = (svms, compressed, features, wanted, list(sizes))
    return tune_together(*parts, steps=joint_steps, smoothness=smoothness)


@torch.no_grad()
def stack_losses(
    svms: Mapping[str, RBFSVM],
    compressed: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """Measure what a compressed stack has lost, SVM by SVM.

    Each SVM is measured in its stack: the combiner on what the SVMs before it return, so that the
    last entry is about the final scores.

    Args:
        svms: The original ones.
        compressed: Those in their place.
        features: By layer, ``(n, d)``.

    Returns:
        By SVM, as JSON values: ``support_vectors`` and ``prototypes`` in their place; ``r2`` of the
        scores and their ``largest_difference``; ``label_agreement``, the share of inputs whose
        largest score is that of the same class; ``score_bound``: no features whatever, given to
        both of this SVM alone, let their scores differ more.
    """
    before, after = stack_scores(svms, features), stack_scores(compressed, features)
    found = {}
    for name, scores in before.items():
        wanted, given = scores.double(), after[name].double()
        spread = (wanted - wanted.mean(dim=0)).square().sum().clamp_min(1e-300)
        found[name] = {
            "support_vectors": len(svms[name].support_vectors),
            "prototypes": len(compressed[name].support_vectors),
            "r2": (1 - (given - wanted).square().sum() / spread).item(),
            "largest_difference": (given - wanted).abs().max().item(),
            "label_agreement": (wanted.argmax(1) == given.argmax(1)).double().mean().item(),
            "score_bound": score_bound(svms[name], compressed[name]).max().item(),
        }
    return found


def warn_of_losses(losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if the final scores lost more than a little.

    Args:
        losses: From ``stack_losses``.
    """
    name, final = list(losses.items())[-1]
    if min(final["r2"], final["label_agreement"]) < WARN_BELOW:
        warnings.warn(
            f"the compressed scores of {name!r} keep {final['label_agreement']:.1%} of the labels "
            f"and R^2 {final['r2']:.3f}: use more prototypes, or attack it before you trust it",
            CompressionWarning,
            stacklevel=4,
        )


def compression_report(model: "SVMRejection") -> str:
    """Format what a compressed classifier has lost on the images it was compressed with.

    Args:
        model: What ``compress`` returned, also after ``load``.

    Returns:
        A table with a row per SVM, each measured in its stack; the last row is the final scores.

    Raises:
        ValueError: If the classifier is not a compressed one.
    """
    entries = {name: chosen.get("compression") for name, chosen in model.selection.items()}
    if not entries or None in entries.values():
        raise ValueError("this classifier is not compressed: call compress(images, ...) first")
    lines = [
        f"{'SVM':<16} {'vectors':>15} {'R^2':>8} {'largest difference':>19} "
        f"{'anywhere at most':>17} {'same label':>11}"
    ]
    for name, entry in entries.items():
        vectors = f"{entry['support_vectors']} -> {entry['prototypes']}"
        lines.append(
            f"{name:<16} {vectors:>15} {entry['r2']:>8.4f} {entry['largest_difference']:>19.3g} "
            f"{entry['score_bound']:>17.3g} {entry['label_agreement']:>11.1%}"
        )
    return "\n".join(lines)


class FittedSVM(NamedTuple):
    """One SVM and how it came about.

    Attributes:
        svm: The SVM.
        selection: Its hyper-parameters, and what a search saw; JSON values.
        held_out: Out-of-fold scores ``(n, c)`` for the combiner, if asked for.
    """

    svm: RBFSVM
    selection: dict[str, Any]
    held_out: Tensor | None


@dataclass(frozen=True)
class SVMOptions:
    """What the SVMs of a classifier have in common; the options are described in ``DNR``."""

    hyperparameters: Mapping[str, tuple[float, float]]
    C_grid: tuple[float, ...]
    gamma_grid: tuple[float, ...]
    folds: int
    stacking_folds: int
    tol: float
    seed: int
    memory_limit: int | None

    def __post_init__(self) -> None:
        """Check what no SVM checks by itself."""
        if min(self.folds, self.stacking_folds) < 2:
            raise ValueError(
                f"folds must be >= 2, got folds={self.folds} and "
                f"stacking_folds={self.stacking_folds}"
            )

    def checked(self, names: Collection[str]) -> Self:
        """Check hyper-parameters by name.

        Args:
            names: The names that there are.

        Returns:
            These options, with hyper-parameters as floats.

        Raises:
            ValueError: If a name is unknown, or a value is not two numbers > 0.
        """
        given = self.hyperparameters
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(
                f"hyperparameters must be named after one of {list(names)}, got {unknown}"
            )
        for name, pair in given.items():
            numbers = isinstance(pair, Sequence) and all(
                isinstance(value, Real) and value > 0 for value in pair
            )
            if not numbers or len(pair) != 2:
                raise ValueError(
                    f"hyperparameters must be (C, gamma), two numbers > 0, got {name!r}: {pair!r}"
                )
        floats = {name: (float(C), float(gamma)) for name, (C, gamma) in given.items()}
        return replace(self, hyperparameters=floats)

    def fit(
        self,
        name: str,
        features: ShardedFeatures,
        labels: Tensor,
        *,
        stack: bool,
        progress: bool,
    ) -> FittedSVM:
        """Fit one SVM, after a search for (C, gamma) where none are given for its name.

        Args:
            name: Layer or combiner, as in ``hyperparameters``.
            features: ``(n, d)``.
            labels: int64 ``(n,)``, 0..c-1.
            stack: Whether out-of-fold scores are wanted as well.
            progress: Whether to show a progress bar of the search.

        Returns:
            The SVM, how its hyper-parameters were found, and the out-of-fold scores.
        """
        common = {"tol": self.tol, "memory_limit": self.memory_limit}
        if name in self.hyperparameters:
            C, gamma = self.hyperparameters[name]
            selection: dict[str, Any] = {"C": C, "gamma": gamma}
            with stage("fit"):
                svm = RBFSVM(C, gamma, tol=self.tol)
                svm.fit(features, labels, memory_limit=self.memory_limit)
        else:
            with stage("search"):
                search = grid_search(
                    features,
                    labels,
                    C_grid=self.C_grid,
                    gamma_grid=self.gamma_grid,
                    folds=self.folds,
                    seed=self.seed,
                    progress=progress,
                    description=f"grid search, {name}",
                    **common,
                )
            selection, svm = search.to_dict(), search.svm
        if not stack:
            return FittedSVM(svm, selection, None)
        with stage("stacking"):
            held_out = out_of_fold_scores(
                features,
                labels,
                C=svm.C,
                gamma=svm.gamma,
                folds=self.stacking_folds,
                seed=self.seed,
                **common,
            )
        return FittedSVM(svm, selection, held_out)

    def to_dict(self) -> dict[str, Any]:
        """Convert to the constructor's arguments of a classifier, as JSON values."""
        return {
            **vars(self),
            "hyperparameters": {name: list(pair) for name, pair in self.hyperparameters.items()},
            "C_grid": list(self.C_grid),
            "gamma_grid": list(self.gamma_grid),
        }
