"""`SVMStack`: an SVM on the features of each layer, and one more that combines their scores."""

from collections.abc import Collection, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdnr.distributed.processes import warn_once
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.resources import has_float64, stage
from torchdnr.svm.compression import (
    WARN_BELOW,
    CompressionWarning,
    compress_stack,
    stack_losses,
)
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.implicit import implicit_out_of_fold_scores
from torchdnr.svm.model_selection import grid_search, out_of_fold_scores
from torchdnr.svm.multiclass import CheckedWeight, PerClass, checked_C
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.refinement import Refine, check_refine

COMBINER = "combiner"
"""Name of the combiner in ``hyperparameters`` and ``selection``, see ``svm_names``."""


def svm_names(layers: Sequence[str], combine: bool) -> list[str]:
    """Name the SVMs of a stack: by layer, then the combiner.

    Where a layer is called "combiner" the combiner is ".combiner": no layer's name begins so.
    """
    combiner = f".{COMBINER}" if COMBINER in layers else COMBINER
    return [*layers, combiner] if combine else list(layers)


@dataclass(frozen=True)
class SVMOptions:
    """What the SVMs of a stack have in common; the options are described in ``DNR``."""

    hyperparameters: Mapping[str, tuple[PerClass, float]]
    C_grid: tuple[float, ...]
    gamma_grid: tuple[float, ...]
    folds: int
    stacking_folds: int
    tol: float
    seed: int
    memory_limit: int | None
    class_weight: CheckedWeight = None
    refine: Refine = False

    def __post_init__(self) -> None:
        """Check what no SVM checks by itself."""
        check_refine(self.refine)
        if min(self.folds, self.stacking_folds) < 2:
            raise ValueError(
                f"folds must be >= 2, got folds={self.folds} and "
                f"stacking_folds={self.stacking_folds}"
            )

    def checked(self, names: Collection[str]) -> Self:
        """Return these options with hyper-parameters as numbers, for SVMs of these names."""
        given = self.hyperparameters
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(
                f"hyperparameters must be named after one of {list(names)}, got {unknown}"
            )
        numbers = {name: _checked_pair(name, pair) for name, pair in given.items()}
        return replace(self, hyperparameters=numbers)

    def to_dict(self) -> dict[str, Any]:
        """Convert to the constructor's arguments of a classifier, as JSON values."""
        # Files without these two can be read as before.
        unused = {"class_weight": self.class_weight is None, "refine": not self.refine}
        values = {name: v for name, v in vars(self).items() if not unused.get(name)}
        pairs = {name: list(map(_listed, pair)) for name, pair in self.hyperparameters.items()}
        return {**{name: _listed(v) for name, v in values.items()}, "hyperparameters": pairs}


def _listed(value: Any) -> Any:  # noqa: ANN401 - any option
    return list(value) if isinstance(value, tuple) else value


def _checked_pair(name: str, pair: Any) -> tuple[float | tuple[float, ...], float]:  # noqa: ANN401
    """Return (C, gamma) as floats, C perhaps one per class; refuse anything else."""
    C, gamma = pair if isinstance(pair, Sequence) and len(pair) == 2 else (pair, None)
    values: list[Any] = [*(C if isinstance(C, list | tuple) and C else [C]), gamma]
    if not all(isinstance(value, Real) and float(value) > 0 for value in values):
        raise ValueError(
            "hyperparameters must be (C, gamma), two numbers > 0, where C may be one per class, "
            f"got {name!r}: {pair!r}"
        )
    return checked_C(C), float(values[-1])


class SVMStack(nn.Module):
    """RBF-SVMs on the features of layers, and perhaps a combiner on their concatenated scores.

    There are no layers while they are not chosen yet; one layer needs no combiner. ``selection``
    says how each SVM got its hyper-parameters, named by ``svm_names``, as JSON values.
    """

    base_svms: nn.ModuleList
    combiner: RBFSVM | None

    def __init__(self, options: SVMOptions, layers: Sequence[str], *, combine: bool = True) -> None:
        super().__init__()
        if len(layers) > 1 and not combine:
            raise ValueError(f"several layers need a combiner, got layers {list(layers)}")
        self.layers = tuple(layers)
        common: dict[str, Any] = {"tol": options.tol, "class_weight": options.class_weight}
        self.base_svms = nn.ModuleList(RBFSVM(**common) for _ in layers)
        self.register_module("combiner", RBFSVM(**common) if combine else None)
        self.selection: dict[str, dict[str, Any]] = {}
        self.options = options.checked(list(self.named() if layers else options.hyperparameters))

    def named(self) -> dict[str, RBFSVM]:
        """Return the SVMs by layer, then the combiner; the last one gives the final scores."""
        svms: list[Any] = [*self.base_svms, *([] if self.combiner is None else [self.combiner])]
        return dict(zip(svm_names(self.layers, self.combiner is not None), svms, strict=True))

    @property
    def scales(self) -> dict[str, Tensor]:
        """Factors of the features, ``(d,)`` by layer, that the SVMs were fitted on and expect."""
        refined = {name: chosen.get("refinement", {}) for name, chosen in self.selection.items()}
        return {
            name: torch.tensor(point["scale"], dtype=torch.float64).to(self.named()[name].center)
            for name, point in refined.items()
            if "scale" in point and point["kept"]
        }

    @property
    def is_fitted(self) -> bool:
        """Whether all SVMs are."""
        return all(svm.is_fitted for svm in self.named().values())

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Score features ``(n, d)`` by layer: ``(n, c)``."""
        scores = []
        for name, svm in zip(self.layers, self.base_svms, strict=True):
            scores.append(svm(features[name]))
        return scores[0] if self.combiner is None else self.combiner(torch.cat(scores, dim=1))

    def fit(
        self,
        features: dict[str, ShardedFeatures],
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        progress: bool = False,
    ) -> Self:
        """Fit the base SVMs, then the combiner on their out-of-fold scores.

        ``features`` by layer, ``(n, d)``, is emptied on the way, so that memory is free again.
        Samples of weight 0 are left out of everything, also of the folds.
        """
        if sample_weight is not None and not sample_weight.all():
            kept = sample_weight.nonzero().squeeze(1)
            labels, sample_weight = labels[kept], sample_weight[kept]
            for name in features:
                features[name] = features[name].select(kept)
        options, partition = self.options, next(iter(features.values())).partition
        same: dict[str, Any] = {"tol": options.tol, "class_weight": options.class_weight}
        limits: dict[str, Any] = {
            "memory_limit": options.memory_limit,
            "sample_weight": sample_weight,
        }
        common: dict[str, Any] = {**same, **limits}
        held_out: list[Tensor] = []
        for name in self.named():
            if name in self.layers:
                inputs = features.pop(name)
            else:
                inputs = ShardedFeatures(torch.cat(held_out, dim=1)[partition.local], partition)
            if name in options.hyperparameters:
                C, gamma = options.hyperparameters[name]
                svm = RBFSVM(C, gamma, **same)
                with stage("fit"):
                    svm.fit(inputs, labels, **limits)
                self.selection[name] = {"C": _listed(C), "gamma": gamma}
            else:
                # The inputs of the combiner are of one kind: they keep one width.
                refine = options.refine if name in self.layers else bool(options.refine)
                with stage("search"):
                    search = grid_search(
                        inputs,
                        labels,
                        C_grid=options.C_grid,
                        gamma_grid=options.gamma_grid,
                        folds=options.folds,
                        seed=options.seed,
                        refine=refine,
                        progress=progress,
                        description=f"grid search, {name}",
                        **common,
                    )
                svm, self.selection[name] = search.svm, search.to_dict()
                if search.scale is not None:
                    inputs = inputs.times(search.scale)
            if name not in self.layers:
                self.combiner = svm
                break
            self.base_svms[self.layers.index(name)] = svm
            if self.combiner is not None:
                with stage("stacking"):
                    scores = out_of_fold_scores(
                        inputs,
                        labels,
                        C=self.selection[name]["C"],
                        gamma=self.selection[name]["gamma"],
                        folds=options.stacking_folds,
                        seed=options.seed,
                        **common,
                    )
                held_out.append(scores)
        return self

    def refitted(
        self, features: Mapping[str, Tensor], labels: Tensor, sample_weight: Tensor | None = None
    ) -> "SVMStack":
        """Return a stack fitted on other features, which keeps the graph; see ``DNR.refitted``."""
        if sample_weight is not None and not sample_weight.all():
            kept = sample_weight.nonzero().squeeze(1)
            labels, sample_weight = labels[kept], sample_weight[kept]
            features = {name: rows[kept] for name, rows in features.items()}
        options, held_out = self.options, list[Tensor]()
        fold = stratified_folds(labels, options.stacking_folds, options.seed)
        svms: dict[str, RBFSVM] = {}
        for name in self.named():
            inputs = features[name] if name in self.layers else torch.cat(held_out, dim=1)
            C, gamma = self.selection[name]["C"], self.selection[name]["gamma"]
            svm = RBFSVM(C, gamma, tol=options.tol, class_weight=options.class_weight)
            svms[name] = svm.fit(inputs, labels, sample_weight=sample_weight, differentiable=True)
            if name in self.layers and self.combiner is not None:
                scores, _ = implicit_out_of_fold_scores(
                    inputs,
                    labels,
                    fold,
                    C=C,
                    gamma=gamma,
                    class_weight=options.class_weight,
                    sample_weight=sample_weight,
                )
                held_out.append(scores)
        return self._with(svms)

    def smoothed(self, factor: float, names: Collection[str] | None = None) -> "SVMStack":
        """Return a view whose kernels have ``factor`` times the gamma; see ``DNR.smoothed``."""
        svms = self.named()
        if unknown := sorted(set(names or ()) - set(svms)):
            raise ValueError(f"svms must be named after {list(svms)}, got {unknown}")
        chosen = svms if names is None else names
        return self._with({n: s.smoothed(factor) if n in chosen else s for n, s in svms.items()})

    def compressed(
        self,
        features: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        **options: Any,  # noqa: ANN401 - those of compress_stack
    ) -> "SVMStack":
        """Return a stack from ``compress_stack``; its ``selection`` says what was lost."""
        device = next(iter(self.named().values())).support_vectors.device
        original = self
        if not has_float64(device):
            original = deepcopy(self).to("cpu")
            features = {name: rows.cpu() for name, rows in features.items()}
        svms = compress_stack(original.named(), features, sizes, **options)
        losses = stack_losses(original.named(), svms, features)
        name, final = list(losses.items())[-1]
        if min(final["r2"], final["label_agreement"]) < WARN_BELOW:
            warn_once(
                f"the compressed scores of {name!r} keep {final['label_agreement']:.1%} of the "
                f"labels and R^2 {final['r2']:.3f}: use more prototypes, or attack it before you "
                "trust it",
                CompressionWarning,
                stacklevel=5,  # behind the two decorators of compress
            )
        stack = self._with(svms).to(device)
        stack.selection = {
            name: {**self.selection.get(name, {}), "compression": losses[name]} for name in svms
        }
        return stack

    def _with(self, svms: Mapping[str, RBFSVM]) -> "SVMStack":
        """Return a stack of the same options with other SVMs."""
        stack = copy(self)
        stack._modules = dict(self._modules)
        stack.base_svms = nn.ModuleList(svms[name] for name in self.layers)
        if self.combiner is not None:
            stack.combiner = svms[list(self.named())[-1]]
        return stack


def chosen_sizes(
    svms: Mapping[str, RBFSVM],
    prototypes: int | Mapping[str, int] | None,
    factor: float | None,
) -> dict[str, int]:
    """Decide how many prototypes each fitted SVM gets; see ``DNR.compress`` for the arguments."""
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
    sizes: dict[str, Any] = dict.fromkeys(svms, prototypes)
    if isinstance(prototypes, Mapping):
        sizes = dict(prototypes)
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
