"""How the SVMs of DNR and NR are fitted: hyper-parameters given or searched, stacking, memory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Self

from torch import Tensor

from torchdnr.costs import stage
from torchdnr.distributed.sharing import SharedFeatures
from torchdnr.svm.model_selection import grid_search, out_of_fold_scores
from torchdnr.svm.rbf_svm import RBFSVM


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
        features: SharedFeatures,
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
